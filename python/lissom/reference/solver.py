# SPDX-License-Identifier: Apache-2.0
"""Torch twins of the solver operators. Registered for every device that has no kernel of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from lissom.reference.sparse24 import one_device

DTYPES = (torch.float32, torch.float64)


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """The dtypes that all solver operators take."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"lissom::{op}: {name} must be float32 or float64; got {tensor.dtype}")


def check_like(
    op: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, **tensors: Tensor | None
) -> None:
    """Contiguous tensors of one shape and dtype."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"lissom::{op}: {name} must be {dtype}; got {tensor.dtype}")
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"lissom::{op}: {name} must be contiguous {list(shape)}; got {list(tensor.shape)} with "
                f"strides {list(tensor.stride())}"
            )


def check_group(op: str, columns: int, kept: int, group: int, *, name: str = "C") -> None:
    """kept of group entries, in whole groups."""
    if not (group >= 1 and 0 <= kept <= group and columns % group == 0):
        raise ValueError(
            f"lissom::{op}: kept of group entries must fit with 0 <= kept <= group and {name} a multiple of "
            f"group; got kept={kept}, group={group} and {name}={columns}"
        )


def check_admm_step(
    x: Tensor,
    u: Tensor,
    b: Tensor | None,
    rhs: Tensor,
    rho: float,
    rho_next: float,
    kept: int,
    group: int,
    forced: Tensor | None,
) -> None:
    """What `solver_admm_step_` refuses."""
    op = "solver_admm_step_"
    one_device(op, x=x, u=u, b=b, rhs=rhs, forced=forced)
    check_float(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"lissom::{op}: x must be contiguous [..., C]; got {list(x.shape)}")
    check_like(op, x.shape, x.dtype, x=x, u=u, b=b, rhs=rhs)
    check_like(op, x.shape, torch.bool, forced=forced)
    if not (rho > 0 and rho_next > 0):
        raise ValueError(f"lissom::{op}: rho and rho_next must be positive; got {rho} and {rho_next}")
    check_group(op, x.shape[-1], kept, group)


def mark_lowest(scores: Tensor, count: int, forced: Tensor | None) -> Tensor:
    """Marks the `count` lowest scores (>= 0) of the last dimension, forced ones before them; of equals the first."""
    if forced is not None:
        scores = scores.masked_fill(forced, -1)
    order = scores.argsort(dim=-1, stable=True)[..., :count]
    marks = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    return marks if forced is None else marks | forced


def admm_mask(u: Tensor) -> Tensor:
    """What a scaled dual says is pruned: all but +0."""
    return (u != 0) | u.signbit()


def admm_step_(
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
    """Twin of `solver_admm_step_`."""
    check_admm_step(x, u, b, rhs, rho, rho_next, kept, group, forced)
    z = x + u
    groups = None if forced is None else forced.unflatten(-1, (-1, group))
    pruned = mark_lowest(z.abs().unflatten(-1, (-1, group)), group - kept, groups).view(z.shape)
    changed = (pruned != admm_mask(u)).sum()
    scaled = z * (rho / rho_next)
    u.copy_(torch.where(pruned, torch.where(scaled == 0, -0.0, scaled), 0.0))
    right = torch.where(pruned, -rho * z, rho_next * z)
    rhs.copy_(right if b is None else right + b)
    return changed


def check_pcg_step(
    w: Tensor, r: Tensor, p: Tensor, q: Tensor, energy: Tensor, scale: Tensor, pruned: Tensor
) -> None:
    """What `solver_pcg_step_` refuses."""
    op = "solver_pcg_step_"
    one_device(op, w=w, r=r, p=p, q=q, energy=energy, scale=scale, pruned=pruned)
    check_float(op, "w", w)
    if w.dim() != 2:
        raise ValueError(f"lissom::{op}: w must be contiguous [R, C]; got {list(w.shape)}")
    check_like(op, w.shape, w.dtype, w=w, r=r, p=p, q=q)
    check_like(op, (w.shape[0],), w.dtype, energy=energy)
    check_like(op, (w.shape[1],), w.dtype, scale=scale)
    check_like(op, w.shape, torch.bool, pruned=pruned)


def pcg_step_(
    w: Tensor, r: Tensor, p: Tensor, q: Tensor, energy: Tensor, scale: Tensor, pruned: Tensor
) -> Tensor:
    """Twin of `solver_pcg_step_`."""
    check_pcg_step(w, r, p, q, energy, scale, pruned)
    curvature = torch.linalg.vecdot(p, q)
    alive = (energy > 0) & (curvature > 0)
    length = torch.where(alive, energy / curvature, 0)[:, None]
    w.addcmul_(p, length)
    r.copy_(torch.where(alive[:, None], (r - length * q).masked_fill(pruned, 0), r))
    z = r * scale
    after = torch.linalg.vecdot(r, z)
    turned = z + (after / energy)[:, None] * p
    p.copy_(torch.where(alive[:, None], turned, p))
    energy.copy_(torch.where(alive, after, energy))
    return torch.linalg.vecdot(r, r)


def check_sparsegpt_block(tile: Tensor, pruned: Tensor, factor: Tensor, kept: int, group: int) -> None:
    """What `solver_sparsegpt_block_` refuses."""
    op = "solver_sparsegpt_block_"
    one_device(op, tile=tile, pruned=pruned, factor=factor)
    check_float(op, "tile", tile)
    if tile.dim() != 2 or not tile.is_contiguous():
        raise ValueError(
            f"lissom::{op}: tile must be contiguous [B, R]; got {list(tile.shape)} with strides {list(tile.stride())}"
        )
    check_like(op, tile.shape, torch.bool, pruned=pruned)
    if factor.dtype != tile.dtype:
        raise TypeError(f"lissom::{op}: factor must be {tile.dtype}; got {factor.dtype}")
    if factor.shape != (len(tile), len(tile)):
        raise ValueError(f"lissom::{op}: factor must be [B, B] with B={len(tile)}; got {list(factor.shape)}")
    check_group(op, len(tile), kept, group, name="B")


def sparsegpt_block_(tile: Tensor, pruned: Tensor, factor: Tensor, kept: int, group: int) -> Tensor:
    """Twin of `solver_sparsegpt_block_`."""
    check_sparsegpt_block(tile, pruned, factor, kept, group)
    errors = torch.empty_like(tile)
    scale = factor.diagonal()[:, None]
    for column in range(len(tile)):
        if column % group == 0:
            part = slice(column, column + group)
            scores = (tile[part] / scale[part]).abs()
            pruned[part] = mark_lowest(scores.t(), group - kept, pruned[part].t()).t()
        gone = pruned[column]
        errors[column] = torch.where(gone, tile[column] / scale[column], 0)
        tile[column].masked_fill_(gone, 0)
        tile[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return errors


def check_masked_solve(h: Tensor, b: Tensor, chosen: Tensor) -> None:
    """What `solver_masked_solve` refuses."""
    op = "solver_masked_solve"
    one_device(op, h=h, b=b, chosen=chosen)
    check_float(op, "b", b)
    if b.dim() != 2:
        raise ValueError(f"lissom::{op}: b must be contiguous [R, C]; got {list(b.shape)}")
    check_like(op, b.shape, b.dtype, b=b)
    check_like(op, b.shape, torch.bool, chosen=chosen)
    if h.dtype != b.dtype:
        raise TypeError(f"lissom::{op}: h must be {b.dtype}; got {h.dtype}")
    if h.shape != (b.shape[1], b.shape[1]):
        raise ValueError(f"lissom::{op}: h must be [C, C] with C={b.shape[1]}; got {list(h.shape)}")


def masked_solve(h: Tensor, b: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `solver_masked_solve`."""
    check_masked_solve(h, b, chosen)
    x, info = torch.zeros_like(b), torch.zeros(len(b), dtype=torch.int32, device=b.device)
    counts = chosen.sum(1)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        index = chosen[rows].nonzero()[:, 1].view(len(rows), count)
        factor, failed = torch.linalg.cholesky_ex(h[index[:, :, None], index[:, None, :]])
        found = torch.cholesky_solve(b[rows].gather(1, index)[:, :, None], factor)[:, :, 0]
        found.masked_fill_(failed[:, None] > 0, torch.nan)
        x[rows] = x[rows].scatter(1, index, found)
        info[rows] = failed
    return x, info
