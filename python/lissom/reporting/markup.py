# SPDX-License-Identifier: Apache-2.0
"""HTML and SVG elements whose text is escaped unless it is an element itself."""

from __future__ import annotations

import html
from typing import Any


class Markup(str):
    """Text that is markup already; every other string is escaped when it becomes a child."""


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
        name: tag name.
        children: elements, text (escaped), numbers, lists of these; None is left out.
        attributes: values are escaped; None is left out; `class_` is `class`, other underscores become hyphens.

    Returns:
        The markup.

    Example:
        >>> element("p", "a < b", class_="note")
        '<p class="note">a &lt; b</p>'
    """
    shown = "".join(f' {_attribute_name(key)}="{html.escape(str(value))}"'
                    for key, value in attributes.items() if value is not None)
    if name in ("meta", "br", "col", "line", "rect", "circle") and not children:
        return Markup(f"<{name}{shown}/>" if name in ("line", "rect", "circle") else f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: Any) -> Markup:
    """Children one after the other, escaped where they are text."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, (list, tuple)):
            parts.append(join(*child))
        else:
            parts.append(child if isinstance(child, Markup) else html.escape(str(child)))
    return Markup("".join(parts))


def _attribute_name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
