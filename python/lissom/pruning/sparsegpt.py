# SPDX-License-Identifier: Apache-2.0
"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): one pass of exact single-weight updates."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .gram import inverse_factor
from .pattern import mark_group, mark_tile
from .problem import Problem, Solution


def prune_by_sparsegpt(problem: Problem) -> Solution:
    """Prune column by column; each pruned weight is compensated by all columns to its right.

    With inv(H) = U^T U, row j of U divided by U_jj is the optimal update of the columns >= j for one unit of
    error in column j once the columns < j are frozen, and U_jj^2 is the diagonal of the inverse of that
    trailing H; so w_j^2 / U_jj^2 is the score. Masks are chosen on the updated weights: per group of m when
    the pass reaches the group, per block of columns for unstructured patterns.

    Args:
        problem: the layers, their Gram matrix and the pattern.

    Returns:
        The updated weights, and the mask.
    """
    pattern, options = problem.pattern, problem.options
    if options.scope == "layer":
        raise ValueError("scope 'layer' needs all scores at once; sparsegpt takes 'row' or 'block'")
    if options.act_order and pattern.group is not None:
        raise ValueError(
            f"act_order reorders columns, which breaks the groups of pattern {pattern}; switch it off"
        )
    assert problem.gram is not None, "prune_group checks it"
    gram = problem.gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    # Columns are the rows of `weight` here [C, R]: the pass reads and writes contiguous memory.
    weight = problem.weight.t().clone(memory_format=torch.contiguous_format)
    weight[dead] = 0
    order = None
    if options.act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
        weight, gram, dead = weight[order], gram[order][:, order], dead[order]
    factor = inverse_factor(gram, problem.damp, problem.name)
    state = _Sweep(weight, torch.zeros_like(weight, dtype=torch.bool), factor, dead)
    group = pattern.group or 1
    width = -(-options.blocksize // group) * group
    for start in range(0, len(weight), width):
        block = slice(start, min(start + width, len(weight)))
        errors = _prune_block(state, block, problem)
        weight[block.stop :].addmm_(factor[block, block.stop :].t(), errors, alpha=-1)
    weight, pruned = state.weight, state.pruned
    if order is not None:
        back = order.argsort()
        weight, pruned = weight[back], pruned[back]
    return Solution(weight.t().contiguous(), pruned.t().contiguous())


class _Sweep(NamedTuple):
    """What the pass works on, columns first: weight and mask [C, R], U [C, C], dead inputs [C]."""

    weight: torch.Tensor
    pruned: torch.Tensor
    factor: torch.Tensor
    dead: torch.Tensor


def _prune_block(state: _Sweep, block: slice, problem: Problem) -> torch.Tensor:
    """Prune one block of columns in place; returns their errors [B, R], which the columns behind absorb."""
    pattern = problem.pattern
    tile, pruned = state.weight[block], state.pruned[block]
    factor, dead = state.factor[block, block], state.dead[block, None]
    scale = factor.diagonal()[:, None]

    def scores(part: slice) -> torch.Tensor:
        # Dead inputs go first: their weights are zero already and must count towards the pattern.
        return (tile[part] / scale[part]).square_().masked_fill_(dead[part], -1)

    if pattern.group is None:
        scope = problem.options.scope or "block"
        pruned.copy_(mark_tile(scores(slice(None)).t(), block.start, pattern, problem.rows, scope=scope).t())
    errors = torch.empty_like(tile)
    for column in range(len(tile)):
        if pattern.group is not None and column % pattern.group == 0:
            part = slice(column, column + pattern.group)
            pruned[part] = mark_group(scores(part), pattern.pruned_per_group)
        error = errors[column]
        torch.mul(tile[column], pruned[column], out=error).div_(factor[column, column])
        tile[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    return errors
