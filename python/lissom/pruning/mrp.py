# SPDX-License-Identifier: Apache-2.0
"""Joint removal of many weights, block of columns by block (arXiv 2410.15567)."""

from __future__ import annotations

from itertools import combinations
from math import comb

import torch

from ..ops.solver import solver_masked_solve
from .gram import inverse_factor
from .pattern import Pattern, mark_tile
from .problem import Problem, Solution
from .sparsegpt import prune_by_sparsegpt

_MOST_CHOICES = 500  # in a group; mask M tries each of them on every row


def check_variant(pattern: Pattern, variant: str | None) -> str:
    """The variant asked for, or the usual one: MM where a group has few choices, SM elsewhere.

    Args:
        pattern: what to prune.
        variant: as in `Options`.

    Returns:
        "SS", "SM", "MS" or "MM".

    Raises:
        ValueError: mask M where there are too many sets to choose from.
    """
    sets = None if pattern.group is None else comb(pattern.group, pattern.pruned_per_group)
    few = sets is not None and sets <= _MOST_CHOICES
    if variant is None:
        return "MM" if few else "SM"
    if variant[0] == "M" and sets is None:
        raise ValueError(
            f"mrp variant {variant}: mask M tries every choice in a group of m, pattern {pattern} "
            "has no groups; use SM"
        )
    if variant[0] == "M" and not few:
        raise ValueError(
            f"mrp variant {variant}: mask M tries every choice in a group, and {pattern} has {sets:,} of them "
            f"(at most {_MOST_CHOICES} are tried); use SM"
        )
    return variant


def prune_by_mrp(problem: Problem) -> Solution:
    """Prune blocks of columns from left to right; the weights of a block that go are compensated jointly.

    With G = inv(H[b:, b:]) of the block's start, to remove the set P of a row at once costs
    w_P inv(G_PP) w_P^T and moves the columns >= b by -w_P inv(G_PP) G_P: (equations 11 and 13 of the
    paper). The mask comes from single weights, w_j^2 / G_jj (S), or for n:m from the joint loss of each of
    the C(m, n) choices in a group (M, equation 12); the compensation from single weights in turn (S: the pass
    of SparseGPT under this mask) or jointly (M).

    Args:
        problem: the layers, their Hessian and the pattern; `options.variant` names mask and compensation.

    Returns:
        The updated weights, and the mask.

    Raises:
        ValueError: variant M of the mask for an unstructured pattern, or for groups with too many choices.
    """
    pattern, options = problem.pattern, problem.options
    variant = check_variant(pattern, options.variant)
    if options.scope == "layer":
        raise ValueError("scope 'layer' needs all scores at once; mrp takes 'row' or 'block'")
    if variant == "SS":
        return prune_by_sparsegpt(problem)
    assert problem.hessian is not None, "prune_group checks it"
    factor = inverse_factor(problem.hessian)
    weight = problem.weight.clone()
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    group = pattern.group or 1
    # Single weights are compensated at once, so mask M is chosen as late as possible: group by group.
    width = group if variant == "MS" else -(-options.blocksize // group) * group
    for start in range(0, weight.shape[1], width):
        block = slice(start, min(start + width, weight.shape[1]))
        diagonal = factor[block, block]
        inverse = diagonal.t() @ diagonal
        gone = _choose(problem, weight[:, block], block, inverse, joint=variant[0] == "M")
        pruned[:, block] = gone
        if variant[1] == "M":
            # The same step through U: inv(H[b:, b:])[P, :] = (U^T U)[P, :].
            share = solver_masked_solve(inverse, weight[:, block].contiguous(), gone)[0]
            weight[:, block.start :].addmm_(share @ diagonal.t(), factor[block, block.start :], alpha=-1)
        else:
            errors = _single_errors(weight[:, block], gone, diagonal)
            weight[:, block.start :].addmm_(errors, factor[block, block.start :], alpha=-1)
        weight[:, block].masked_fill_(gone, 0)
    return Solution(weight, pruned)


def _choose(
    problem: Problem, tile: torch.Tensor, block: slice, inverse: torch.Tensor, *, joint: bool
) -> torch.Tensor:
    pattern, dead = problem.pattern, problem.dead
    frozen = None if problem.frozen is None else problem.frozen[:, block]
    if joint:
        return _least_joint_loss(tile, pattern, inverse, frozen)
    scores = tile.square() / inverse.diagonal()
    if dead is not None:
        scores = scores.masked_fill_(dead[block], -1)
    scope = problem.options.scope or "block"
    return mark_tile(scores, block.start, pattern, problem.rows, scope=scope, frozen=frozen)


def _least_joint_loss(
    tile: torch.Tensor, pattern: Pattern, inverse: torch.Tensor, frozen: torch.Tensor | None
) -> torch.Tensor:
    """In each group the set Q of least w_Q inv(G_QQ) w_Q^T; among equals the first in lexicographic order."""
    group, gone = pattern.group, pattern.pruned_per_group
    assert group is not None
    members = tile.reshape(len(tile), -1, group)  # [R, groups, m]
    corners = torch.stack(
        [inverse[start : start + group, start : start + group] for start in range(0, tile.shape[1], group)]
    )  # [groups, m, m]
    fixed = None if frozen is None else frozen.reshape(members.shape)
    best = torch.full(members.shape[:2], torch.inf, dtype=tile.dtype, device=tile.device)
    choice = torch.zeros(members.shape, dtype=torch.bool, device=tile.device)
    for subset in combinations(range(group), gone):
        index = torch.tensor(subset, device=tile.device)
        solved = torch.linalg.inv(corners[:, index[:, None], index])  # [groups, q, q], shared by all rows
        part = members[:, :, index]
        loss = torch.einsum("rgi,gij,rgj->rg", part, solved, part)
        if fixed is not None:
            # A frozen weight left standing costs more than any set of free ones.
            loss = loss + (fixed.sum(-1) - fixed[:, :, index].sum(-1)) * 1e30
        better = loss < best
        best = torch.where(better, loss, best)
        row = torch.zeros(group, dtype=torch.bool, device=tile.device).index_fill(0, index, True)
        choice = torch.where(better[:, :, None], row, choice)
    choice = choice.reshape(tile.shape)
    return choice if frozen is None else choice | frozen


def _single_errors(tile: torch.Tensor, gone: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Errors [R, B] of the pruned weights of a block, one column after the other (SparseGPT's pass)."""
    work = tile.clone()
    errors = torch.empty_like(work)
    for column in range(work.shape[1]):
        errors[:, column] = work[:, column] * gone[:, column] / factor[column, column]
        work[:, column + 1 :].addr_(errors[:, column], factor[column, column + 1 :], alpha=-1)
    return errors
