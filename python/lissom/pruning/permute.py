# SPDX-License-Identifier: Apache-2.0
"""Finds the order of a model's channels in which an n:m pattern keeps most."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

import torch

from ..models.channels import Channels
from ..models.walk import LinearRef, ModelMap
from ..ops.pruning import pruning_permute
from .pattern import Pattern

ROUNDS = 100  # searches end by themselves after about 30
WINDOW = 2048  # columns searched together: 4096 in two halves keep 1 % less of what can be won
_WORK = 1 << 37  # rows * columns * columns searched together: more rows are sampled down to it
_LEVEL = 8  # of the mean pruned score: below it rounding shows, and a score over 255 / 8 times the mean is kept anyway


def find_order(scores: torch.Tensor, pattern: str | Pattern) -> torch.Tensor:
    """An order of the columns in which an n:m pattern keeps the greatest sum of scores, by local search.

    Args:
        scores: [R, C] floating, finite, not negative: what pruning each weight costs, such as
            (w_rj ||X_j||)^2. C must be a multiple of m.
        pattern: an n:m pattern.

    Returns:
        int64 [C], such that weight[:, order] is to be pruned; never worse than the given order. The same on every
        machine and with any number of threads. Groups that lose most come first, which suits solvers that go from left
        to right.

    Raises:
        ValueError: scores or a pattern for which no order can be found.

    Source: Pool and Yu, Channel permutations for N:M sparsity, NeurIPS 2021 (exchanges of two columns).

    Example:
        >>> find_order(torch.tensor([[9.0, 9.0, 9.0, 9.0, 0.0, 1.0, 2.0, 3.0]]), "2:4").tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    kept, group = _groups(Pattern.parse(pattern))
    if scores.dim() != 2 or not scores.is_floating_point() or scores.shape[1] % group:
        raise ValueError(
            f"scores must be floating [R, C] with C a multiple of {group}, "
            f"got {list(scores.shape)} {scores.dtype}"
        )
    if kept == group:
        return torch.arange(scores.shape[1], device=scores.device)
    return pruning_permute(_levels(scores, kept, group, "scores"), kept, group, rounds=ROUNDS, window=WINDOW)


def find_orders(
    parts: ModelMap,
    channels: Sequence[Channels],
    norms: Mapping[str, torch.Tensor],
    pattern: str | Pattern,
    *,
    only: Collection[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Orders of a model's channels in which an n:m pattern keeps most of (w_rj ||X_j||)^2 in the linears it prunes.

    Args:
        parts: the map of a model with weights.
        channels: from `find_channels`.
        norms: name of a group of linears -> [C], the norm of each of its inputs over calibration tokens (or another
            measure of what a unit of each column is worth). Linears of other groups are left out of account.
        pattern: an n:m pattern.
        only: names of the linears that will be pruned; None: all.

    Returns:
        Name of the channels -> int64 [sets, size], for `fold_permutation`; channels that no such linear reads are
        absent.

    Raises:
        ValueError: norms or a pattern for which no order can be found.
    """
    search = OrderSearch(parts, channels, pattern, only=only)
    for linear in parts.linears():
        if linear.group in norms:
            search.add(linear, norms[linear.group])
    return search.finish()


class OrderSearch:
    """Finds the orders of channels while linears pass by; for models of which one block is in memory at a time.

    An order is searched for as soon as all linears that read the channels have come, so that only the residual
    stream, which all blocks read, needs memory: a byte per score, 64 MiB to 230 MiB.

    Args:
        parts, channels, pattern, only: as for `find_orders`.

    Raises:
        ValueError: the pattern is not an n:m pattern.

    Example:
        >>> search = OrderSearch(parts, channels, "2:4")                 # doctest: +SKIP
        >>> for linear in parts.linears():                               # doctest: +SKIP
        ...     search.add(linear, norms[linear.group])
        >>> fold_permutation(model, channels, search.finish())           # doctest: +SKIP
    """

    def __init__(
        self,
        parts: ModelMap,
        channels: Sequence[Channels],
        pattern: str | Pattern,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        self._kept, self._group = _groups(Pattern.parse(pattern))
        rows = {
            linear.name: linear.shape[0] for linear in parts.linears() if only is None or linear.name in only
        }
        self._scores: dict[str, _Scores] = {}  # by the name of each linear that is still to come
        self._open: list[_Scores] = []
        self._orders: dict[str, torch.Tensor] = {}
        indivisible = []
        for entry in channels:
            readers = [name for name in entry.readers if name in rows]
            if not readers or self._kept == self._group:
                continue
            if entry.size % self._group:
                indivisible.append(f"{entry.name} ({entry.size})")
                continue
            scores = _Scores(entry, set(readers), sum(rows[name] for name in readers))
            self._open.append(scores)
            self._scores |= dict.fromkeys(readers, scores)
        if indivisible:
            warnings.warn(
                f"channels that do not divide into groups of {self._group} keep their order: "
                + ", ".join(indivisible),
                stacklevel=2,
            )

    def add(self, linear: LinearRef, norms: torch.Tensor) -> None:
        """Take a linear into account; each once, in any order (in the same order for the same result).

        Args:
            linear: with its weight in memory.
            norms: [C], one for each of its inputs.

        Raises:
            ValueError: norms of another shape, or scores that are not finite.
        """
        scores = self._scores.pop(linear.name, None)
        if scores is None:
            return
        if norms.shape != (linear.shape[1],):
            raise ValueError(
                f"{linear.name}: norms must be [{linear.shape[1]}], one for each input, got {list(norms.shape)}"
            )
        weight = linear.weight()[scores.sample(linear.shape[0])].float()
        squares = (weight * norms.to(weight)).square()
        scores.add(_levels(squares, self._kept, self._group, linear.name))
        scores.waiting.discard(linear.name)
        if not scores.waiting:
            self._solve(scores)

    def finish(self) -> dict[str, torch.Tensor]:
        """The orders, from the linears that have come."""
        for scores in list(self._open):
            self._solve(scores)
        return self._orders

    def _solve(self, scores: _Scores) -> None:
        self._open.remove(scores)
        if scores.levels:
            found = [
                pruning_permute(levels, self._kept, self._group, rounds=ROUNDS, window=WINDOW)
                for levels in torch.cat(scores.levels, 1)
            ]
            self._orders[scores.channels.name] = torch.stack(found)
            scores.levels.clear()


class _Scores:
    """The scores that were collected for one set of channels, as levels [sets, rows, size]."""

    def __init__(self, channels: Channels, waiting: set[str], rows: int) -> None:
        self.channels = channels
        self.waiting = waiting
        self.levels: list[torch.Tensor] = []
        affordable = _WORK // (channels.size * min(channels.size, WINDOW))
        self._step = max(1, -(-rows // max(affordable, 1)))
        self._seen = 0

    def sample(self, rows: int) -> slice:
        """Which of a linear's rows to take: every so many of all rows."""
        first = -self._seen % self._step
        self._seen += rows
        return slice(first, None, self._step)

    def add(self, levels: torch.Tensor) -> None:
        """Columns are the sets one behind the other, each perhaps several times (query heads of a KV head)."""
        by_set = levels.unflatten(1, (self.channels.sets, -1, self.channels.size)).transpose(0, 1)
        self.levels.append(by_set.reshape(self.channels.sets, -1, self.channels.size).cpu())


def _groups(pattern: Pattern) -> tuple[int, int]:
    if pattern.kept is None or pattern.group is None:
        raise ValueError(
            f"pattern {pattern} has no groups, so the order of channels does not matter; use n:m such as '2:4'"
        )
    return pattern.kept, pattern.group


def _levels(scores: torch.Tensor, kept: int, group: int, name: str) -> torch.Tensor:
    """Scores [R, C] in 255 steps that suit what an n:m pattern would prune; each linear then counts alike."""
    if not torch.isfinite(scores).all() or (scores < 0).any():
        raise ValueError(f"{name}: scores must be finite and not negative; look at its weight and its norms")
    sample = scores[:: max(1, len(scores) // 1024)]
    lost = sample.unflatten(1, (-1, group)).sort(-1).values[..., : group - kept]
    unit = lost.mean() if lost.numel() else scores.new_zeros(())
    if unit == 0 and scores.numel():
        unit = scores.mean()
    return (scores * (_LEVEL / unit)).nan_to_num_(0).round_().clamp_(max=255).to(torch.uint8)
