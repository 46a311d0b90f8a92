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
    assert problem.hessian is not None, "prune_group checks it"
    hessian = problem.hessian
    # Columns are the rows of `weight` here [C, R]: the pass reads and writes contiguous memory.
    weight = problem.weight.t().clone(memory_format=torch.contiguous_format)
    dead = None if problem.dead is None else problem.dead[:, None]
    frozen = None if problem.frozen is None else problem.frozen.t()
    order = None
    if options.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        weight, hessian = weight[order], hessian[order][:, order]
        dead = None if dead is None else dead[order]
        frozen = None if frozen is None else frozen[order]
    factor = inverse_factor(hessian)
    state = _Sweep(weight, torch.zeros_like(weight, dtype=torch.bool), factor, dead, frozen)
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
    """What the pass works on, columns first: weight, mask [C, R], U [C, C], dead [C, 1], frozen [C, R]."""

    weight: torch.Tensor
    pruned: torch.Tensor
    factor: torch.Tensor
    dead: torch.Tensor | None
    frozen: torch.Tensor | None


def _prune_block(state: _Sweep, block: slice, problem: Problem) -> torch.Tensor:
    """Prune one block of columns in place; returns their errors [B, R], which the columns behind absorb."""
    pattern = problem.pattern
    tile, pruned = state.weight[block], state.pruned[block]
    factor = state.factor[block, block]
    scale = factor.diagonal()[:, None]
    dead = None if state.dead is None else state.dead[block]
    frozen = None if state.frozen is None else state.frozen[block]

    def scores(part: slice) -> torch.Tensor:
        # Dead inputs go first: their weights are zero already and must count towards the pattern.
        lost = (tile[part] / scale[part]).square_()
        return lost if dead is None else lost.masked_fill_(dead[part], -1)

    if pattern.group is None:
        scope = problem.options.scope or "block"
        fixed = None if frozen is None else frozen.t()
        marks = mark_tile(
            scores(slice(None)).t(), block.start, pattern, problem.rows, scope=scope, frozen=fixed
        )
        pruned.copy_(marks.t())
    errors = torch.empty_like(tile)
    for column in range(len(tile)):
        if pattern.group is not None and column % pattern.group == 0:
            part = slice(column, column + pattern.group)
            fixed = None if frozen is None else frozen[part]
            pruned[part] = mark_group(scores(part), pattern.pruned_per_group, frozen=fixed)
        error = errors[column]
        torch.mul(tile[column], pruned[column], out=error).div_(factor[column, column])
        tile[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    return errors
