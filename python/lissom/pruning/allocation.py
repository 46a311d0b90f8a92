# SPDX-License-Identifier: Apache-2.0
"""Chooses a pattern for each layer: least loss under a budget, or OWL's shares by outliers."""

from __future__ import annotations

import heapq
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch

from .costs import option_text
from .pattern import Pattern
from .selection import DENSE, PatternMap
from .solver import prune_weight, relative_error

_SLACK = 1e-9  # share of a budget by which a sum of costs may pass it: rounding of the sum


@dataclass(frozen=True)
class LossCurve:
    """What one layer loses by each pattern, in a unit that adds up over layers.

    Attributes:
        name: of the layer.
        losses: measured loss by pattern text, such as {"30%": 0.01, "50%": 0.04, "2:4": 0.07}; dense is 0.

    Example:
        >>> curve = LossCurve("up", {"40%": 0.02, "60%": 0.10, "2:4": 0.09})
        >>> round(curve.loss("50%"), 6), curve.loss("2:4"), curve.loss("dense")
        (0.06, 0.09, 0.0)
    """

    name: str
    losses: Mapping[str, float]

    def __post_init__(self) -> None:
        for option, loss in self.losses.items():
            if not (math.isfinite(loss) and loss >= 0):
                raise ValueError(
                    f"{self.name}: the loss of {option!r} must be finite and not negative, got {loss!r}"
                )
        object.__setattr__(
            self, "losses", {option_text(option): loss for option, loss in self.losses.items()}
        )

    def loss(self, option: str) -> float:
        """The loss of an option: as measured, or between measured shares along their lower convex hull.

        Args:
            option: "dense" or the text of a pattern.

        Returns:
            The loss.

        Raises:
            ValueError: a pattern that was not measured and that no measured shares enclose.
        """
        option = option_text(option)
        if option in self.losses:
            return self.losses[option]
        if option == DENSE:
            return 0.0
        pattern = Pattern.parse(option)
        hull = self._hull() if pattern.group is None else []
        for (low, below), (high, above) in pairwise(hull):
            if low <= pattern.sparsity <= high:
                return below + (above - below) * float((pattern.sparsity - low) / (high - low))
        raise ValueError(
            f"{self.name}: the loss of {option!r} was not measured and cannot be interpolated between shares; "
            f"measured are {', '.join(self.losses) or 'none'}"
        )

    def scaled(self, factor: float) -> LossCurve:
        """The curve with every loss multiplied by a factor.

        Args:
            factor: not negative.

        Returns:
            Another curve.
        """
        return LossCurve(self.name, {option: factor * loss for option, loss in self.losses.items()})

    def _hull(self) -> list[tuple[Fraction, float]]:
        patterns = {Pattern.parse(option): loss for option, loss in self.losses.items() if option != DENSE}
        shares = {pattern.sparsity: loss for pattern, loss in patterns.items() if pattern.group is None}
        points = sorted(({Fraction(0): 0.0} | shares).items())
        return [points[corner] for corner in _lower_hull([(float(x), y) for x, y in points])]


@dataclass(frozen=True)
class Budget:
    """How much all layers together may cost.

    Attributes:
        limit: in the unit of the costs (bytes, seconds, weights), or a share of what the dense layers cost.
        share: whether `limit` is such a share.

    Raises:
        ValueError: not positive.
    """

    limit: float
    share: bool = False

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"a budget must be positive, got {self.limit!r}")


def allocate(
    curves: Sequence[LossCurve], costs: Mapping[str, Mapping[str, float]], budget: Budget
) -> PatternMap:
    """Give each layer the option that makes the sum of losses least within a budget.

    Args:
        curves: one for each layer.
        costs: cost of each option of each layer, by name and pattern text (or "dense"), as `price` makes it.
        budget: what all layers together may cost.

    Returns:
        The pattern of each layer by name; None for those that stay dense. `predict` gives its loss and cost.

    Raises:
        ValueError: a layer twice or without costs, a loss that is not known, or a budget below the least cost.

    Example:
        >>> curves = [LossCurve("a", {"2:4": 0.3}), LossCurve("b", {"2:4": 0.1})]
        >>> prices = {"dense": 16.0, "2:4": 9.0}
        >>> allocate(curves, {"a": prices, "b": prices}, Budget(0.8, share=True)).to_dict()
        {'a': 'dense', 'b': '2:4'}
    """
    names = [curve.name for curve in curves]
    if len(set(names)) < len(names) or not all(costs.get(name) for name in names):
        wrong = next(name for name in names if names.count(name) > 1 or not costs.get(name))
        raise ValueError(f"layer {wrong!r} needs exactly one curve, and the cost of each of its options")
    limit = budget.limit
    if budget.share:
        if any(DENSE not in costs[name] for name in names):
            raise ValueError(
                "a budget that is a share of the dense cost needs the cost of 'dense' for each layer"
            )
        limit *= sum(costs[name][DENSE] for name in names)
    options = [list(costs[name]) for name in names]
    losses = [[curve.loss(option) for option in known] for curve, known in zip(curves, options)]
    prices = [[costs[name][option] for option in known] for name, known in zip(names, options)]
    chosen = choose(losses, prices, limit).options
    return PatternMap({name: known[index] for name, known, index in zip(names, options, chosen)})


def predict(
    patterns: Mapping[str, Pattern | None],
    curves: Iterable[LossCurve],
    costs: Mapping[str, Mapping[str, float]],
) -> tuple[float, float]:
    """Sums of the losses and of the costs that an allocation is expected to have.

    Args:
        patterns: of each layer by name, as `allocate` returns them.
        curves: one for each layer.
        costs: as for `allocate`.

    Returns:
        Loss and cost.
    """
    loss = cost = 0.0
    for curve in curves:
        chosen = patterns[curve.name]
        option = DENSE if chosen is None else str(chosen)
        loss += curve.loss(option)
        cost += {option_text(known): price for known, price in costs[curve.name].items()}[option]
    return loss, cost


class Choice(NamedTuple):
    """An option for each layer, the sums, and the loss that no choice within the budget can be below."""

    options: list[int]
    loss: float
    cost: float
    bound: float


def choose(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float) -> Choice:
    """Solve the multiple-choice knapsack: one option for each layer, least sum of losses, costs within a limit.

    Every layer starts at its cheapest option and moves along the lower convex hull of its (cost, loss) points;
    moves are bought in the order of loss saved per cost, which is the Lagrangian optimum as long as all fit.
    The first that does not fit gives the bound of the linear relaxation. Then one layer or two at a time are
    changed, to options on the hull or not, as long as that saves loss and fits. So the result is within one
    move of the optimum, and what no exchange of two layers improves; whether it is the optimum is not proved.

    Args:
        losses: of each option of each layer.
        costs: likewise.
        limit: of the sum of costs.

    Returns:
        The choice. Among equals the earlier layer moves first.

    Raises:
        ValueError: the cheapest options cost more than the limit.

    Source: Sinha and Zoltners, Operations Research 27(3), 1979 (greedy on the hull).
    """
    if not all(math.isfinite(cost) for layer in costs for cost in layer):
        raise ValueError("costs must be finite numbers; some are infinite or NaN")
    hulls = [_hull_options(*layer) for layer in zip(costs, losses)]
    picked = [hull[0] for hull in hulls]
    spent = _total(costs, picked)
    room = limit + _SLACK * abs(limit)
    if spent > room:
        raise ValueError(
            f"a budget of {limit:.6g} is below {spent:.6g}, the least that the layers can cost with these "
            "options; raise it, or offer cheaper patterns"
        )
    waiting: list[tuple[float, int, int]] = []  # (-saved per cost, layer, where on its hull it stands)

    def wait(layer: int, step: int) -> None:
        if step + 1 < len(hulls[layer]):
            low, high = hulls[layer][step : step + 2]
            saved = losses[layer][low] - losses[layer][high]
            heapq.heappush(waiting, (-saved / (costs[layer][high] - costs[layer][low]), layer, step))

    for layer in range(len(hulls)):
        wait(layer, 0)
    bound = None
    while waiting and bound is None:
        rate, layer, step = heapq.heappop(waiting)
        low, high = hulls[layer][step : step + 2]
        price = costs[layer][high] - costs[layer][low]
        if spent + price > room:
            bound = _total(losses, picked) + rate * (room - spent)
        else:
            picked[layer] = high
            spent += price
            wait(layer, step + 1)
    if bound is None:
        bound = _total(losses, picked)
    _improve(picked, losses, costs, room)
    return Choice(picked, _total(losses, picked), _total(costs, picked), bound)


def _total(values: Sequence[Sequence[float]], picked: Sequence[int]) -> float:
    return math.fsum(layer[option] for layer, option in zip(values, picked))


class _Change(NamedTuple):
    """Another option for one layer: what it costs more, what loss it saves; either may be negative."""

    price: float
    saved: float
    layer: int
    option: int


def _improve(
    picked: list[int], losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], room: float
) -> None:
    """Change one layer or two at a time, in place, by what saves most loss and fits, until nothing does."""
    least = _SLACK * _total(losses, picked)  # smaller gains may be rounding, and could go round in circles
    while True:
        left = room - _total(costs, picked)
        changes = [_Change(0.0, 0.0, -1, -1)]  # none: the other change of a pair then stands alone
        for layer, now in enumerate(picked):
            for option, cost in enumerate(costs[layer]):
                if option != now:
                    saved = losses[layer][now] - losses[layer][option]
                    changes.append(_Change(cost - costs[layer][now], saved, layer, option))
        pair = _best_pair(sorted(changes), left)
        if pair is None or pair[0].saved + pair[1].saved <= least:
            return
        for change in pair:
            if change.layer >= 0:
                picked[change.layer] = change.option


def _best_pair(changes: Sequence[_Change], left: float) -> tuple[_Change, _Change] | None:
    """The two changes of different layers, sorted by price, that save most for no more than `left`."""
    # Of the cheapest 1, 2, 3, ... changes: the one that saves most, and the one that does in another layer.
    leaders: list[tuple[_Change, _Change | None]] = []
    for change in changes:
        first, second = leaders[-1] if leaders else (change, None)
        if change.layer == first.layer:
            first = max(first, change, key=_saved)
        elif change.saved > first.saved:
            first, second = change, first
        elif second is None or change.saved > second.saved:
            second = change
        leaders.append((first, second))
    prices = [change.price for change in changes]
    best = None
    for change in changes:
        affordable = bisect_right(prices, left - change.price)
        first, second = leaders[affordable - 1] if affordable else (change, None)
        other = second if first.layer == change.layer else first
        if other is not None and (best is None or change.saved + other.saved > best[0].saved + best[1].saved):
            best = (change, other)
    return best


def _saved(change: _Change) -> float:
    return change.saved


def _hull_options(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Options on the lower convex hull, by rising cost and falling loss, from the cheapest to the least loss."""
    order = sorted(range(len(costs)), key=lambda option: (costs[option], losses[option], option))
    falling: list[int] = []
    for option in order:
        if not falling or losses[option] < losses[falling[-1]]:
            falling.append(option)
    return [
        falling[corner] for corner in _lower_hull([(costs[option], losses[option]) for option in falling])
    ]


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the corners of the lower convex hull of points whose abscissae rise."""
    corners: list[int] = []
    for index, (x, y) in enumerate(points):
        while len(corners) > 1:
            (x0, y0), (x1, y1) = points[corners[-2]], points[corners[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            corners.pop()
        corners.append(index)
    return corners


def measure_curve(
    name: str,
    weight: torch.Tensor,
    gram: torch.Tensor,
    options: Iterable[str],
    *,
    method: str = "wanda",
    damp: float = 0.01,
) -> LossCurve:
    """Measure the loss curve of a layer by pruning a copy of its weight to each option.

    Args:
        name: of the layer.
        weight: [R, C] floating.
        gram: H = X X^T [C, C] of the layer's inputs.
        options: pattern texts; about ten shares give a smooth curve. "dense" is passed over.
        method, damp: as for `prune_weight`; "wanda" costs next to nothing and ranks layers like the others.

    Returns:
        The relative errors ||W' X - W X||^2 / ||W X||^2 by pattern.
    """
    losses = {}
    for option in options:
        if option != DENSE:
            pruned = prune_weight(weight, gram, pattern=option, method=method, damp=damp)
            losses[option] = relative_error(weight, pruned, gram)
    return LossCurve(name, losses)


def outlier_ratio(scores: Iterable[torch.Tensor], *, threshold: float = 5.0) -> float:
    """Share of a block's scores that exceed `threshold` times their mean: OWL's outlier ratio.

    Args:
        scores: |w_rj| ||X_j||_2 of every linear layer of the block, of any shapes.
        threshold: M of the paper, which takes 5 or 7 for LLaMA.

    Returns:
        The share, in [0, 1].

    Raises:
        ValueError: no score.

    Source: Yin et al., arXiv 2310.05175, section 3.

    Example:
        >>> outlier_ratio([torch.ones(9), torch.tensor([100.0])])
        0.1
    """
    layers = list(scores)
    total = sum(layer.numel() for layer in layers)
    if not total:
        raise ValueError("the outlier ratio of a block needs the scores of at least one weight, got none")
    mean = sum(layer.sum(dtype=torch.float64).item() for layer in layers) / total
    return sum(int((layer > threshold * mean).sum()) for layer in layers) / total


def owl(
    ratios: Mapping[str, float],
    sparsity: float,
    *,
    bound: float = 0.08,
    weights: Mapping[str, int] | None = None,
) -> PatternMap:
    """Outlier-weighed layer-wise sparsity: blocks with more outliers keep more, the mean stays.

    A block's share is `sparsity` minus a multiple of how far its outlier ratio is above the mean; the multiple
    is as large as lets every share stay within `bound` of `sparsity`. (The authors' program spreads the shares
    over 2 lambda around the mean instead, so that one block may lie further than lambda from it.)

    Args:
        ratios: `outlier_ratio` of each block, by the block's name.
        sparsity: mean share to prune.
        bound: lambda of the paper.
        weights: prunable weights of each block; the mean is taken over weights. None: blocks of equal size.

    Returns:
        An unstructured pattern for each block, exact to a millionth: the map's keys mean all layers of a block.

    Raises:
        ValueError: no block, or `sparsity` +- `bound` leaves [0, 1).

    Source: Yin et al., arXiv 2310.05175.

    Example:
        >>> owl({"h.0": 0.03, "h.1": 0.01}, 0.7).of("h.0.mlp.up_proj").sparsity
        Fraction(31, 50)
    """
    if not ratios:
        raise ValueError("owl needs the outlier ratio of at least one block, got none")
    if not (bound >= 0 and sparsity - bound >= 0 and sparsity + bound < 1):
        raise ValueError(
            f"owl moves shares by up to {bound!r} around {sparsity!r}, and each must be at least 0 and below 1; "
            "choose a smaller bound"
        )
    sizes = {name: 1 if weights is None else weights[name] for name in ratios}
    mean = math.fsum(ratios[name] * size for name, size in sizes.items()) / sum(sizes.values())
    most, fewest = max(ratios.values()), min(ratios.values())
    # Blocks that are alike but for rounding are alike: their differences must not be blown up to the bound.
    scale = bound / max(most - mean, mean - fewest) if most - fewest > 1e-9 * most + 1e-12 else 0.0
    shares = {name: sparsity - (ratio - mean) * scale for name, ratio in ratios.items()}
    return PatternMap(
        {
            f"re:{re.escape(name)}\\..*": Pattern(Fraction(round(share * 10**6), 10**6))
            for name, share in shares.items()
        }
    )
