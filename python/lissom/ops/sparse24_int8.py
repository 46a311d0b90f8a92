# SPDX-License-Identifier: Apache-2.0
"""The 2:4 linear in int8: x with one scale a token, W with one scale an output channel, both symmetric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lissom.ops import sparse24
from lissom.reference import sparse24 as twin
from lissom.reference import sparse24_int8 as twin_int8

_ops = torch.ops.lissom


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of each row: round(x / scale), half to even, with scale = largest magnitude / 127.

    Serves weights [N, K] (one scale an output channel; 2:4 stays 2:4, zeros stay zero) and activations [..., K] (one
    scale a token). -128 is never made. A row of zeros, or of magnitudes too small for a normal scale (below 1.5e-36),
    becomes zeros with scale 1, so nothing divides by zero. A row that holds NaN or infinity becomes zeros with scale
    NaN: its products are NaN. Not differentiable.

    Args:
        x: [..., K] float32, bfloat16 or float16; rounding is done in float32.

    Returns:
        int8 [..., K] and scale float32 [...].

    Raises:
        TypeError: another dtype. ValueError: no dimension.

    >>> q, scale = quantize_rows(torch.tensor([[0.5, -2.54], [0.0, 0.0]]))
    >>> q.tolist(), scale.tolist()
    ([[25, -127], [0, 0]], [0.019999999552965164, 1.0])
    """
    return _ops.sparse24_quantize_rows(x)


def sparse24_linear_int8(
    x: Tensor,
    scale_x: Tensor,
    packed: Tensor,
    scale_w: Tensor,
    N: int,
    K: int,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = act(scale_x scale_w (x W^T) + bias) + residual, x and W int8. Sums exact in int32; not differentiable.

    All 256 values of x and W are right, -128 too. The sum is converted to float32, multiplied by scale_x[m] *
    scale_w[n], and everything behind that is float32 until the last rounding. So the result depends on no order of
    summation: it is the same for every path and number of threads. (Tiers differ in the last place where there is a
    bias, which portable code does not add in one rounding, and behind gelu, gelu_tanh and silu.)

    Args:
        x: int8 [..., K]. Last dimension contiguous, else one copy is made.
        scale_x: float32, the leading shape of x: `quantize_rows` makes both.
        packed: int8 weight from `sparse24_pack`. N, K: its shape; K at most 262140, so that sums fit int32.
        scale_w: float32 [N].
        bias: [N] float32 or in y's dtype.
        act: none, relu, gelu, gelu_tanh or silu.
        residual: [..., N] in y's dtype, added after the activation.
        out_dtype: float32 (default, the type of the scales), bfloat16 or float16.

    Raises:
        ValueError: shapes. TypeError: dtypes. RuntimeError: packed for another shape, or damaged; a gradient is asked.

    >>> w, scale_w = quantize_rows(torch.eye(16, 32))
    >>> packed = sparse24.sparse24_pack(*sparse24.sparse24_compress(w))
    >>> x, scale_x = quantize_rows(torch.ones(3, 32))
    >>> sparse24_linear_int8(x, scale_x, packed, scale_w, 16, 32).sum().round().item()
    48.0
    """
    return _ops.sparse24_linear_int8(
        x, scale_x, packed, scale_w, N, K, bias, act, residual, out_dtype=out_dtype
    )


@torch.library.register_fake("lissom::sparse24_linear_int8")
def _(
    x: Tensor,
    scale_x: Tensor,
    packed: Tensor,
    scale_w: Tensor,
    N: int,
    K: int,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    twin_int8.one_device(x, scale_x, packed, scale_w, bias, residual)
    out = twin_int8.checks(x, scale_x, scale_w, N, K, bias, act, residual, out_dtype)
    twin.check_packed_size("sparse24_linear_int8", packed, N, K, torch.int8)
    return x.new_empty(*x.shape[:-1], N, dtype=out)


@torch.library.register_fake("lissom::sparse24_quantize_rows")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    twin_int8.check_rows(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _refuse_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        "lissom::sparse24_linear_int8: not differentiable: detach scale_x, scale_w, bias and residual, or train with "
        "sparse24_linear_values on the weight before it was quantised"
    )


def _refuse_backward_of_rounding(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("lissom::sparse24_quantize_rows: rounding has no gradient; pass x.detach()")


sparse24._library.impl("sparse24_linear_int8", twin_int8.linear_int8, "CompositeExplicitAutograd")
sparse24._library.impl("sparse24_quantize_rows", twin_int8.quantize_rows, "CompositeExplicitAutograd")
torch.library.register_autograd("lissom::sparse24_linear_int8", _refuse_backward)
torch.library.register_autograd("lissom::sparse24_quantize_rows", _refuse_backward_of_rounding)
