# SPDX-License-Identifier: Apache-2.0
"""Mask search by ADMM (ALPS: Meng et al., arXiv 2406.07831)."""

from __future__ import annotations

import torch

from .problem import Problem, Solution

_ITERATIONS = 48
# Penalty in units of the normalised Hessian (unit diagonal), from loose to tight.
_RHO_FIRST, _RHO_LAST = 0.05, 5.0


def prune_by_alps(problem: Problem) -> Solution:
    """Let the weights and a sparse copy of them converge to one another, under a rising penalty.

    In the variables W diag(H)^(1/2), in which H has a unit diagonal and a magnitude is Wanda's score, ADMM
    repeats

        X = (W H - V + rho D) inv(H + rho I)        the best dense weights near the sparse copy D
        D = the part of X + V / rho that the pattern keeps
        V = V + rho (X - D)

    The dual V is zero on what is kept and rho (X + V / rho) on what is pruned, so Z = X + V / rho and its
    mask are the whole state. One eigendecomposition H = Q diag(e) Q^T serves every rho: an iteration is two
    products of [R, C] with [C, C] and one pass over the weights. ALPS raises rho by how fast the mask
    settles; a geometric schedule of fixed length finds masks as good and costs the same for every layer.

    Args:
        problem: the layers, their Hessian and the pattern.

    Returns:
        The last sparse copy, and the mask.
    """
    assert problem.hessian is not None, "prune_group checks it"
    scale = problem.hessian.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(problem.hessian / (scale[:, None] * scale))
    weight = problem.weight * scale
    pull = ((weight @ vectors) * values) @ vectors.t()  # W H
    rise = (_RHO_LAST / _RHO_FIRST) ** (1 / (_ITERATIONS - 1))
    rho = _RHO_FIRST
    state, pruned = weight, problem.mark(weight.abs(), scope="row")
    right = torch.addcmul(pull, state, ~pruned, value=rho)
    dual = torch.zeros_like(weight)
    for _ in range(_ITERATIONS):
        dense = ((right @ vectors) / (values + rho)) @ vectors.t()
        state = dense.add_(dual)
        pruned = problem.mark(state.abs(), scope="row")
        # u = V / rho_next: the dual in the units of the next penalty.
        right = pull + torch.where(pruned, -rho * state, rho * rise * state)
        dual = torch.where(pruned, state / rise, 0)
        rho *= rise
    return Solution(state / scale, pruned)
