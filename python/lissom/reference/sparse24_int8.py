# SPDX-License-Identifier: Apache-2.0
"""Torch twins of `sparse24_linear_int8` and `sparse24_quantize_rows`. Sums are exact on any device: made in parts that
float32 holds exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lissom.reference import sparse24 as twin

OP = "sparse24_linear_int8"
_EXACT_COLUMNS = 2048  # 1024 products of at most 2^14: every partial sum is an integer up to 2^24


def check_rows(x: Tensor) -> None:
    """What `sparse24_quantize_rows` rejects."""
    op = "lissom::sparse24_quantize_rows"
    if x.dtype not in twin.DTYPES:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16; got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., K]; got {list(x.shape)}")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `sparse24_quantize_rows`."""
    check_rows(x)
    wide = x.float()
    if x.shape[-1] == 0:
        return torch.empty_like(wide, dtype=torch.int8), wide.new_ones(x.shape[:-1])
    largest = torch.linalg.vector_norm(wide, float("inf"), dim=-1)
    scale = largest / 127
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1, scale)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    q = (wide / scale.unsqueeze(-1)).round_().nan_to_num_(0.0).to(torch.int8)
    return q.contiguous(), scale.contiguous()


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """x W^T in int32 of int8 x [M, K] and 2:4 W [N, K].

    >>> integer_product(torch.tensor([[-128, 3]], dtype=torch.int8), torch.tensor([[-128, 1]], dtype=torch.int8)).item()
    16387
    """
    y = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32, device=x.device)
    for first in range(0, x.shape[1], _EXACT_COLUMNS):
        part = slice(first, first + _EXACT_COLUMNS)
        y += (x[:, part].float() @ w[:, part].float().t()).int()
    return y


def linear_int8(
    x: Tensor,
    scale_x: Tensor,
    packed: Tensor,
    scale_w: Tensor,
    n: int,
    k: int,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Twin of `sparse24_linear_int8`."""
    one_device(x, scale_x, packed, scale_w, bias, residual)
    held = twin._read_header(OP, packed, n, k)
    if held != torch.int8:
        raise TypeError(f"lissom::{OP}: packed must hold an int8 weight; got {held}")
    out = checks(x, scale_x, scale_w, n, k, bias, act, residual, out_dtype)
    w = twin.decompress(*twin.unpack(packed, n, k), k)
    sums = integer_product(x.reshape(x.shape[:-1].numel(), k), w).reshape(*x.shape[:-1], n)
    y = sums.float() * (scale_x.unsqueeze(-1) * scale_w)
    if bias is not None:
        y = y + bias.float()
    y = twin.activate(y, act, OP)
    if residual is not None:
        y = y + residual.float()
    return y.to(out)


def one_device(
    x: Tensor,
    scale_x: Tensor,
    packed: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Refuses tensors on several devices, by their names."""
    twin.one_device(OP, x=x, scale_x=scale_x, packed=packed, scale_w=scale_w, bias=bias, residual=residual)


def checks(
    x: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    n: int,
    k: int,
    bias: Tensor | None,
    act: str,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """What `sparse24_linear_int8` rejects by shape and dtype alone; returns the dtype of y."""
    op = f"lissom::{OP}"
    if x.dtype != torch.int8:
        raise TypeError(f"{op}: x must be int8; got {x.dtype}: quantize_rows makes int8 and scale_x of it")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"{op}: x must be [..., K={k}]; got {list(x.shape)}")
    if scale_x.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: scale_x must have the leading shape of x, {list(x.shape[:-1])}; got {list(scale_x.shape)}"
        )
    if tuple(scale_w.shape) != (n,):
        raise ValueError(f"{op}: scale_w must be [N={n}]; got {list(scale_w.shape)}")
    if scale_x.dtype != torch.float32 or scale_w.dtype != torch.float32:
        raise TypeError(f"{op}: scale_x and scale_w must be float32; got {scale_x.dtype} and {scale_w.dtype}")
    out = out_dtype or torch.float32
    if out not in twin.DTYPES:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16 or float16; got {out}")
    twin._check_terms(op, (*x.shape[:-1], n), bias, act, residual, out, out)
    return out
