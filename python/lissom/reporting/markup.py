# SPDX-License-Identifier: Apache-2.0
"""HTML and SVG elements that escape their text, and the few forms a page is made of."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any


class Markup(str):
    """Text that is markup already; every other string is escaped when it becomes a child."""


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
        name: tag name.
        children: elements, text (escaped), numbers, lists of these; None is left out.
        attributes: values are escaped; None is left out; `class_` is `class`, other underscores are hyphens.

    Returns:
        The markup.

    Example:
        >>> element("p", "a < b", class_="note")
        '<p class="note">a &lt; b</p>'
    """
    shown = "".join(
        f' {_attribute_name(key)}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("meta", "br", "col", "line", "rect", "circle") and not children:
        return Markup(f"<{name}{shown}/>" if name in ("line", "rect", "circle") else f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: Any) -> Markup:
    """Children one after the other, escaped where they are text."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, (list, tuple)):
            parts.append(join(*child))
        else:
            parts.append(child if isinstance(child, Markup) else html.escape(str(child)))
    return Markup("".join(parts))


def section(title: str, *content: Markup | None) -> Markup:
    """A titled part of the page."""
    return element("section", element("h2", title), *content)


def figure(plot: Markup, title: str | None = None, caption: str | None = None) -> Markup:
    """A plot with its title above and its explanation below."""
    return element(
        "figure",
        element("h3", title) if title else None,
        plot,
        element("figcaption", caption) if caption else None,
    )


def fold(title: str, *content: Markup) -> Markup:
    """Something the reader opens when wanted."""
    return element("details", element("summary", title), *content)


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> Markup:
    """A table that scrolls sideways where it does not fit."""
    body = [element("tr", [element("td", cell) for cell in row]) for row in rows]
    return element(
        "div",
        element(
            "table",
            element("thead", element("tr", [element("th", h, scope="col") for h in heads])),
            element("tbody", body),
        ),
        class_="wide",
        tabindex="0",
    )


def pairs(values: dict[str, Any]) -> Markup:
    """Names and values; nested ones as words."""
    rows = [
        element("tr", element("th", key.replace("_", " "), scope="row"), element("td", _words(value)))
        for key, value in values.items()
        if value is not None
    ]
    whole = element("table", element("tbody", rows), class_="pairs")
    return element("div", whole, class_="wide", tabindex="0")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        nested = any(isinstance(item, dict) for item in value.values())
        return ("; " if nested else ", ").join(
            f"{key}{':' if isinstance(item, dict) else ''} {_words(item)}" for key, item in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def _attribute_name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
