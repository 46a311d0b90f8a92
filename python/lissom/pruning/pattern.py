# SPDX-License-Identifier: Apache-2.0
"""Sparsity patterns, and the selection of exactly as many weights as a pattern asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

import torch

from .transposable import LARGEST_TILE, transposable_mask


@dataclass(frozen=True)
class Pattern:
    """How many weights go, and where: n of every m neighbours stay, or a share of all weights goes, or both.

    Attributes:
        sparsity: exact share of all weights that is pruned in the end, 0 <= sparsity < 1. For an n:m pattern
            it is at least 1 - n/m; what is above is pruned, wherever scores are lowest, inside the kept
            entries.
        kept: n of an n:m pattern: weights that stay in each group; None for an unstructured pattern.
        group: m of an n:m pattern: neighbouring inputs in a group; None for an unstructured pattern.
        transposable: the n:m pattern holds along the outputs as well, tile by tile of m x m.
    """

    sparsity: Fraction
    kept: int | None = None
    group: int | None = None
    transposable: bool = False

    @classmethod
    def parse(cls, spec: str | float | Pattern) -> Pattern:
        """Read "2:4", "50%" or 0.5 (the share pruned), "2:4+70%" (2:4, then 70 % of all), "2:4t" (transposable).

        Args:
            spec: the pattern as users write it; a Pattern is returned as it is.

        Returns:
            The pattern.

        Raises:
            TypeError: neither text nor a number.
            ValueError: n > m, n < 1, m < 1, a share outside [0, 1) or below what n:m prunes, a transposable
                pattern with m > 4, or text of another form.

        Example:
            >>> Pattern.parse("1:4").sparsity
            Fraction(3, 4)
            >>> str(Pattern.parse("2:4t+70%"))
            '2:4t+70%'
        """
        if isinstance(spec, Pattern):
            return spec
        if isinstance(spec, bool) or not isinstance(spec, (str, int, float)):
            raise TypeError(f"pattern must be text such as '2:4' or '50%', or a number, got {spec!r}")
        text = str(spec).strip()
        grouped = re.fullmatch(r"(-?\d+):(-?\d+)(t?)\s*(?:\+(.*))?", text)
        if not grouped:
            return cls(_parse_share(text, text))
        kept, group = int(grouped[1]), int(grouped[2])
        if group < 1 or not 1 <= kept <= group:
            raise ValueError(
                f"pattern {text!r}: an n:m pattern keeps n of m weights with 1 <= n <= m, such as '2:4'"
            )
        if grouped[3] and group > LARGEST_TILE:
            raise ValueError(
                f"pattern {text!r}: transposable patterns are chosen among all masks of a tile, which is "
                f"done up to m = {LARGEST_TILE}; use '2:4t', or leave the t out"
            )
        least = Fraction(group - kept, group)
        share = least if grouped[4] is None else _parse_share(grouped[4].strip(), text)
        if share < least:
            raise ValueError(
                f"pattern {text!r}: {kept}:{group} alone prunes {_percent(least)}, so the share behind the "
                "plus must be at least that"
            )
        return cls(share, kept, group, bool(grouped[3]))

    @property
    def pruned_per_group(self) -> int:
        """m - n of an n:m pattern (before any further pruning), 0 of an unstructured one."""
        return (self.group or 0) - (self.kept or 0)

    @property
    def raised(self) -> bool:
        """Whether weights are pruned inside the entries that an n:m pattern keeps ("2:4+70%")."""
        return self.group is not None and self.sparsity * self.group > self.pruned_per_group

    @property
    def fits_quads(self) -> bool:
        """Whether at most two of every aligned four weights stay, as the packed 2:4 form needs."""
        if self.kept is None or self.group is None:
            return False
        if 4 % self.group == 0:
            return self.kept * (4 // self.group) <= 2
        return self.group % 4 == 0 and self.kept <= 2

    def obstacle(self, inputs: int, outputs: int | None = None) -> str | None:
        """Why a layer of this size cannot take the pattern, or None.

        Args:
            inputs: columns of the weight.
            outputs: rows of the weight; they matter to a transposable pattern only, None leaves them unchecked.
        """
        if self.group is None:
            return None
        if inputs % self.group:
            return f"its {inputs} inputs do not divide into groups of {self.group}"
        if self.transposable and outputs is not None and outputs % self.group:
            return f"its {outputs} outputs do not divide into groups of {self.group} (transposable)"
        return None

    def count(self, total: int) -> int:
        """How many of `total` weights are pruned in the end: floor(sparsity * total), exactly."""
        return self.sparsity.numerator * total // self.sparsity.denominator

    def __str__(self) -> str:
        if self.group is None:
            return _percent(self.sparsity)
        text = f"{self.kept}:{self.group}" + ("t" if self.transposable else "")
        return f"{text}+{_percent(self.sparsity)}" if self.raised else text


def _parse_share(share: str, text: str) -> Fraction:
    try:
        # Through text: Fraction("0.29") is 29/100, while the float 0.29 is less and would floor short.
        value = Fraction(share[:-1]) / 100 if share.endswith("%") else Fraction(share)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"pattern {text!r} is not understood: use n:m such as '2:4', a share such as '50%' or 0.5, both "
            "as '2:4+70%', or '2:4t' (transposable)"
        ) from None
    if not 0 <= value < 1:
        raise ValueError(f"pattern {text!r}: the pruned share must be at least 0 and below 1 (100 %)")
    return value


def _percent(share: Fraction) -> str:
    """The share in percent, or as a fraction where no short decimal is exact: what is written reads back."""
    percent = repr(float(share * 100)).removesuffix(".0")
    return f"{percent}%" if Fraction(percent) == share * 100 else str(share)


def mark_lowest(scores: torch.Tensor, count: int, *, frozen: torch.Tensor | None = None) -> torch.Tensor:
    """Mark exactly the `count` lowest scores along the last dimension; among equals the first ones go.

    The result is that of a stable ascending sort, found from the count-th smallest value in linear time.

    Args:
        scores: [..., n] floating, free of NaN.
        count: how many to mark, 0 <= count <= n.
        frozen: bool [..., n], entries that are marked whatever their score; they are counted first. Scores
            must then be above -inf.

    Returns:
        Bool tensor [..., n] with exactly `count` True along the last dimension, or more where more are frozen.

    Example:
        >>> mark_lowest(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2).tolist()
        [True, True, False, False]
        >>> mark_lowest(torch.tensor([1.0, 0.0]), 1, frozen=torch.tensor([True, False])).tolist()
        [True, False]
    """
    if frozen is not None:
        return mark_lowest(scores.masked_fill(frozen, -torch.inf), count) | frozen
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = torch.kthvalue(scores, count, dim=-1, keepdim=True).values
    below = scores < threshold
    ties = scores == threshold
    wanted = count - below.sum(-1, keepdim=True)
    return below | (ties & (ties.cumsum(-1) <= wanted))


def mark_group(scores: torch.Tensor, count: int, *, frozen: torch.Tensor | None = None) -> torch.Tensor:
    """Mark the `count` lowest of m scores in each of N groups; among equals the first ones go.

    Every pair of members is compared once, on contiguous memory: for m = 4 several times faster than sorting.

    Args:
        scores: [m, N] floating, free of NaN; one row for each member.
        count: how many to mark, 0 <= count <= m.
        frozen: bool [m, N], as for `mark_lowest`.

    Returns:
        Bool tensor [m, N] with exactly `count` True in each column, or more where more are frozen.
    """
    if frozen is not None:
        return mark_group(scores.masked_fill(frozen, -torch.inf), count) | frozen
    rank = torch.zeros_like(scores, dtype=torch.int16)
    for first in range(len(scores)):
        for second in range(first + 1, len(scores)):
            later = scores[second] < scores[first]
            rank[first] += later
            rank[second] += ~later
    return rank < count


def mark_groups(
    scores: torch.Tensor, pattern: Pattern, *, frozen: torch.Tensor | None = None
) -> torch.Tensor:
    """Mark the lowest m - n scores of every group of m neighbouring columns.

    What a raised pattern prunes beyond n:m is not marked: `mark` and `mark_tile` do both stages.

    Args:
        scores: [R, C] floating, free of NaN, C divisible by m (and R, for a transposable pattern).
        pattern: an n:m pattern.
        frozen: bool [R, C], entries that are pruned already: they are chosen first and all stay pruned.

    Returns:
        Bool tensor [R, C], True where a weight is pruned.
    """
    assert pattern.kept is not None
    assert pattern.group is not None
    if pattern.transposable:
        return transposable_mask(scores, pattern.kept, pattern.group, frozen=frozen)

    def members(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(-1, pattern.group or 1).t().contiguous()

    marks = mark_group(
        members(scores), pattern.pruned_per_group, frozen=None if frozen is None else members(frozen)
    )
    return marks.t().reshape(scores.shape)


def mark(
    scores: torch.Tensor,
    pattern: Pattern,
    *,
    scope: str,
    rows: tuple[int, ...],
    block: int,
    frozen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the weights that a pattern prunes by their scores, exactly in count.

    Args:
        scores: [R, C] floating, free of NaN; the lowest are pruned.
        pattern: what to prune. "2:4+70%" is chosen in two stages: first n:m, then the lowest of what n:m
            keeps, until the whole share is reached.
        scope: where a share compares: "row", "block" (of columns, over all rows of a layer), "layer".
        rows: rows of each layer stacked in `scores`; layers are never compared with one another.
        block: columns per block; raised to a multiple of m.
        frozen: bool [R, C], entries that are pruned already: they are chosen first and count, and all of
            them stay pruned, even where a group, row, block or layer has more of them than it would lose.

    Returns:
        Bool tensor [R, C], True where a weight is pruned.
    """
    columns = scores.shape[1]
    width = columns
    if scope == "block" and (pattern.group is None or pattern.raised):
        group = pattern.group or 1
        width = -(-block // group) * group
    tiles = [
        mark_tile(
            scores[:, start : start + width],
            start,
            pattern,
            rows,
            scope=scope,
            frozen=None if frozen is None else frozen[:, start : start + width],
        )
        for start in range(0, columns, width)
    ]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)


def mark_tile(
    scores: torch.Tensor,
    start: int,
    pattern: Pattern,
    rows: tuple[int, ...],
    *,
    scope: str = "block",
    frozen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose in the tile of columns that begins at `start`, so that all tiles together hit the count exactly.

    Args:
        scores: [R, B] floating, free of NaN.
        start: index of the tile's first column in the layer; a multiple of m for an n:m pattern, as is B.
        pattern: what to prune; both stages of a raised pattern are done.
        rows: rows of each stacked layer.
        scope: "row" compares a share inside each row of the tile, "block" over all rows of a layer.
        frozen: bool [R, B], as for `mark`.

    Returns:
        Bool tensor [R, B], True where a weight is pruned.
    """
    if pattern.group is not None:
        frozen = mark_groups(scores, pattern, frozen=frozen)
        if not pattern.raised:
            return frozen
    stop = start + scores.shape[1]
    if scope == "row":
        return mark_lowest(scores, pattern.count(stop) - pattern.count(start), frozen=frozen)
    parts = []
    fixed = [None] * len(rows) if frozen is None else frozen.split(rows)
    for part, given in zip(scores.split(rows), fixed):
        count = pattern.count(len(part) * stop) - pattern.count(len(part) * start)
        flat = None if given is None else given.reshape(1, -1)
        parts.append(mark_lowest(part.reshape(1, -1), count, frozen=flat).reshape(part.shape))
    return torch.cat(parts)


def check_frozen(frozen: torch.Tensor, pattern: Pattern, shape: tuple[int, int], *, name: str) -> None:
    """Refuse a mask of one layer that a pattern cannot be built upon.

    A group of an n:m pattern, or a row, that has more zeros already than its share keeps them all.

    Args:
        frozen: bool [R, C], True where a weight is pruned already.
        pattern: what to prune; its share counts the frozen entries.
        shape: (R, C) of the layer.
        name: of the layer, for the message.

    Raises:
        ValueError: another shape or type, or more pruned already than the pattern prunes.
    """
    if tuple(frozen.shape) != tuple(shape) or frozen.dtype != torch.bool:
        raise ValueError(
            f"{name}: the mask to preserve must be a bool tensor {list(shape)} like the weight, "
            f"got {list(frozen.shape)} {frozen.dtype}"
        )
    present, total = int(frozen.sum()), frozen.numel()
    if present > pattern.sparsity * total:
        raise ValueError(
            f"{name}: {present} of {total} weights ({100 * present / total:.4g} %) are pruned already and "
            f"stay so, but pattern {pattern} prunes only {_percent(pattern.sparsity)}; ask for a higher share"
        )
