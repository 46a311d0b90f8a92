# SPDX-License-Identifier: Apache-2.0
"""Bars, stacked bars, products of factors, and error over depth, as inline SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lissom.reporting.markup import Markup
from lissom.reporting.svg import box, disc, drawing, label, legend, percent, stroke

_ROW = 50
_PANEL = 96.0
_FACTOR_TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: `tone` is a CSS class that names the colour."""

    label: str
    value: float
    text: str
    tone: str


@dataclass(frozen=True)
class Stack:
    """One row of a stacked bar chart: segments are (name, value, tone)."""

    label: str
    segments: Sequence[tuple[str, float, str]]
    text: str


@dataclass(frozen=True)
class Gain:
    """A speed-up: what the dense peer wastes times what sparsity gives; `limit` bounds the latter."""

    label: str
    weakness: float
    sparsity: float
    limit: float | None = None


def bars(key: str, rows: Sequence[Bar], *, title: str, description: str) -> Markup:
    """Horizontal bars from zero, one line of text above each."""
    top = max(row.value for row in rows)
    shapes: list[Markup] = []
    for index, row in enumerate(rows):
        y = _ROW * index
        shapes += _heading(row.label, row.text, y)
        shapes += [
            box(0, y + 22, ("100%", 12), "track"),
            box(0, y + 22, (percent(row.value / top), 12), row.tone),
        ]
    return drawing(key, _ROW * len(rows) - 12, shapes, title=title, description=description)


def stacks(key: str, rows: Sequence[Stack], *, title: str, description: str) -> Markup:
    """Stacked horizontal bars on one scale, with their legend."""
    top = max(sum(value for _, value, _ in row.segments) for row in rows)
    shapes: list[Markup] = []
    for index, row in enumerate(rows):
        y, left = _ROW * index, 0.0
        shapes += [*_heading(row.label, row.text, y), box(0, y + 22, ("100%", 14), "track")]
        for name, value, tone in row.segments:
            hint = f"{name}: {value / top:.0%} of the longest"
            shapes.append(
                box(percent(left / top), y + 22, (percent(value / top), 14), f"{tone} segment", hint)
            )
            left += value
    names = legend([(name, tone) for name, _, tone in rows[0].segments])
    return Markup(names + drawing(key, _ROW * len(rows) - 10, shapes, title=title, description=description))


def factors(key: str, rows: Sequence[Gain], *, title: str, description: str) -> Markup:
    """Speed-ups as products on a log scale: a factor has the same length wherever it begins."""
    pitch, foot = 56, 56 * len(rows) - 6
    top = max([2.0, *(row.weakness * max(row.sparsity, row.limit or 0, 1.0) for row in rows)]) * 1.04
    shapes: list[Markup] = []
    for tick in (t for t in _FACTOR_TICKS if t <= top):
        x = percent(math.log(tick) / math.log(top))
        shapes += [
            stroke((x, 20), (x, foot), "grid"),
            label(f"{tick:g}×", x, foot + 16, "tick", anchor="start" if tick == 1 else "middle"),
        ]
    for index, row in enumerate(rows):
        shapes += _factor_row(row, pitch * index, math.log(top))
    entries = [("dense peer's weakness", "peer"), ("what 2:4 gives", "packed")]
    if any(row.sparsity < 1 for row in rows):
        entries.append(("what 2:4 loses", "loss"))
    if any(row.limit for row in rows):
        entries.append(("limit by bytes read", "limit-key"))
    return Markup(legend(entries) + drawing(key, foot + 22, shapes, title=title, description=description))


def _factor_row(row: Gain, y: int, span: float) -> list[Markup]:
    total = row.weakness * row.sparsity
    split, end = math.log(row.weakness) / span, max(math.log(total) / span, 0.0)
    left, right = sorted((split, end))
    tone = "packed" if row.sparsity >= 1 else "loss"
    shapes = [
        *_heading(row.label, f"{total:.2f}× = {row.weakness:.2f} × {row.sparsity:.2f}", y),
        box(0, y + 24, (percent(split), 16), "peer segment", f"peer weakness {row.weakness:.2f}×"),
        box(
            percent(left), y + 24, (percent(right - left), 16), f"{tone} segment", f"2:4 {row.sparsity:.2f}×"
        ),
    ]
    if row.limit:
        x = percent(math.log(row.weakness * row.limit) / span)
        shapes.append(stroke((x, y + 20), (x, y + 44), "limit"))
    return shapes


def depth_panel(
    key: str,
    kind: str,
    series: dict[str, list[tuple[int, float]]],
    *,
    scale: tuple[int, float],
) -> Markup:
    """Relative error over depth for one kind of linear, the other kinds faint behind it.

    Args:
        key: unique id on the page.
        kind: the kind to show, such as "q_proj".
        series: (block, error) of each kind, in order of depth.
        scale: (last block, largest error) shared by all panels.

    Returns:
        The panel's SVG.
    """
    last, top = scale
    mine = series[kind]

    def path(points: list[tuple[int, float]], tone: str) -> list[Markup]:
        spots = [_place(point, scale) for point in points]
        return [stroke(a, b, tone) for a, b in itertools.pairwise(spots)]

    shapes: list[Any] = []
    for share in (0.0, 0.5, 1.0):
        y = _PANEL * (1 - share)
        shapes += [
            stroke((0, y), ("100%", y), "grid"),
            label(f"{top * share:.2f}", -6, y + 4, "tick", anchor="end"),
        ]
    shapes += [path(points, "faint") for name, points in series.items() if name != kind]
    shapes += path(mine, "packed-line")
    shapes += [disc(_place(p, scale), 2.5, "packed", f"{kind}, block {p[0]}: {p[1]:.4f}") for p in mine]
    shapes += [
        label("0", 0, _PANEL + 16, "tick"),
        label(str(last), "100%", _PANEL + 16, "tick", anchor="end"),
    ]
    worst = max(mine, key=lambda p: p[1])
    mean = sum(error for _, error in mine) / len(mine)
    told = f"{len(mine)} layers, mean {mean:.4f}, largest {worst[1]:.4f} in block {worst[0]}."
    title = f"Relative error of {kind} by block"
    return drawing(key, _PANEL + 22, shapes, title=title, description=told, kind="plot")


def _place(point: tuple[int, float], scale: tuple[int, float]) -> tuple[str, float]:
    return percent(point[0] / max(scale[0], 1)), _PANEL * (1 - point[1] / scale[1])


def _heading(name: str, value: str, y: int) -> list[Markup]:
    return [label(name, 0, y + 14, "name"), label(value, "100%", y + 14, "value", anchor="end")]
