# SPDX-License-Identifier: Apache-2.0
"""Products with inv(H + rho I), for one H and rho after rho."""

from __future__ import annotations

from collections.abc import Callable

import torch

# right [R, C] (overwritten), rho, spare [R, C] -> right @ inv(H + rho I), and the buffer that is free now.
ShiftedSolve = Callable[[torch.Tensor, float, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

BAND = 64  # wide enough for matrix products, narrow enough that work inside the band costs next to nothing


def shifted_solve(hessian: torch.Tensor, rows: int) -> ShiftedSolve:
    """Prepare X -> X inv(H + rho I) in the way that is cheaper for so many rows.

    More rows than columns: the inverse is formed for every rho, C^3 multiply-adds beside the R C^2 of the product.
    Else `BandedSolve`: (5/3) C^3 once, and two products for every rho.

    Args:
        hessian: H [C, C] float32 or float64, symmetric, H + rho I positive definite; overwritten.
        rows: R of the right-hand sides.

    Returns:
        A function of the right-hand side [R, C], rho, and a spare buffer of the same shape; both are overwritten,
        one of them holds the solution and comes back first.

    Example:
        >>> solve = shifted_solve(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), rows=1)
        >>> solve(torch.tensor([[3.0, 4.0]]), 1.0, torch.empty(1, 2))[0].round(decimals=4)
        tensor([[1., 1.]])
    """
    if rows <= len(hessian):
        return BandedSolve(hessian)
    diagonal = hessian.diagonal().clone()

    def solve(right: torch.Tensor, rho: float, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hessian.diagonal().copy_(diagonal + rho)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.mm(right, inverse, out=spare), right

    return solve


class BandedSolve:
    """Solves with H + rho I through H = Q B Q^T, Q orthogonal and B banded.

    The reduction is the first half of a two-stage eigensolver (Bischof, Lang & Sun, ACM TOMS 26, 2000): Householder
    reflectors, a panel of columns at a time, all of it matrix products. A shift leaves the band alone, and
    solving inside it costs R C * 4 band multiply-adds. Eigenvectors would serve as well; LAPACK's take twice the time
    and three matrices more of memory, with ten times the rounding (docs/notes/pruning.md).

    Args:
        hessian: H [C, C], symmetric; overwritten.
        band: width of the band.
    """

    def __init__(self, hessian: torch.Tensor, band: int = BAND) -> None:
        below = [_eliminate_(hessian, low, band) for low in range(0, len(hessian) - band, band)]
        self._band = band
        self._diagonal = [
            block.tril() + block.tril(-1).t()
            for block in map(hessian.__getitem__, _corners(len(hessian), band))
        ]
        self._below = [triangle for triangle, _ in below]
        self._basis = _basis(hessian, [factor for _, factor in below], band)

    def __call__(
        self, right: torch.Tensor, rho: float, spare: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `shifted_solve` describes it."""
        turned = torch.mm(right, self._basis, out=spare)
        self._solve_in_band_(turned, rho)
        return torch.mm(turned, self._basis.t(), out=right), turned

    def _solve_in_band_(self, right: torch.Tensor, rho: float) -> None:
        """Block Cholesky, B + rho I = G G^T with blocks C_i on the diagonal and E_i below; then rows through both."""
        columns = right.split(self._band, dim=1)
        inverses: list[torch.Tensor] = []  # inv(C_i)
        edges: list[torch.Tensor] = []  # E_i = L_i inv(C_i)^T
        for index, diagonal in enumerate(self._diagonal):
            shifted = diagonal.clone()
            shifted.diagonal().add_(rho)
            if index:
                edges.append(self._below[index - 1] @ inverses[-1].t())
                shifted.addmm_(edges[-1], edges[-1].t(), alpha=-1)
                columns[index].addmm_(columns[index - 1], edges[-1].t(), alpha=-1)
            eye = torch.eye(len(shifted), dtype=shifted.dtype, device=shifted.device)
            inverses.append(torch.linalg.solve_triangular(torch.linalg.cholesky(shifted), eye, upper=False))
            columns[index].copy_(columns[index] @ inverses[-1].t())
        for index in reversed(range(len(columns))):
            if index < len(edges):
                columns[index].addmm_(columns[index + 1], edges[index], alpha=-1)
            columns[index].copy_(columns[index] @ inverses[index])


def _corners(size: int, band: int) -> list[tuple[slice, slice]]:
    return [(slice(low, low + band), slice(low, low + band)) for low in range(0, size, band)]


def _eliminate_(matrix: torch.Tensor, low: int, band: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clear what lies under the band in `band` columns, and turn the rest of the matrix accordingly.

    With the reflectors V [n, band] of the panel's QR factorisation and P = I - V T V^T (compact WY), A becomes
    P^T A P = A - V Y^T - Y V^T, where Y = A V T - V (T^T V^T A V T) / 2. V stays in the panel.

    Returns:
        The triangle R that stays below the diagonal block, and T.
    """
    panel = matrix[low + band :, low : low + band]
    rest = matrix[low + band :, low + band :]
    packed, tau = torch.geqrf(panel)
    reflectors = packed[:, : len(tau)].tril(-1)
    reflectors.diagonal().fill_(1)
    # inv(T) = diag(1 / tau) + the upper triangle of V^T V; tau is 0 where a column is clear already.
    inner = tau[:, None] * (reflectors.t() @ reflectors).triu(1)
    inner.diagonal().fill_(1)
    factor = torch.linalg.solve_triangular(inner, tau.diag(), upper=True, unitriangular=True)
    turned = rest @ (reflectors @ factor)
    turned.addmm_(reflectors, factor.t() @ (reflectors.t() @ turned), alpha=-0.5)
    rest.addmm_(torch.cat([reflectors, turned], 1), torch.cat([turned, reflectors], 1).t(), alpha=-1)
    panel[:, : len(tau)] = reflectors
    return packed[:band].triu(), factor


def _basis(matrix: torch.Tensor, factors: list[torch.Tensor], band: int) -> torch.Tensor:
    """Q, the product of all I - V T V^T, from the reflectors that `_eliminate_` left in the matrix."""
    basis = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for index in reversed(range(len(factors))):
        low = index * band
        reflectors = matrix[low + band :, low : low + len(factors[index])]
        part = basis[low + band :, low + band :]
        part.addmm_(reflectors @ factors[index], reflectors.t() @ part, alpha=-1)
    return basis
