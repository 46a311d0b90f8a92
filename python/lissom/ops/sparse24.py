# SPDX-License-Identifier: Apache-2.0
"""Operators on 2:4 sparse weights: y = act(x W^T + bias) + residual, W [N, K] with at most two non-zeros in every
aligned group of four columns (a quad). Both forms of W are drawn in csrc/sparse24/layout.h. The product in int8,
`sparse24_linear_int8`, and `sparse24_quantize_rows` are in sparse24_int8.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from lissom import _C  # noqa: F401  (defines torch.ops.lissom)
from lissom.reference import sparse24 as twin

_ops = torch.ops.lissom


def sparse24_compress(w: Tensor, *, pattern: str = "auto") -> tuple[Tensor, Tensor]:
    """Canonical form of a dense weight.

    Zero means equal to zero, so -0.0 counts as zero; NaN and infinities are kept bit for bit.

    Args:
        w: [N, K] float32, bfloat16, float16 or int8, K a multiple of 4.
        pattern: "auto" wants w to be 2:4 already; "magnitude" keeps the two largest magnitudes of a quad (ties: the
            lower position).

    Returns:
        values [N, K/2] in w's dtype and meta [N, ceil(K/8)] uint8.

    Raises:
        ValueError: K is not a multiple of 4, or w is not 2:4 (names the first row, quad and its non-zeros).
        TypeError: other dtypes.

    >>> values, meta = sparse24_compress(torch.tensor([[0.0, 5.0, 0.0, 7.0]]))
    >>> values.tolist(), hex(int(meta))
    ([[5.0, 7.0]], '0xd')
    """
    return _ops.sparse24_compress(w, pattern=pattern)


def sparse24_decompress(values: Tensor, meta: Tensor, K: int) -> Tensor:
    """Dense weight [N, K] of a canonical form; exact inverse of `sparse24_compress`.

    Args:
        values: [N, K/2]. meta: [N, ceil(K/8)] uint8. K: columns of the dense weight.

    Raises:
        ValueError: shapes that do not fit, or corrupt metadata (names row and quad).

    >>> sparse24_decompress(torch.tensor([[5.0, 7.0]]), torch.tensor([[0xD]], dtype=torch.uint8), 4).tolist()
    [[0.0, 5.0, 0.0, 7.0]]
    """
    return _ops.sparse24_decompress(values, meta, K)


def sparse24_check(w: Tensor) -> tuple[bool, int, int]:
    """Whether w [N, K] is 2:4, else the first bad row and quad.

    Returns:
        (ok, row, quad); row and quad are -1 when ok.

    >>> sparse24_check(torch.ones(2, 8))
    (False, 0, 0)
    """
    ok, row, quad = _ops.sparse24_check(w).tolist()
    return bool(ok), row, quad


def sparse24_check_meta(meta: Tensor, K: int) -> tuple[bool, int, int]:
    """Whether every nibble of meta [N, ceil(K/8)] uint8 is legal, else the first bad row and quad.

    >>> sparse24_check_meta(torch.tensor([[0x4E]], dtype=torch.uint8), 8)
    (True, -1, -1)
    """
    ok, row, quad = _ops.sparse24_check_meta(meta, K).tolist()
    return bool(ok), row, quad


def sparse24_validate_meta(meta: Tensor, K: int) -> None:
    """Raises ValueError naming row, quad and nibble if meta [N, ceil(K/8)] uint8 is corrupt.

    >>> sparse24_validate_meta(torch.tensor([[0x4E]], dtype=torch.uint8), 8)
    """
    ok, row, quad = sparse24_check_meta(meta, K)
    if not ok:
        nibble = (int(meta[row, quad // 2]) >> 4 * (quad % 2)) & 15
        raise ValueError(
            f"lissom::sparse24_validate_meta: corrupt metadata: row {row}, quad {quad} holds nibble 0x{nibble:X}; "
            "wanted one of 0x4 0x8 0x9 0xC 0xD 0xE (and 0x0 behind the last quad)"
        )


def sparse24_target(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """The packed form of a device's kernels: "cpu-v1", "sm80-v1", or None where they take only the canonical one.

    On CUDA, bfloat16, float16 and int8 have kernels (where lissom was built with them). For 2:4 in float32 there are no
    tensor cores: sparse24_linear_values expands such a weight at every call, and says so once.

    >>> sparse24_target("cpu", torch.float32)
    'cpu-v1'
    """
    return twin.own_target(torch.device(device), dtype)


def sparse24_pack(values: Tensor, meta: Tensor, target: str | None = None) -> Tensor:
    """Kernel layout of a canonical form: uint8 [bytes] that begin with a header. A cache: never save it.

    Args:
        target: "cpu-v1" or "sm80-v1" (CUDA; bfloat16, float16 and int8; made on the CPU too); the device's own
            when left out.

    Raises:
        ValueError: corrupt metadata, shapes that do not fit, unknown target, int8 with K above 262140. TypeError:
            float32 for sm80-v1.

    >>> values, meta = sparse24_compress(torch.eye(16, 32))
    >>> sparse24_pack(values, meta).shape
    torch.Size([1152])
    """
    return _ops.sparse24_pack(values, meta, target)


def sparse24_unpack(
    packed: Tensor, N: int, K: int, target: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Canonical form (values, meta) of a packed weight; exact inverse of `sparse24_pack`.

    Args:
        target: as it was packed; the device's own when left out.
        dtype: dtype of the values. Read from the header when left out; under torch.compile it must be given.

    Raises:
        RuntimeError: not a packed weight, or one of another target, shape or version. TypeError: other dtype.

    >>> values, meta = sparse24_compress(torch.eye(16, 32))
    >>> torch.equal(sparse24_unpack(sparse24_pack(values, meta), 16, 32)[0], values)
    True
    """
    return _ops.sparse24_unpack(packed, N, K, target, dtype=dtype)


def sparse24_linear(
    x: Tensor,
    packed: Tensor,
    N: int,
    K: int,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = act(x W^T + bias) + residual, W packed. Sums in float32; differentiable in x, bias and residual.

    int8 has an operator of its own, `sparse24_linear_int8`.

    Bit-identical from run to run for one M, ISA tier and number of threads. A pruned position never sees x: where
    dense arithmetic gives Inf * 0 = NaN, this gives nothing (the explicit zeros that fill up a quad with fewer than two
    non-zeros are kept, and see it). Paths that use the bf16 dot or tile instruction count denormals as zero, as these
    instructions do. A gradient of x passes a dense W: there Inf in dy does give NaN.

    Args:
        x: [..., K] float32, bfloat16 or float16, the dtype of W. Last dimension contiguous, else one copy is made.
        packed: from `sparse24_pack`. N, K: shape of W.
        bias: [N] in x's dtype or float32.
        act: none, relu, gelu, gelu_tanh or silu.
        residual: [..., N] in y's dtype, added after the activation.
        out_dtype: float32, or x's dtype (default).

    Raises:
        ValueError: shapes. TypeError: dtypes. RuntimeError: packed for another shape, or damaged.

    >>> packed = sparse24_pack(*sparse24_compress(torch.eye(16, 32)))
    >>> sparse24_linear(torch.ones(3, 32), packed, 16, 32).sum().item()
    48.0
    """
    return _ops.sparse24_linear(x, packed, N, K, bias, act, residual, out_dtype=out_dtype)


def sparse24_linear_values(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias from the canonical form, differentiable in x, values and bias: the training path.

    The gradient of the values is [N, K/2]: no dense dW is kept.

    >>> values, meta = sparse24_compress(torch.eye(16, 32))
    >>> sparse24_linear_values(torch.ones(3, 32), values, meta).shape
    torch.Size([3, 16])
    """
    return _ops.sparse24_linear_values(x, values, meta, bias)


def sparse24_grad_input(dy: Tensor, packed: Tensor, N: int, K: int) -> Tensor:
    """dx [..., K] = dy [..., N] W. W is not 2:4 along N, so this runs at dense speed, a block of rows of W at a time.

    >>> packed = sparse24_pack(*sparse24_compress(torch.eye(16, 32)))
    >>> sparse24_grad_input(torch.ones(3, 16), packed, 16, 32).sum().item()
    48.0
    """
    return _ops.sparse24_grad_input(dy, packed, N, K)


def sparse24_mask_mm(dy: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    """Gradient of the values, [N, K/2]: dy^T x at the kept positions, a block of rows at a time.

    Args:
        dy: [..., N]. x: [..., K], same dtype and leading dimensions. meta: [N, ceil(K/8)] uint8.

    >>> _, meta = sparse24_compress(torch.eye(16, 32))
    >>> sparse24_mask_mm(torch.ones(3, 16), torch.ones(3, 32), meta).unique().tolist()
    [3.0]
    """
    return _ops.sparse24_mask_mm(dy, x, meta)


# --- shapes without data


@torch.library.register_fake("lissom::sparse24_compress")
def _(w: Tensor, *, pattern: str = "auto") -> tuple[Tensor, Tensor]:
    twin._check_dense("sparse24_compress", w)
    twin._check_pattern(pattern)
    n, k = w.shape
    return w.new_empty(n, k // 2), w.new_empty(n, twin.meta_columns(k), dtype=torch.uint8)


@torch.library.register_fake("lissom::sparse24_decompress")
def _(values: Tensor, meta: Tensor, K: int) -> Tensor:
    twin._check_canonical("sparse24_decompress", values, meta, K)
    return values.new_empty(values.shape[0], K)


@torch.library.register_fake("lissom::sparse24_check")
def _(w: Tensor) -> Tensor:
    twin._check_dense("sparse24_check", w)
    return w.new_empty(3, dtype=torch.int64)


@torch.library.register_fake("lissom::sparse24_check_meta")
def _(meta: Tensor, K: int) -> Tensor:
    twin._check_meta_shape(meta, K)
    return meta.new_empty(3, dtype=torch.int64)


@torch.library.register_fake("lissom::sparse24_pack")
def _(values: Tensor, meta: Tensor, target: str | None = None) -> Tensor:
    target = twin.resolve_target("sparse24_pack", target, values.device, values.dtype)
    n, k = twin._check_canonical("sparse24_pack", values, meta)
    twin.require_int8_columns("sparse24_pack", values.dtype, k)
    return values.new_empty(twin.packed_bytes(n, k, values.dtype, target), dtype=torch.uint8)


@torch.library.register_fake("lissom::sparse24_unpack")
def _(
    packed: Tensor, N: int, K: int, target: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    twin.resolve_target("sparse24_unpack", target, packed.device, dtype)
    if dtype is None:
        raise RuntimeError(
            "lissom::sparse24_unpack: pass dtype= while tracing: the header cannot be read there"
        )
    twin.check_packed_size("sparse24_unpack", packed, N, K, dtype, target)
    return packed.new_empty(N, K // 2, dtype=dtype), packed.new_empty(N, twin.meta_columns(K))


@torch.library.register_fake("lissom::sparse24_linear")
def _(
    x: Tensor,
    packed: Tensor,
    N: int,
    K: int,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    twin.one_device("sparse24_linear", x=x, packed=packed, bias=bias, residual=residual)
    out = twin.linear_checks(x, N, K, bias, act, residual, out_dtype)
    twin.check_packed_size("sparse24_linear", packed, N, K, x.dtype)
    return x.new_empty(*x.shape[:-1], N, dtype=out)


@torch.library.register_fake("lissom::sparse24_linear_values")
def _(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    n, _ = twin.check_linear_values(x, values, meta, bias)
    return x.new_empty(*x.shape[:-1], n)


@torch.library.register_fake("lissom::sparse24_grad_input")
def _(dy: Tensor, packed: Tensor, N: int, K: int) -> Tensor:
    twin.check_dy(dy, packed, N)
    twin.check_packed_size("sparse24_grad_input", packed, N, K, dy.dtype)
    return dy.new_empty(*dy.shape[:-1], K)


@torch.library.register_fake("lissom::sparse24_mask_mm")
def _(dy: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    n, k = twin.check_mask_mm(dy, x, meta)
    return x.new_empty(n, k // 2)


# --- any other device: the twins

_library = torch.library.Library("lissom", "FRAGMENT")
for _name in (
    "compress",
    "decompress",
    "check",
    "check_meta",
    "pack",
    "unpack",
    "linear",
    "linear_values",
    "grad_input",
    "mask_mm",
):
    _library.impl(f"sparse24_{_name}", getattr(twin, _name), "CompositeExplicitAutograd")


# --- gradients


def _act_backward(dy: Tensor, pre: Tensor, act: str) -> Tensor:
    if act == "relu":
        return torch.ops.aten.threshold_backward(dy, pre, 0)
    if act == "silu":
        return torch.ops.aten.silu_backward(dy, pre)
    return torch.ops.aten.gelu_backward(dy, pre, approximate="tanh" if act == "gelu_tanh" else "none")


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Tensor) -> None:
    x, packed, ctx.N, ctx.K, bias, ctx.act, residual = inputs
    # x is only needed to rebuild what went into the activation.
    ctx.save_for_backward(packed, *((x, bias) if ctx.act != "none" else (None, None)))
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    packed, x, bias = ctx.saved_tensors
    # The dispatcher drops trailing arguments that are None, and their entries here with them.
    d_residual = dy if ctx.has_residual and ctx.needs_input_grad[6] else None
    if ctx.act != "none":
        pre = _ops.sparse24_linear(x, packed, ctx.N, ctx.K, bias, out_dtype=torch.float32)
        dy = _act_backward(dy.float(), pre, ctx.act)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = _ops.sparse24_grad_input(dy.to(ctx.x_dtype), packed, ctx.N, ctx.K)
    d_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        d_bias = dy.float().sum_to_size(ctx.N).to(ctx.bias_dtype)
    return dx, None, None, None, d_bias, None, d_residual


def _values_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, meta, bias = inputs
    ctx.save_for_backward(x if values.requires_grad else None, values if x.requires_grad else None, meta)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _values_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, meta = ctx.saved_tensors
    dx = d_values = d_bias = None
    if ctx.needs_input_grad[0]:
        n, k = values.shape[0], values.shape[1] * 2
        if twin.own_target(values.device, values.dtype) is None:
            dx = dy @ _ops.sparse24_decompress(values, meta, k)
        else:
            dx = _ops.sparse24_grad_input(dy, _ops.sparse24_pack(values, meta), n, k)
    if ctx.needs_input_grad[1]:
        d_values = _ops.sparse24_mask_mm(dy, x, meta)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        d_bias = dy.float().sum_to_size(dy.shape[-1]).to(ctx.bias_dtype)
    return dx, d_values, None, d_bias


def _decompress_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, meta, ctx.K = inputs
    ctx.save_for_backward(meta)


def _decompress_backward(ctx: Any, dw: Tensor) -> tuple[Any, ...]:
    (meta,) = ctx.saved_tensors
    return dw.gather(1, twin.positions(meta, ctx.K)), None, None


def _refuse_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("lissom::sparse24_compress: no gradient flows to a dense weight; pass w.detach()")


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        "lissom::sparse24_linear: double backward is not supported; drop create_graph=True, "
        "or multiply by sparse24_decompress(values, meta, K)"
    )


torch.library.register_autograd("lissom::sparse24_compress", _refuse_backward)
torch.library.register_autograd(
    "lissom::sparse24_decompress", _decompress_backward, setup_context=_decompress_setup
)
torch.library.register_autograd("lissom::sparse24_linear", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd(
    "lissom::sparse24_linear_values", _values_backward, setup_context=_values_setup
)
torch.library.register_autograd("lissom::sparse24_grad_input", _refuse_double_backward)
torch.library.register_autograd("lissom::sparse24_mask_mm", _refuse_double_backward)


# --- autocast: x is cast to the dtype that W was packed in


def _packed_dtype(packed: Tensor, n: int, k: int) -> torch.dtype | None:
    """None while tracing: Sparse24Linear has cast x already."""
    if is_fake(packed):
        return None
    if twin.own_target(packed.device, torch.bfloat16) == "cpu-v1":
        return twin._read_header("sparse24_linear", packed, n, k)
    sizes = {twin.packed_bytes(n, k, dtype, "sm80-v1"): dtype for dtype in twin.sm80.TYPES}
    return sizes.get(packed.numel())


def _autocast_linear(
    x: Tensor,
    packed: Tensor,
    N: int,
    K: int,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    with torch.amp.autocast(x.device.type, enabled=False):
        dtype = _packed_dtype(packed, N, K) or x.dtype
        x = x.to(dtype) if dtype.is_floating_point else x
        return _ops.sparse24_linear(x, packed, N, K, bias, act, residual, out_dtype=out_dtype)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("sparse24_linear", _autocast_linear, _key)
