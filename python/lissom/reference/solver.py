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


def check_like(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Tensors of the shape and dtype of `like`; those called "forced" are masks."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtype = torch.bool if name == "forced" else like.dtype
        if tensor.dtype != dtype:
            raise TypeError(f"lissom::{op}: {name} must be {dtype}; got {tensor.dtype}")
        if tensor.shape != like.shape or not tensor.is_contiguous():
            raise ValueError(
                f"lissom::{op}: {name} must be contiguous {list(like.shape)}; got {list(tensor.shape)} with "
                f"strides {list(tensor.stride())}"
            )


def check_group(op: str, columns: int, kept: int, group: int) -> None:
    """kept of group entries, in whole groups."""
    if not (group >= 1 and 0 <= kept <= group and columns % group == 0):
        raise ValueError(
            f"lissom::{op}: kept of group entries must fit with 0 <= kept <= group and C a multiple of group; "
            f"got kept={kept}, group={group} and C={columns}"
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
    check_like(op, x, x=x, u=u, b=b, rhs=rhs, forced=forced)
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
