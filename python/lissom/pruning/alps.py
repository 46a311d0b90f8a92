# SPDX-License-Identifier: Apache-2.0
"""Mask search by ADMM (ALPS: Meng et al., arXiv 2406.07831)."""

from __future__ import annotations

import torch

from ..ops.solver import solver_admm_mask, solver_admm_step_
from .problem import Problem, Solution
from .shifted import shifted_solve

_ITERATIONS = 28
# Penalty in units of the normalised Hessian (unit diagonal), from loose to tight.
_RHO_FIRST, _RHO_LAST = 0.1, 1.2


def prune_by_alps(problem: Problem) -> Solution:
    """Let the weights and a sparse copy of them converge to one another, under a rising penalty.

    In the variables W diag(H)^(1/2), in which H has a unit diagonal and a magnitude is Wanda's score, ADMM
    repeats

        X = (W H - V + rho D) inv(H + rho I)        the best dense weights near the sparse copy D
        D = the part of X + V / rho that the pattern keeps
        V = V + rho (X - D)

    The dual V is zero on what is kept and rho (X + V / rho) on what is pruned, so Z = X + V / rho and its
    mask are the whole state. An iteration is two products of [R, C] with [C, C] (for many rows one, with the
    inverse formed; `shifted_solve`) and one pass over the weights.
    ALPS raises rho by how fast the mask settles; a geometric schedule of fixed length finds masks as good and
    costs the same for every layer.

    Args:
        problem: the layers, their Hessian and the pattern.

    Returns:
        The last sparse copy, and the mask.
    """
    assert problem.hessian is not None, "prune_group checks it"
    scale = problem.hessian.diagonal().sqrt()
    hessian = problem.hessian / (scale[:, None] * scale)
    weight = problem.weight * scale
    pull = weight @ hessian
    solve = shifted_solve(hessian, len(weight))
    del hessian  # not needed beside the basis of wide layers: as large
    rise = (_RHO_LAST / _RHO_FIRST) ** (1 / (_ITERATIONS - 1))
    rho = _RHO_FIRST
    right = weight.masked_fill(problem.mark(weight.abs(), scope="row"), 0).mul_(rho).add_(pull)
    dual = torch.zeros_like(weight)  # V in units of the next penalty
    spare = weight
    for step in range(_ITERATIONS):
        right, spare = solve(right, rho, spare)
        if step < _ITERATIONS - 1:
            _project_(problem, right, dual, pull, (rho, rho * rise))
            rho *= rise
    _project_(problem, right, dual, None, (1.0, 1.0))  # leaves the sparse copy itself
    return Solution(right / scale, solver_admm_mask(dual))


def _project_(
    problem: Problem,
    dense: torch.Tensor,
    dual: torch.Tensor,
    pull: torch.Tensor | None,
    rho: tuple[float, float],
) -> None:
    """The rest of an iteration, in place: from X to the next right-hand side, W H - V + rho D."""
    pattern, columns = problem.pattern, dense.shape[1]
    kept, group, forced = pattern.kept, pattern.group, problem.frozen
    if group is None and problem.options.scope in (None, "row"):
        kept, group = columns - pattern.count(columns), columns
    elif group is None or pattern.raised or pattern.transposable:
        kept, group, forced = 1, 1, problem.mark((dense + dual).abs(), scope="row")
    assert kept is not None
    solver_admm_step_(dense, dual, pull, dense, rho[0], rho[1], kept, group, forced)
