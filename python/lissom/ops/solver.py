# SPDX-License-Identifier: Apache-2.0
"""Inner loops of the pruning solvers on weights [R, C]: what lies between their matrix products, in one pass each.

Names that end in an underscore write into their arguments. Results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lissom import _C  # noqa: F401  (defines torch.ops.lissom)
from lissom.reference import solver as twin

_ops = torch.ops.lissom


def solver_admm_step_(
    x: Tensor,
    u: Tensor,
    b: Tensor | None,
    rhs: Tensor,
    rho: float,
    rho_next: float,
    kept: int,
    group: int,
    forced: Tensor | None = None,
) -> Tensor:
    """One step of ADMM for min f(w) with w sparse: mask, scaled dual and the next right-hand side from a new x.

    With z = x + u, the `kept` entries of largest |z| stay in each group of `group` neighbours; among equals the first
    ones go. Then

        u   = pruned ? z rho / rho_next : 0         the scaled dual, in units of the next penalty
        rhs = b + (pruned ? -rho : rho_next) z      b + rho_next (D - u) with D = z on what is kept

    so that u and rhs are the whole state. A pruned z of 0 leaves u = -0: u alone tells the mask, see
    `solver_admm_mask`. A share of each row is `group=C`, a share of a whole layer the same on `x.view(1, -1)`. A mask
    that was chosen elsewhere is `forced` with kept = group = 1.

    Args:
        x: [..., C] float32 or float64, contiguous, free of NaN.
        u: like x, read and written. Zeros (nothing pruned) at the start.
        b: like x, or None for zero: with rho = rho_next = 1 then, rhs is z on what is kept.
        rhs: like x, written; may be x itself, which saves memory traffic.
        rho, rho_next: penalty of the step that gave x, and of the next one; positive.
        kept, group: the pattern kept:group along the last dimension.
        forced: bool like x: entries that go before all others, and all of them even where they are too many.

    Returns:
        int64 []: how many entries went from kept to pruned or back.

    Raises:
        ValueError: shapes, strides, a penalty or a pattern that does not fit. TypeError: dtypes.

    Source: Meng et al., arXiv 2406.07831 (ALPS), section 3.1.

    >>> x, u, rhs = torch.tensor([[4.0, -1.0, 2.0, 3.0]]), torch.zeros(1, 4), torch.empty(1, 4)
    >>> solver_admm_step_(x, u, None, rhs, 1.0, 2.0, 2, 4).item()
    2
    >>> u.tolist(), rhs.tolist()
    ([[0.0, -0.5, 1.0, 0.0]], [[8.0, 1.0, -2.0, 6.0]])
    """
    return _ops.solver_admm_step_(x, u, b, rhs, rho, rho_next, kept, group, forced)


def solver_admm_mask(u: Tensor) -> Tensor:
    """What `solver_admm_step_` pruned, bool like the scaled dual u: all but +0.

    >>> solver_admm_mask(torch.tensor([0.0, -0.0, 0.5])).tolist()
    [False, True, True]
    """
    return twin.admm_mask(u)


def solver_pcg_step_(
    w: Tensor, r: Tensor, p: Tensor, q: Tensor, energy: Tensor, scale: Tensor, pruned: Tensor
) -> Tensor:
    """One step of conjugate gradients for w_S H_SS = b_S of every row, behind the product q = p H.

    S is what the mask keeps in the row. With step sizes of its own for each row,

        w += a p,  r -= a q on S,  p = scale r + (energy' / energy) p       a = energy / <p, q>,  energy = <r, scale r>

    Rows with energy 0, or without curvature <p, q> > 0, stay as they are. Start with r = (b - w H) and w zero where
    pruned, p = scale r, energy = <r, p>.

    Args:
        w, r, p: [R, C] float32 or float64, contiguous: weights, residual, direction; read and written.
        q: [R, C], the product p H.
        energy: [R], read and written.
        scale: [C], the preconditioner 1 / diag(H).
        pruned: bool [R, C], True outside of S.

    Returns:
        [R]: the new <r, r>.

    Raises:
        ValueError: shapes or strides. TypeError: dtypes.

    >>> h, b = torch.tensor([[2.0]]), torch.tensor([[6.0]])
    >>> w, r, p, energy = torch.zeros(1, 1), b.clone(), b / 2, torch.tensor([18.0])
    >>> mask = torch.zeros(1, 1, dtype=torch.bool)
    >>> solver_pcg_step_(w, r, p, p @ h, energy, torch.tensor([0.5]), mask).item(), w.item()
    (0.0, 3.0)
    """
    return _ops.solver_pcg_step_(w, r, p, q, energy, scale, pruned)


def solver_sparsegpt_block_(tile: Tensor, pruned: Tensor, factor: Tensor, kept: int, group: int) -> Tensor:
    """SparseGPT's pass over one block of columns: choice of the mask, errors, and compensation inside the block.

    Column by column, with U the upper Cholesky factor of inv(H), the pruned weights are given up and the columns behind
    take up their errors:

        e_j = pruned_j ? w_j / U_jj : 0,   w_k -= U_jk e_j for k > j

    When the pass reaches a group of columns, the group - kept entries of least |w| / U_jj are pruned; among equals the
    first ones go. Columns behind the block are the caller's: weight[stop:].addmm_(U[start:stop, stop:].t(), errors,
    alpha=-1).

    Args:
        tile: [B, R] float32 or float64, contiguous: weights, columns first; read and written: zeros where pruned.
        pruned: bool [B, R], contiguous, read and written: what is marked before goes first, and all of it. A mask that
            was chosen elsewhere comes with kept = group = 1.
        factor: U of the block, [B, B], its diagonal positive; any strides.
        kept, group: the pattern kept:group along B.

    Returns:
        errors [B, R].

    Raises:
        ValueError: shapes, strides or a pattern that does not fit. TypeError: dtypes.

    Source: Frantar and Alistarh, arXiv 2301.00774, algorithm 1.

    >>> tile, pruned = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1, dtype=torch.bool)
    >>> solver_sparsegpt_block_(tile, pruned, torch.tensor([[2.0, 1.0], [0.0, 1.0]]), 1, 2).tolist()
    [[0.5], [0.0]]
    >>> tile.tolist(), pruned.tolist()
    ([[0.0], [2.5]], [[True], [False]])
    """
    return _ops.solver_sparsegpt_block_(tile, pruned, factor, kept, group)


def solver_masked_solve(h: Tensor, b: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Solves x_S H[S, S] = b_S exactly for every row, each with a set S of its own.

    One Cholesky factorisation a row, sixteen rows in step (AVX-512, float32). Rows with sets of like size cost least.

    Args:
        h: [C, C] float32 or float64, symmetric; only the lower triangle is read. C at most 46340.
        b: [R, C], contiguous, the dtype of h; read on S only.
        chosen: bool [R, C], True on S.

    Returns:
        x [R, C], zero outside of S, and info int32 [R]: 0, or 1 + the place in S of the first pivot that is not
        positive: there H[S, S] is not positive definite, and x is NaN on S.

    Raises:
        ValueError: shapes or strides. TypeError: dtypes.

    >>> h, b = torch.tensor([[4.0, 2.0], [2.0, 5.0]]), torch.tensor([[6.0, 7.0], [8.0, 9.0]])
    >>> x, info = solver_masked_solve(h, b, torch.tensor([[True, True], [True, False]]))
    >>> x.round(decimals=4).tolist(), info.tolist()
    ([[1.0, 1.0], [2.0, 0.0]], [0, 0])
    """
    return _ops.solver_masked_solve(h, b, chosen)


# --- shapes without data


@torch.library.register_fake("lissom::solver_admm_step_")
def _(
    x: Tensor,
    u: Tensor,
    b: Tensor | None,
    rhs: Tensor,
    rho: float,
    rho_next: float,
    kept: int,
    group: int,
    forced: Tensor | None = None,
) -> Tensor:
    twin.check_admm_step(x, u, b, rhs, rho, rho_next, kept, group, forced)
    return x.new_empty((), dtype=torch.int64)


@torch.library.register_fake("lissom::solver_pcg_step_")
def _(w: Tensor, r: Tensor, p: Tensor, q: Tensor, energy: Tensor, scale: Tensor, pruned: Tensor) -> Tensor:
    twin.check_pcg_step(w, r, p, q, energy, scale, pruned)
    return torch.empty_like(energy)


@torch.library.register_fake("lissom::solver_sparsegpt_block_")
def _(tile: Tensor, pruned: Tensor, factor: Tensor, kept: int, group: int) -> Tensor:
    twin.check_sparsegpt_block(tile, pruned, factor, kept, group)
    return torch.empty_like(tile)


@torch.library.register_fake("lissom::solver_masked_solve")
def _(h: Tensor, b: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    twin.check_masked_solve(h, b, chosen)
    return torch.empty_like(b), b.new_empty(b.shape[0], dtype=torch.int32)


# --- any other device: the twins

_library = torch.library.Library("lissom", "FRAGMENT")
for _name in ("admm_step_", "pcg_step_", "sparsegpt_block_", "masked_solve"):
    _library.impl(f"solver_{_name}", getattr(twin, _name), "CompositeExplicitAutograd")
