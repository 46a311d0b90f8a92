# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: horizontal positions in percent, so that text keeps its size at every page width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lissom.reporting.markup import Markup, element
from lissom.reporting.roofline import Point


_Place = Callable[[float, float], tuple[str, float]]


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


def drawing(key: str, height: float, *children: object, title: str, description: str, kind: str = "") -> Markup:
    """An accessible SVG as wide as its container.

    Args:
        key: unique id on the page.
        height: pixels.
        children: SVG elements.
        title: what a screen reader says first.
        description: the finding in words.
        kind: further CSS class.

    Returns:
        The `<svg>` element.
    """
    return element("svg", element("title", title, id=f"{key}-title"), element("desc", description, id=f"{key}-desc"),
                   *children, class_=f"chart {kind}".strip(), width="100%", height=f"{height:g}", role="img",
                   aria_labelledby=f"{key}-title {key}-desc")


def bars(key: str, rows: Sequence[Bar], *, title: str, description: str) -> Markup:
    """Horizontal bars from zero, one line of text above each."""
    top = max(row.value for row in rows)
    shapes = []
    for index, row in enumerate(rows):
        y = 50 * index
        width = _percent(row.value / top)
        shapes += [
            element("text", row.label, x=0, y=y + 14, class_="name"),
            element("text", row.text, x="100%", y=y + 14, text_anchor="end", class_="value"),
            element("rect", x=0, y=y + 22, width="100%", height=12, rx=2, class_="track"),
            element("rect", x=0, y=y + 22, width=width, height=12, rx=2, class_=row.tone),
        ]
    return drawing(key, 50 * len(rows) - 12, *shapes, title=title, description=description)


def stacks(key: str, rows: Sequence[Stack], *, title: str, description: str) -> Markup:
    """Stacked horizontal bars on one scale, with their legend."""
    top = max(sum(value for _, value, _ in row.segments) for row in rows)
    shapes = []
    for index, row in enumerate(rows):
        y, left = 50 * index, 0.0
        shapes += [element("text", row.label, x=0, y=y + 14, class_="name"),
                   element("text", row.text, x="100%", y=y + 14, text_anchor="end", class_="value"),
                   element("rect", x=0, y=y + 22, width="100%", height=14, class_="track")]
        for name, value, tone in row.segments:
            shapes.append(element("rect", element("title", f"{name}: {value / top:.0%} of the longest"),
                                  x=_percent(left / top), y=y + 22, width=_percent(value / top), height=14,
                                  class_=f"{tone} segment"))
            left += value
    legend = [(name, tone) for name, _, tone in rows[0].segments]
    return Markup(_legend(legend) + drawing(key, 50 * len(rows) - 10, *shapes, title=title, description=description))


def factors(key: str, rows: Sequence[tuple[str, float, float, float | None]], *, title: str, description: str) -> Markup:
    """Speed-up as a product, on a logarithmic scale: rows are (label, peer weakness, sparsity, limit by bytes)."""
    top = max(2.0, *(weak * max(sparse, 1.0) for _, weak, sparse, _ in rows),
              *(weak * limit for _, weak, _, limit in rows if limit))
    span = math.log(top * 1.04)
    shapes: list[Markup] = []
    foot = 56 * len(rows) - 6
    for tick in [t for t in (1, 1.5, 2, 3, 4, 6, 8, 12, 16) if t <= top * 1.04]:
        x = _percent(math.log(tick) / span)
        shapes += [element("line", x1=x, x2=x, y1=20, y2=foot, class_="grid"),
                   element("text", f"{tick:g}×", x=x, y=foot + 16, class_="tick",
                           text_anchor="start" if tick == 1 else "middle")]
    for index, (label, weak, sparse, limit) in enumerate(rows):
        y = 56 * index
        split, end = math.log(weak) / span, math.log(max(weak * sparse, 1e-9)) / span
        shapes += [element("text", label, x=0, y=y + 14, class_="name"),
                   element("text", f"{weak * sparse:.2f}× = {weak:.2f} × {sparse:.2f}", x="100%", y=y + 14,
                           text_anchor="end", class_="value"),
                   element("rect", element("title", f"peer weakness {weak:.2f}×"), x=0, y=y + 24, width=_percent(split),
                           height=16, class_="peer segment")]
        left, right = sorted((split, max(end, 0.0)))
        shapes.append(element("rect", element("title", f"sparsity {sparse:.2f}×"), x=_percent(left), y=y + 24,
                              width=_percent(right - left), height=16,
                              class_=f"{'packed' if sparse >= 1 else 'loss'} segment"))
        if limit:
            x = _percent(math.log(weak * limit) / span)
            shapes.append(element("line", x1=x, x2=x, y1=y + 20, y2=y + 44, class_="limit"))
    legend = [("dense peer's weakness", "peer"), ("what 2:4 gives", "packed")]
    if any(sparse < 1 for _, _, sparse, _ in rows):
        legend.append(("what 2:4 loses", "loss"))
    if any(limit for *_, limit in rows):
        legend.append(("limit by bytes read", "limit-key"))
    return Markup(_legend(legend) + drawing(key, foot + 22, *shapes, title=title, description=description))


def depth_panel(key: str, kind: str, mine: Sequence[tuple[int, float]], others: Sequence[Sequence[tuple[int, float]]],
                *, scale: tuple[int, float]) -> Markup:
    """Relative error over depth for one kind of linear, the other kinds faint behind it.

    Args:
        key: unique id on the page.
        kind: its name, such as "q_proj".
        mine: (block, error).
        others: the other kinds' points.
        scale: (last block, largest error) shared by all panels.

    Returns:
        The panel's SVG.
    """
    last, top = scale
    height = 96.0

    def place(point: tuple[int, float]) -> tuple[str, float]:
        return _percent(point[0] / max(last, 1)), height - height * point[1] / top

    def path(points: Sequence[tuple[int, float]], tone: str) -> list[Markup]:
        spots = [place(p) for p in points]
        return [element("line", x1=a[0], y1=f"{a[1]:.1f}", x2=b[0], y2=f"{b[1]:.1f}", class_=tone)
                for a, b in zip(spots, spots[1:], strict=False)]

    shapes: list[object] = []
    for share in (0.0, 0.5, 1.0):
        y = height - height * share
        shapes += [element("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"),
                   element("text", f"{top * share:.2f}", x=-6, y=y + 4, text_anchor="end", class_="tick")]
    shapes += [path(points, "faint") for points in others]
    shapes += path(mine, "packed-line")
    for block, error in mine:
        x, y = place((block, error))
        shapes.append(element("circle", element("title", f"{kind}, block {block}: {error:.4f}"), cx=x, cy=f"{y:.1f}",
                              r=2.5, class_="packed"))
    shapes += [element("text", "0", x=0, y=height + 16, class_="tick"),
               element("text", str(last), x="100%", y=height + 16, text_anchor="end", class_="tick")]
    worst = max(mine, key=lambda p: p[1])
    return drawing(key, height + 22, *shapes, kind="plot",
                   title=f"Relative error of {kind} by block",
                   description=f"{len(mine)} layers, mean {sum(e for _, e in mine) / len(mine):.4f}, "
                               f"largest {worst[1]:.4f} in block {worst[0]}.")


def roofline(key: str, points: Sequence[Point], *, gbps: float, gflops: float, title: str, description: str) -> Markup:
    """Kernels over the machine's measured lines, both axes logarithmic.

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
    height = 340.0
    low_x, high_x = _decades([p.intensity for p in points] + [gflops / gbps, 2.2 * gflops / gbps])
    low_y, high_y = _decades([p.gflops for p in points] + [2 * gflops])

    def at(intensity: float, speed: float) -> tuple[str, float]:
        return (_percent(math.log(intensity / low_x) / math.log(high_x / low_x)),
                height - height * math.log(speed / low_y) / math.log(high_y / low_y))

    def line(start: tuple[float, float], end: tuple[float, float], tone: str) -> Markup:
        (x1, y1), (x2, y2) = at(*start), at(*end)
        return element("line", x1=x1, y1=f"{y1:.1f}", x2=x2, y2=f"{y2:.1f}", class_=tone)

    shapes: list[object] = []
    for tick in _ticks(low_x, high_x):
        shapes += [line((tick, low_y), (tick, high_y), "grid"),
                   element("text", f"{tick:g}", x=at(tick, low_y)[0], y=height + 18, text_anchor="middle", class_="tick")]
    for tick in _ticks(low_y, high_y):
        shapes += [line((low_x, tick), (high_x, tick), "grid"),
                   element("text", f"{tick:g}", x=-8, y=f"{at(low_x, tick)[1] + 4:.1f}", text_anchor="end", class_="tick")]
    start = max(low_x, low_y / gbps)
    ridge = 2 * gflops / gbps
    shapes += [line((start, start * gbps), (ridge, 2 * gflops), "roof"),
               line((gflops / gbps, gflops), (high_x, gflops), "roof"),
               line((ridge, 2 * gflops), (high_x, 2 * gflops), "roof dashed")]
    for value, label, shift in ((gflops, "dense arithmetic", 15), (2 * gflops, "2:4 arithmetic", -6)):
        shapes.append(element("text", f"{label} {value:.0f} GFLOP/s", x="100%", y=f"{at(high_x, value)[1] + shift:.1f}",
                              text_anchor="end", class_="note"))
    x, y = at(gflops / gbps, gflops)  # left of the slanted line no kernel can be
    shapes.append(element("text", f"memory {gbps:.0f} GB/s", x=x, y=f"{y + 4:.1f}", text_anchor="end", class_="note", dx=-12))
    shapes += _pair_lines(points, at)
    for point in sorted(points, key=lambda p: p.kernel == "2:4"):
        x, y = at(point.intensity, point.gflops)
        hint = element("title", f"{point.kernel}, {point.label}: {point.gflops:.0f} GFLOP/s, {point.share:.0%} of the roof")
        if point.kernel == "2:4":
            shapes.append(element("circle", hint, cx=x, cy=f"{y:.1f}", r=5, class_="packed ringed"))
        else:
            shapes.append(element("rect", hint, x=x, y=f"{y - 4:.1f}", width=8, height=8, class_="peer ringed",
                                  transform="translate(-4 0)"))
    shapes += _row_labels(points, at, gflops / gbps)
    shapes += [element("text", "operations per byte moved (FLOP/byte)", x="50%", y=height + 38, text_anchor="middle",
                       class_="axis"),
               element("text", "GFLOP/s, counted as dense", x=-8, y=-12, class_="axis", dx=-36)]
    legend = [("2:4, lissom", "packed disc"), ("best dense peer", "peer")]
    return Markup(_legend(legend) + drawing(key, height + 46, *shapes, title=title, description=description,
                                            kind="plot roofline"))


def _pair_lines(points: Sequence[Point], at: _Place) -> list[Markup]:
    """A thin line from each dense peer to the 2:4 kernel on the same problem."""
    ours = {p.label: at(p.intensity, p.gflops) for p in points if p.kernel == "2:4"}
    peers = {p.label: at(p.intensity, p.gflops) for p in points if p.kernel != "2:4"}
    return [element("line", x1=peers[label][0], y1=f"{peers[label][1]:.1f}", x2=x, y2=f"{y:.1f}", class_="faint")
            for label, (x, y) in ours.items() if label in peers]


def _row_labels(points: Sequence[Point], at: _Place, ridge: float) -> list[Markup]:
    labels = []
    for rows in sorted({p.rows for p in points}):
        best = max((p for p in points if p.rows == rows and p.kernel == "2:4"), key=lambda p: p.gflops, default=None)
        if best:
            x, y = at(best.intensity, best.gflops)
            beside = best.intensity < ridge  # up and to the left of the memory line there is room
            labels.append(element("text", f"M={rows}", x=x, y=f"{y - (4 if beside else 10):.1f}", dx=-11 if beside else 0,
                                  text_anchor="end" if beside else "middle", class_="value"))
    return labels


def _legend(entries: Sequence[tuple[str, str]]) -> Markup:
    return element("ul", [element("li", element("span", class_=f"key {tone}"), name) for name, tone in entries],
                   class_="legend")


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits on 1-2-5 steps around all values."""
    low, high = min(values) * 0.8, max(values) * 1.25
    steps = [m * 10.0**e for e in range(-4, 9) for m in (1, 2, 5)]
    return max(s for s in steps if s <= low), min(s for s in steps if s >= high)


def _ticks(low: float, high: float) -> list[float]:
    wide = high / low > 500
    return [m * 10.0**e for e in range(-4, 9) for m in ((1,) if wide else (1, 2, 5)) if low <= m * 10.0**e <= high * 1.001]
