# SPDX-License-Identifier: Apache-2.0
"""The best kept weights for a given mask: every row solved jointly, whatever method chose the mask."""

from __future__ import annotations

import torch

from ..ops.solver import solver_masked_solve, solver_pcg_step_


def refit(
    target: torch.Tensor,
    hessian: torch.Tensor,
    pruned: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    tolerance: float = 1e-4,
    iterations: int = 30,
) -> torch.Tensor:
    """Minimise tr((W' - W) H (W' - W)^T) over the kept weights by preconditioned conjugate gradients.

    The optimum on the kept set S of a row w is w'_S = (w H)_S inv(H_SS): the residual (w - w') H vanishes on
    S. All rows advance at once, each with its own step sizes, so that an iteration is one product with H and
    two passes over the weights. The preconditioner is diag(H).

    Args:
        target: W [R, C] float32 or float64.
        hessian: H [C, C], positive definite.
        pruned: bool [R, C], True where a weight is zero.
        start: first guess [R, C]; None starts at the target. What the mask prunes is not read.
        tolerance: a row stops when its residual, in the norm of 1 / diag(H), over w, in that of diag(H), is below.
        iterations: stop at the latest after as many.

    Returns:
        Tensor [R, C], exact zeros where pruned.

    Source: normal equations of arXiv 2410.15567 (eq. 11-13), solved as in ALPS, arXiv 2406.07831.

    Example:
        >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> refit(torch.tensor([[1.0, 1.0]]), h, torch.tensor([[False, True]])).tolist()
        [[1.5, 0.0]]
    """
    weight = (target if start is None else start).masked_fill(pruned, 0)
    scale = hessian.diagonal().reciprocal()
    # Rows stop one by one, so that a row's result does not depend on its neighbours.
    goal = tolerance**2 * torch.linalg.vecdot(target.square(), hessian.diagonal())
    residual = ((target - weight) @ hessian).masked_fill_(pruned, 0)
    step = residual * scale
    energy = torch.linalg.vecdot(residual, step)
    for _ in range(iterations):
        energy.masked_fill_(energy <= goal, 0)  # a row without energy is left alone
        if not energy.any():
            break
        solver_pcg_step_(weight, residual, step, step @ hessian, energy, scale, pruned)
    return weight


def refit_exactly(target: torch.Tensor, hessian: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """The same minimum by one Cholesky factorisation of H_SS per row, followed by one step of refinement.

    Args:
        target: W [R, C] float32 or float64.
        hessian: H [C, C], positive definite.
        pruned: bool [R, C], True where a weight is zero.

    Returns:
        Tensor [R, C], exact zeros where pruned. Costs R (C/2)^3 / 3 multiply-adds at half the weights kept.

    Raises:
        ValueError: H is not positive definite on the kept inputs of a row.

    Example:
        >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> refit_exactly(torch.tensor([[1.0, 1.0]]), h, torch.tensor([[False, True]])).tolist()
        [[1.5, 0.0]]
    """
    kept = ~pruned
    wanted = target @ hessian
    weight = _solve(hessian, wanted, kept)
    left = torch.addmm(wanted, weight, hessian, alpha=-1)
    return weight.add_(_solve(hessian, left, kept))


def _solve(hessian: torch.Tensor, right: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    found, info = solver_masked_solve(hessian, right, kept)
    if info.any():
        row = int(info.nonzero()[0])
        raise ValueError(f"H is not positive definite on the kept inputs of row {row}; raise damp")
    return found


def stationarity(
    weight: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor, pruned: torch.Tensor
) -> float:
    """How far kept weights are from their optimum: ||((W - W') H)_kept||_F / ||W H||_F, 0 at the optimum.

    Args:
        weight: W' [R, C].
        target: W [R, C].
        hessian: H [C, C].
        pruned: bool [R, C].

    Returns:
        The ratio.
    """
    wanted = target @ hessian
    left = torch.addmm(wanted, weight, hessian, alpha=-1).masked_fill_(pruned, 0)
    whole = wanted.norm().item()
    return left.norm().item() / whole if whole else left.norm().item()
