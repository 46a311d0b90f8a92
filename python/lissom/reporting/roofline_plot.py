# SPDX-License-Identifier: Apache-2.0
"""The roofline chart: kernels over the machine's measured lines, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lissom.reporting.markup import Markup, element
from lissom.reporting.roofline import Point
from lissom.reporting.svg import disc, drawing, label, legend, stroke
from lissom.reporting.svg import percent as percent_of

_HEIGHT = 340.0
_STEPS = [m * 10.0**e for e in range(-4, 9) for m in (1, 2, 5)]


@dataclass(frozen=True)
class _Axes:
    """Limits of both axes, on 1-2-5 steps around all values."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, intensity: float, speed: float) -> tuple[str, float]:
        """Where a kernel lies: horizontal percentage, vertical pixels."""
        across = math.log(intensity / self.x[0]) / math.log(self.x[1] / self.x[0])
        up = math.log(speed / self.y[0]) / math.log(self.y[1] / self.y[0])
        return percent_of(across), _HEIGHT * (1 - up)

    def line(self, start: tuple[float, float], end: tuple[float, float], tone: str) -> Markup:
        """A straight line between two (intensity, speed)."""
        return stroke(self.at(*start), self.at(*end), tone)


def roofline(
    key: str, points: Sequence[Point], *, gbps: float, gflops: float, title: str, description: str
) -> Markup:
    """Kernels over the memory line and the two arithmetic ceilings.

    Args:
        key: unique id on the page.
        points: timed kernels; kernel "2:4" is drawn as a disc, dense peers as squares.
        gbps: read bandwidth, the slanted line.
        gflops: dense arithmetic ceiling; the 2:4 ceiling is twice as high.
        title: for screen readers.
        description: for screen readers.

    Returns:
        Legend and SVG.
    """
    knees = [gflops / gbps, 2.2 * gflops / gbps]
    axes = _Axes(
        _around([*(p.intensity for p in points), *knees]), _around([*(p.gflops for p in points), 2 * gflops])
    )
    shapes = [
        *_grid(axes),
        *_roof(axes, gbps, gflops),
        *_links(axes, points),
        *_marks(axes, points),
        *_row_labels(axes, points, knees[0], gflops),
        label("operations per byte moved (FLOP/byte)", "50%", _HEIGHT + 38, "axis", anchor="middle"),
        label("GFLOP/s, counted as dense", -8, -12, "axis", dx=-36),
    ]
    names = legend([("2:4, lissom", "packed disc"), ("best dense peer", "peer")])
    return Markup(
        names + drawing(key, _HEIGHT + 46, shapes, title=title, description=description, kind="plot roofline")
    )


def _grid(axes: _Axes) -> list[Markup]:
    shapes = []
    for tick in _ticks(*axes.x):
        shapes += [
            axes.line((tick, axes.y[0]), (tick, axes.y[1]), "grid"),
            label(f"{tick:g}", axes.at(tick, axes.y[0])[0], _HEIGHT + 18, "tick", anchor="middle"),
        ]
    for tick in _ticks(*axes.y):
        shapes += [
            axes.line((axes.x[0], tick), (axes.x[1], tick), "grid"),
            label(f"{tick:g}", -8, axes.at(axes.x[0], tick)[1] + 4, "tick", anchor="end"),
        ]
    return shapes


def _roof(axes: _Axes, gbps: float, gflops: float) -> list[Markup]:
    start, knee, right = max(axes.x[0], axes.y[0] / gbps), gflops / gbps, axes.x[1]
    middle = math.sqrt(start * knee)
    shapes = [
        axes.line((start, start * gbps), (2 * knee, 2 * gflops), "roof"),
        axes.line((knee, gflops), (right, gflops), "roof"),
        axes.line((2 * knee, 2 * gflops), (right, 2 * gflops), "roof dashed"),
    ]
    x, y = axes.at(middle, middle * gbps)
    shapes.append(label(f"memory {gbps:.0f} GB/s", x, y + 22, "note", dx=14))
    # Left of the slanted line no kernel can be: the names of the ceilings end where these begin.
    for at, name in ((knee, "dense arithmetic"), (2 * knee, "2:4 arithmetic")):
        x, y = axes.at(at, at * gbps)
        shapes.append(label(f"{name} {at * gbps:.0f} GFLOP/s", x, y + 4, "note", anchor="end", dx=-12))
    return shapes


def _links(axes: _Axes, points: Sequence[Point]) -> list[Markup]:
    """A thin line from each dense peer to the 2:4 kernel on the same problem."""
    peers = {p.label: p for p in points if p.kernel != "2:4"}
    pairs = [(peers[p.label], p) for p in points if p.kernel == "2:4" and p.label in peers]
    return [axes.line((a.intensity, a.gflops), (b.intensity, b.gflops), "faint") for a, b in pairs]


def _marks(axes: _Axes, points: Sequence[Point]) -> list[Markup]:
    shapes = []
    for point in sorted(points, key=lambda p: p.kernel == "2:4"):
        spot = axes.at(point.intensity, point.gflops)
        hint = f"{point.kernel}, {point.label}: {point.gflops:.0f} GFLOP/s, {point.share:.0%} of the roof"
        if point.kernel == "2:4":
            shapes.append(disc(spot, 5, "packed ringed", hint))
        else:
            place = {"x": spot[0], "y": f"{spot[1] - 4:.1f}", "width": 8, "height": 8}
            tip = element("title", hint)
            shapes.append(element("rect", tip, **place, class_="peer ringed", transform="translate(-4 0)"))
    return shapes


def _row_labels(axes: _Axes, points: Sequence[Point], knee: float, top: float) -> list[Markup]:
    labels = []
    ours = [p for p in points if p.kernel == "2:4"]
    for rows in sorted({p.rows for p in ours}):
        best = max((p for p in ours if p.rows == rows), key=lambda p: p.gflops)
        x, y = axes.at(best.intensity, best.gflops)
        ceiling = axes.at(best.intensity, 2 * top)[1]
        if best.intensity < knee:  # up and to the left of the memory line there is room
            labels.append(label(f"M={rows}", x, y - 4, "value", anchor="end", dx=-11))
        else:
            labels.append(
                label(f"M={rows}", x, y + (18 if y - ceiling < 26 else -10), "value", anchor="middle")
            )
    return labels


def _around(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values) * 0.8, max(values) * 1.25
    return max(s for s in _STEPS if s <= low), min(s for s in _STEPS if s >= high)


def _ticks(low: float, high: float) -> list[float]:
    wide = high / low > 500
    decades = [10.0**e for e in range(-4, 9)]
    return [t for t in (decades if wide else _STEPS) if low <= t <= high * 1.001]
