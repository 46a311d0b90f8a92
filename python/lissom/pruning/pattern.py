# SPDX-License-Identifier: Apache-2.0
"""Sparsity patterns, and the selection of exactly as many weights as a pattern asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

import torch


@dataclass(frozen=True)
class Pattern:
    """How many weights go, and where: n of every m neighbours stay, or a share of all weights goes.

    Attributes:
        sparsity: exact share of the weights that is pruned, 0 <= sparsity < 1.
        kept: n of an n:m pattern: weights that stay in each group; None for an unstructured pattern.
        group: m of an n:m pattern: neighbouring inputs in a group; None for an unstructured pattern.
    """

    sparsity: Fraction
    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, spec: str | float | Pattern) -> Pattern:
        """Read "2:4" (n:m, n weights kept of m), "50%" or 0.5 (the share that is pruned).

        Args:
            spec: the pattern as users write it; a Pattern is returned as it is.

        Returns:
            The pattern.

        Raises:
            TypeError: neither text nor a number.
            ValueError: n > m, n < 1, m < 1, a share outside [0, 1), or text of another form.

        Example:
            >>> Pattern.parse("1:4").sparsity
            Fraction(3, 4)
        """
        if isinstance(spec, Pattern):
            return spec
        if isinstance(spec, bool) or not isinstance(spec, (str, int, float)):
            raise TypeError(f"pattern must be text such as '2:4' or '50%', or a number, got {spec!r}")
        text = str(spec).strip()
        grouped = re.fullmatch(r"(-?\d+):(-?\d+)", text)
        if grouped:
            kept, group = int(grouped[1]), int(grouped[2])
            if group < 1 or not 1 <= kept <= group:
                raise ValueError(
                    f"pattern {text!r}: an n:m pattern keeps n of m weights with 1 <= n <= m, such as '2:4'"
                )
            return cls(Fraction(group - kept, group), kept, group)
        try:
            # Through text: Fraction("0.29") is 29/100, while the float 0.29 is less and would floor short.
            share = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise ValueError(
                f"pattern {text!r} is not understood: use n:m such as '2:4', a share such as '50%', or 0.5"
            ) from None
        if not 0 <= share < 1:
            raise ValueError(f"pattern {text!r}: the pruned share must be at least 0 and below 1 (100 %)")
        return cls(share)

    @property
    def pruned_per_group(self) -> int:
        """m - n of an n:m pattern, 0 of an unstructured one."""
        return (self.group or 0) - (self.kept or 0)

    def obstacle(self, inputs: int) -> str | None:
        """Why a layer with this many inputs cannot take the pattern, or None."""
        if self.group is not None and inputs % self.group:
            return f"its {inputs} inputs do not divide into groups of {self.group}"
        return None

    def count(self, total: int) -> int:
        """How many of `total` weights an unstructured pattern prunes: floor(sparsity * total), exactly."""
        return self.sparsity.numerator * total // self.sparsity.denominator

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else f"{float(self.sparsity * 100):g}%"


def mark_lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark exactly the `count` lowest scores along the last dimension; among equals the first ones go.

    The result is that of a stable ascending sort, found from the count-th smallest value in linear time.

    Args:
        scores: [..., n] floating, free of NaN.
        count: how many to mark, 0 <= count <= n.

    Returns:
        Bool tensor [..., n] with exactly `count` True along the last dimension.

    Example:
        >>> mark_lowest(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2).tolist()
        [True, True, False, False]
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = torch.kthvalue(scores, count, dim=-1, keepdim=True).values
    below = scores < threshold
    ties = scores == threshold
    wanted = count - below.sum(-1, keepdim=True)
    return below | (ties & (ties.cumsum(-1) <= wanted))


def mark_group(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` lowest of m scores in each of N groups; among equals the first ones go.

    Every pair of members is compared once, on contiguous memory: for m = 4 several times faster than sorting.

    Args:
        scores: [m, N] floating, free of NaN; one row for each member.
        count: how many to mark, 0 <= count <= m.

    Returns:
        Bool tensor [m, N] with exactly `count` True in each column.
    """
    rank = torch.zeros_like(scores, dtype=torch.int16)
    for first in range(len(scores)):
        for second in range(first + 1, len(scores)):
            later = scores[second] < scores[first]
            rank[first] += later
            rank[second] += ~later
    return rank < count


def mark_groups(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Mark the lowest m - n scores of every group of m neighbouring columns.

    Args:
        scores: [R, C] floating, free of NaN, C divisible by m.
        pattern: an n:m pattern.

    Returns:
        Bool tensor [R, C], True where a weight is pruned.
    """
    assert pattern.group is not None
    members = scores.reshape(-1, pattern.group).t().contiguous()
    return mark_group(members, pattern.pruned_per_group).t().reshape(scores.shape)


def mark(
    scores: torch.Tensor, pattern: Pattern, *, scope: str, rows: tuple[int, ...], block: int
) -> torch.Tensor:
    """Choose the weights that a pattern prunes by their scores, exactly in count.

    Args:
        scores: [R, C] floating, free of NaN; the lowest are pruned.
        pattern: what to prune.
        scope: where an unstructured pattern compares: "row", "block" (of columns, over all rows of a layer),
            "layer".
        rows: rows of each layer stacked in `scores`; layers are never compared with one another.
        block: columns per block.

    Returns:
        Bool tensor [R, C], True where a weight is pruned.
    """
    if pattern.group is not None:
        return mark_groups(scores, pattern)
    columns = scores.shape[1]
    if scope == "row":
        return mark_lowest(scores, pattern.count(columns))
    width = block if scope == "block" else columns
    tiles = [
        mark_tile(scores[:, start : start + width], start, pattern, rows)
        for start in range(0, columns, width)
    ]
    return torch.cat(tiles, dim=1)


def mark_tile(
    scores: torch.Tensor, start: int, pattern: Pattern, rows: tuple[int, ...], *, scope: str = "block"
) -> torch.Tensor:
    """Choose in the tile of columns that begins at `start`, so that all tiles together hit the count exactly.

    Args:
        scores: [R, B] floating, free of NaN.
        start: index of the tile's first column in the layer.
        pattern: an unstructured pattern.
        rows: rows of each stacked layer.
        scope: "row" compares inside each row of the tile, "block" over all rows of a layer.

    Returns:
        Bool tensor [R, B], True where a weight is pruned.
    """
    stop = start + scores.shape[1]
    if scope == "row":
        return mark_lowest(scores, pattern.count(stop) - pattern.count(start))
    parts = []
    for part in scores.split(rows):
        count = pattern.count(len(part) * stop) - pattern.count(len(part) * start)
        parts.append(mark_lowest(part.reshape(1, -1), count).reshape(part.shape))
    return torch.cat(parts)
