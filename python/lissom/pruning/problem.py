# SPDX-License-Identifier: Apache-2.0
"""The layer-wise pruning problem, as every method receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .pattern import Pattern, mark


@dataclass(frozen=True)
class Options:
    """What a user may choose about a method beyond the usual.

    Attributes:
        refit: how the kept weights are solved for once a mask stands: True (conjugate gradients, whole rows),
            "exact" (one Cholesky solve per row), or False: the method's own weights stay.
        variant: of "mrp" alone: mask and compensation, each S (one weight at a time) or M (jointly), as in "MM";
            None: "MM" for n:m, "SM" for unstructured patterns.
        blocksize: columns between two lazy updates (raised to a multiple of m), and the width of scope
            "block".
        scope: where an unstructured pattern compares weights: "row", "block" (of columns, over all rows) or
            "layer"; None is the method's own: "layer" for magnitude, "row" for wanda and alps, "block" else.
        act_order: prune columns in descending order of diag(H) (unstructured patterns; "sparsegpt" and variant
            SS of "mrp").
    """

    refit: bool | str = True
    variant: str | None = None
    blocksize: int = 128
    scope: str | None = None
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.refit not in (True, False, "exact"):
            raise ValueError(f"refit must be True, False or 'exact', got {self.refit!r}")
        if self.variant not in (None, "SS", "SM", "MS", "MM"):
            raise ValueError(f"variant must be SS, SM, MS or MM (mask, compensation), got {self.variant!r}")
        if self.blocksize < 1:
            raise ValueError(f"blocksize must be at least 1, got {self.blocksize!r}; 128 is usual")
        if self.scope not in (None, "row", "block", "layer"):
            raise ValueError(f"scope must be 'row', 'block' or 'layer', got {self.scope!r}")


@dataclass(frozen=True)
class Problem:
    """Weights that read one input, stacked by rows, with the statistics of that input.

    Attributes:
        weight: [R, C] in the precision of the solve: what the pruned weight should act like. Zero for dead
            inputs.
        hessian: H = X X^T + lambda I [C, C], positive definite; None for methods that need none.
        norms: ||X_j||_2 of each input [C], undamped; None without statistics.
        pattern: what to prune.
        rows: rows of each stacked layer; they sum to R.
        frozen: bool [R, C] or None: weights that are pruned already and stay so; they count towards the
            pattern.
        options: the user's choices.
    """

    weight: torch.Tensor
    hessian: torch.Tensor | None
    norms: torch.Tensor | None
    pattern: Pattern
    rows: tuple[int, ...]
    frozen: torch.Tensor | None
    options: Options

    @property
    def dead(self) -> torch.Tensor | None:
        """Bool [C]: inputs that were zero on every token; None without statistics."""
        return None if self.norms is None else self.norms == 0

    def mark(self, scores: torch.Tensor, *, scope: str) -> torch.Tensor:
        """The mask [R, C] that prunes the lowest scores (>= 0), weights of dead inputs before all others."""
        ranked = scores if self.dead is None else scores.masked_fill(self.dead, -1)
        return mark(
            ranked,
            self.pattern,
            scope=self.options.scope or scope,
            rows=self.rows,
            block=self.options.blocksize,
            frozen=self.frozen,
        )


class Solution(NamedTuple):
    """New weights [R, C] and the mask [R, C], True where a weight goes; what the mask prunes is not read."""

    weight: torch.Tensor
    pruned: torch.Tensor
