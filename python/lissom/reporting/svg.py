# SPDX-License-Identifier: Apache-2.0
"""SVG pieces of the charts; horizontal positions in percent, so that text keeps its size at every width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lissom.reporting.markup import Markup, element


def drawing(
    key: str, height: float, shapes: Sequence[Any], *, title: str, description: str, kind: str = ""
) -> Markup:
    """An accessible SVG as wide as its container.

    Args:
        key: unique id on the page.
        height: pixels.
        shapes: SVG elements.
        title: what a screen reader says first.
        description: the finding in words.
        kind: further CSS class.

    Returns:
        The `<svg>` element.
    """
    names = (element("title", title, id=f"{key}-title"), element("desc", description, id=f"{key}-desc"))
    return element(
        "svg",
        *names,
        *shapes,
        class_=f"chart {kind}".strip(),
        width="100%",
        height=f"{height:g}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def label(
    words: str, x: str | float, y: float, tone: str, *, anchor: str | None = None, dx: float = 0
) -> Markup:
    """Text; `anchor` is start, middle or end; `dx` shifts it by pixels."""
    return element("text", words, x=x, y=f"{y:.1f}", dx=dx or None, text_anchor=anchor, class_=tone)


def box(x: str | float, y: float, size: tuple[str, float], tone: str, hint: str | None = None) -> Markup:
    """A rectangle of (width, height); `hint` shows on hover."""
    tip = element("title", hint) if hint else None
    return element("rect", tip, x=x, y=f"{y:g}", width=size[0], height=f"{size[1]:g}", class_=tone)


def stroke(start: tuple[str | float, float], end: tuple[str | float, float], tone: str) -> Markup:
    """A straight line."""
    return element("line", x1=start[0], y1=f"{start[1]:.1f}", x2=end[0], y2=f"{end[1]:.1f}", class_=tone)


def disc(spot: tuple[str | float, float], radius: float, tone: str, hint: str) -> Markup:
    """A point; `hint` shows on hover."""
    return element("circle", element("title", hint), cx=spot[0], cy=f"{spot[1]:.1f}", r=radius, class_=tone)


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Names with their colours: (name, CSS class)."""
    keys = [element("li", element("span", class_=f"key {tone}"), name) for name, tone in entries]
    return element("ul", keys, class_="legend")


def percent(share: float) -> str:
    """A horizontal position or width.

    Example:
        >>> percent(0.25)
        '25.000%'
    """
    return f"{100 * share:.3f}%"
