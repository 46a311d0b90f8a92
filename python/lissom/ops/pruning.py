# SPDX-License-Identifier: Apache-2.0
"""Operators that prepare a weight for an n:m pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from lissom import _C  # noqa: F401  (defines torch.ops.lissom)
from lissom.reference import pruning as twin

_ops = torch.ops.lissom


def pruning_permute(
    levels: Tensor, kept: int, group: int, *, rounds: int = 100, window: int = 2048
) -> Tensor:
    """An order of the columns in which every row keeps more when each group of neighbours keeps its largest.

    Local search from the order that the columns have, so never worse than it: each round takes, for pairs of groups
    that do not overlap, the exchange of two columns that keeps most in addition over all rows, until none is left.
    Sums are integers: the result is the same in every tier, on every device and with any number of threads.

    Args:
        levels: [R, C] uint8, scores of the weights; C a multiple of `group`.
        kept: entries of a group that a row keeps. group: at most 64 neighbouring columns, more than `kept`.
        rounds: most rounds; 0 only orders the groups.
        window: more columns than this are searched in equal parts (of whole groups); work grows as R C min(C, window).

    Returns:
        int64 [C], to be used as levels[:, order]. Groups stand in descending order of the score that they prune
        (what goes left to right, as SparseGPT does, then has most columns left to make up for it), columns in
        ascending order inside a group; among equals the lower column comes first.

    Raises:
        ValueError: shapes or numbers that do not fit. TypeError: other dtypes.

    Source: Pool and Yu, Channel permutations for N:M sparsity, NeurIPS 2021.

    >>> pruning_permute(torch.tensor([[9, 9, 9, 9, 0, 1, 2, 3]], dtype=torch.uint8), 2, 4).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return _ops.pruning_permute(levels, kept, group, rounds, window)


@torch.library.register_fake("lissom::pruning_permute")
def _(levels: Tensor, kept: int, group: int, rounds: int, window: int) -> Tensor:
    twin.check(levels, kept, group, rounds, window)
    return levels.new_empty(levels.shape[1], dtype=torch.int64)


_library = torch.library.Library("lissom", "FRAGMENT")
_library.impl("pruning_permute", twin.permute, "CompositeExplicitAutograd")
