# SPDX-License-Identifier: Apache-2.0
"""The layer-wise pruning problem, as every method receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .pattern import Pattern


@dataclass(frozen=True)
class Options:
    """What a user may choose about a method beyond the usual.

    Attributes:
        blocksize: columns between two lazy updates (raised to a multiple of m), and the width of scope
            "block".
        scope: where an unstructured pattern compares weights: "row", "block" (of columns, over all rows) or
            "layer"; None is the method's own: "layer" for magnitude, "row" for wanda, "block" for sparsegpt.
        act_order: prune columns in descending order of diag(H) (unstructured patterns only).
    """

    blocksize: int = 128
    scope: str | None = None
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.blocksize < 1:
            raise ValueError(f"blocksize must be at least 1, got {self.blocksize!r}; 128 is usual")
        if self.scope not in (None, "row", "block", "layer"):
            raise ValueError(f"scope must be 'row', 'block' or 'layer', got {self.scope!r}")


@dataclass(frozen=True)
class Problem:
    """Weights that read one input, stacked by rows, with the Gram matrix of that input.

    Attributes:
        weight: [R, C] in the precision of the solve.
        gram: [C, C], undamped; None for methods that need none.
        pattern: what to prune.
        rows: rows of each stacked layer; they sum to R.
        damp: share of the mean diagonal that is added to the Gram matrix before it is inverted.
        options: the user's choices.
        name: for warnings.
    """

    weight: torch.Tensor
    gram: torch.Tensor | None
    pattern: Pattern
    rows: tuple[int, ...]
    damp: float
    options: Options
    name: str


class Solution(NamedTuple):
    """New weights [R, C] and the mask [R, C], True where a weight goes; what the mask prunes is not read."""

    weight: torch.Tensor
    pruned: torch.Tensor
