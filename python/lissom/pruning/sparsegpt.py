# SPDX-License-Identifier: Apache-2.0
"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): one pass of exact single-weight updates."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..ops.solver import solver_sparsegpt_block_
from .gram import inverse_factor
from .pattern import mark_groups, mark_tile
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
    dead = None if problem.dead is None or not problem.dead.any() else problem.dead[:, None]
    frozen = None if problem.frozen is None else problem.frozen.t()
    order = None
    if options.act_order:
        # A dead input has a diagonal of 1 for the factorisation's sake alone: it comes last.
        sizes = (
            hessian.diagonal() if problem.dead is None else hessian.diagonal().masked_fill(problem.dead, 0)
        )
        order = sizes.argsort(descending=True, stable=True)
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
    tile, pruned, factor = state.weight[block], state.pruned[block], state.factor[block, block]
    frozen = None if state.frozen is None else state.frozen[block]
    kept, group = pattern.kept, pattern.group
    if group is None:
        scores = (tile / factor.diagonal()[:, None]).square_()
        if state.dead is not None:
            scores.masked_fill_(state.dead[block], -1)
        scope = problem.options.scope or "block"
        fixed = None if frozen is None else frozen.t()
        marks = mark_tile(scores.t(), block.start, pattern, problem.rows, scope=scope, frozen=fixed)
        pruned.copy_(marks.t())
        kept, group = 1, 1
    else:
        if state.dead is not None:
            # Dead inputs go first: their weights are zero already and must count towards the pattern.
            dead = state.dead[block, 0]
            pruned |= (mark_groups((~dead[None]).float(), pattern) & dead).t()
        if frozen is not None:
            pruned |= frozen
    assert kept is not None
    return solver_sparsegpt_block_(tile, pruned, factor, kept, group)
