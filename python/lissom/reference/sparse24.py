# SPDX-License-Identifier: Apache-2.0
"""Torch twins of the sparse24 operators; the layout is drawn in csrc/sparse24/layout.h.

Registered for every device that has no kernel of its own. Values are moved as they are, products accumulate in float32.
int8 (`sparse24_linear_int8`, `sparse24_quantize_rows`) has its products in sparse24_int8.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lissom.reference import sparse24_sm80 as sm80

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (*DTYPES, torch.int8)  # in the order of the C++ enum
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
LEGAL_NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
TARGETS = ("cpu-v1", "sm80-v1")
PANEL_ROWS, RECORD_COLUMNS, HEADER_BYTES, META_BYTES = 16, 32, 64, 64  # of cpu-v1
MOST_INT8_COLUMNS = 262140  # K/2 products of at most 128 * 128 then fit int32

# Which nibble stores a quad whose non-zero positions are the bits of the index (more than two: not 2:4).
_NIBBLE_OF = (0xE, 0xC, 0xD, 0x4, 0xE, 0x8, 0x9, 0, 0xE, 0xC, 0xD, 0, 0xE, 0, 0, 0)


def meta_columns(k: int) -> int:
    """Bytes of metadata a row."""
    return (k + 7) // 8


def packed_bytes(n: int, k: int, dtype: torch.dtype, target: str = "cpu-v1") -> int:
    """Size of a packed form of W [n, k]; no two targets or 16-bit types have the same."""
    if target == "sm80-v1":
        return sm80.packed_bytes(n, k, dtype)
    record = META_BYTES + PANEL_ROWS * RECORD_COLUMNS // 2 * dtype.itemsize
    row_sums = 4 * PANEL_ROWS if dtype == torch.int8 else 0
    return HEADER_BYTES + -(-n // PANEL_ROWS) * (row_sums + -(-k // RECORD_COLUMNS) * record)


@functools.cache
def _has_cuda_kernels() -> bool:
    from lissom import build_info

    return build_info()["cuda"] is not None


def own_target(device: torch.device, dtype: torch.dtype) -> str | None:
    """The packed form that the kernels of a device take, None where they take only the canonical one."""
    if device.type != "cuda" or not _has_cuda_kernels():
        return "cpu-v1"
    return None if dtype == torch.float32 else "sm80-v1"


def one_device(op: str, **tensors: Tensor | None) -> None:
    """Tensors on several devices are dispatched to a twin or a fake kernel, never to a native one: refuse them here."""
    found = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(found.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise RuntimeError(f"lissom::{op}: all tensors must be on one device; got {where}")


def _check_dense(op: str, w: Tensor) -> None:
    if w.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"lissom::{op}: w must be float32, bfloat16, float16 or int8; got {w.dtype}")
    if w.dim() != 2 or w.shape[1] % 4:
        raise ValueError(f"lissom::{op}: w must be [N, K] with K a multiple of 4; got {list(w.shape)}")


def _check_canonical(op: str, values: Tensor, meta: Tensor, k: int | None = None) -> tuple[int, int]:
    """(N, K) of a canonical form; K from the values where it is not given."""
    one_device(op, values=values, meta=meta)
    if k is None:
        k = values.shape[1] * 2 if values.dim() == 2 else 0
    if values.dtype not in WEIGHT_DTYPES or meta.dtype != torch.uint8:
        raise TypeError(
            f"lissom::{op}: values must be float32, bfloat16, float16 or int8 and meta uint8; "
            f"got {values.dtype} and {meta.dtype}"
        )
    if values.dim() != 2 or values.shape[1] * 2 != k or k % 4:
        raise ValueError(
            f"lissom::{op}: values must be [N, K/2] with K a multiple of 4; got {list(values.shape)} and K={k}"
        )
    if meta.shape != (values.shape[0], meta_columns(k)):
        raise ValueError(
            f"lissom::{op}: meta must be [N, ceil(K/8)={meta_columns(k)}] with N={values.shape[0]}; "
            f"got {list(meta.shape)}"
        )
    return values.shape[0], k


def _quad_counts(w: Tensor) -> Tensor:
    return (w.unflatten(1, (-1, 4)) != 0).sum(-1)


def _verdict(bad: Tensor) -> Tensor:
    """[ok, first bad row, first bad quad] of a boolean [N, Q]."""
    where = bad.nonzero()
    answer = [1, -1, -1] if where.numel() == 0 else [0, *where[0].tolist()]
    return torch.tensor(answer, dtype=torch.int64, device=bad.device)


def check(w: Tensor) -> Tensor:
    """Twin of `sparse24_check`."""
    _check_dense("sparse24_check", w)
    return _verdict(_quad_counts(w) > 2)


def nibbles(meta: Tensor, k: int) -> Tensor:
    """Metadata bytes [N, ceil(K/8)] as one nibble a quad, uint8 [N, K/4]."""
    both = torch.stack((meta & 15, meta >> 4), -1)
    return both.flatten(1)[:, : k // 4]


def _check_meta_shape(meta: Tensor, k: int) -> None:
    if meta.dtype != torch.uint8:
        raise TypeError(f"lissom::sparse24_check_meta: meta must be uint8; got {meta.dtype}")
    if k < 0 or k % 4 or meta.dim() != 2 or meta.shape[1] != meta_columns(k):
        raise ValueError(
            f"lissom::sparse24_check_meta: meta must be [N, ceil(K/8)] with K a multiple of 4; "
            f"got {list(meta.shape)} and K={k}"
        )


def check_meta(meta: Tensor, k: int) -> Tensor:
    """Twin of `sparse24_check_meta`."""
    _check_meta_shape(meta, k)
    every = torch.stack((meta & 15, meta >> 4), -1).flatten(1)
    bad = ~torch.isin(every, torch.tensor(LEGAL_NIBBLES, dtype=torch.uint8, device=meta.device))
    bad[:, k // 4 :] = every[:, k // 4 :] != 0
    return _verdict(bad)


def _require_legal(op: str, meta: Tensor, k: int) -> None:
    if meta.is_meta:
        return
    ok, row, quad = check_meta(meta, k).tolist()
    if not ok:
        raise ValueError(f"lissom::{op}: corrupt metadata: row {row}, quad {quad}")


def _check_pattern(pattern: str) -> None:
    if pattern not in ("auto", "magnitude"):
        raise ValueError(f'lissom::sparse24_compress: pattern must be "auto" or "magnitude"; got {pattern!r}')


def compress(w: Tensor, *, pattern: str = "auto") -> tuple[Tensor, Tensor]:
    """Twin of `sparse24_compress`."""
    _check_dense("sparse24_compress", w)
    _check_pattern(pattern)
    n, k = w.shape
    quads = w.unflatten(1, (-1, 4))
    nonzero = quads != 0
    too_many = nonzero.sum(-1) > 2
    if pattern == "auto" and bool(too_many.any()):
        row, quad = too_many.nonzero()[0].tolist()
        found = int(nonzero[row, quad].sum())
        raise ValueError(
            f"lissom::sparse24_compress: w is not 2:4 sparse: row {row}, quad {quad} has {found} non-zeros, "
            'at most 2 are allowed; prune it first or pass pattern="magnitude"'
        )
    # Magnitudes compare as bit patterns without the sign: NaN ranks above infinity. Integers have one of their own.
    as_bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[w.itemsize]
    bits = quads.contiguous().view(as_bits)
    size = bits.short().abs() if w.dtype == torch.int8 else bits & torch.iinfo(as_bits).max
    top = size.argsort(dim=-1, descending=True, stable=True)[..., :2]
    nonzero = torch.where(too_many[..., None], torch.zeros_like(nonzero).scatter_(-1, top, True), nonzero)
    weights = torch.tensor([1, 2, 4, 8], device=w.device)
    code = torch.tensor(_NIBBLE_OF, device=w.device)[(nonzero * weights).sum(-1)]
    kept = torch.stack((code & 3, code >> 2), -1)
    values = bits.gather(-1, kept)  # torch.where on 16-bit floats would change the bits of NaN
    values = torch.where(size.gather(-1, kept) == 0, 0, values).view(w.dtype)
    code = F.pad(code, (0, code.shape[1] % 2))
    meta = (code[:, ::2] | code[:, 1::2] << 4).to(torch.uint8)
    return values.reshape(n, k // 2), meta.reshape(n, meta_columns(k))


def positions(meta: Tensor, k: int) -> Tensor:
    """Column of every kept value, int64 [N, K/2]."""
    code = nibbles(meta, k).long()
    kept = torch.stack((code & 3, code >> 2), -1)
    return (kept + 4 * torch.arange(k // 4, device=meta.device)[:, None]).flatten(1)


def decompress(values: Tensor, meta: Tensor, k: int) -> Tensor:
    """Twin of `sparse24_decompress`."""
    _check_canonical("sparse24_decompress", values, meta, k)
    _require_legal("sparse24_decompress", meta, k)
    return torch.zeros(values.shape[0], k, dtype=values.dtype, device=values.device).scatter_(
        1, positions(meta, k), values
    )


def header(n: int, k: int, dtype: torch.dtype, magic: bytes = b"LISSOM24", size: int = HEADER_BYTES) -> bytes:
    """What a packed form begins with."""
    fields = magic + (1).to_bytes(4, "little") + WEIGHT_DTYPES.index(dtype).to_bytes(4, "little")
    return (fields + n.to_bytes(8, "little") + k.to_bytes(8, "little")).ljust(size, b"\0")


def resolve_target(op: str, target: str | None, device: torch.device, dtype: torch.dtype | None) -> str:
    """`target`, or the device's own."""
    if target is None:
        target = own_target(device, dtype or torch.bfloat16) or "sm80-v1"
    if target not in TARGETS:
        raise ValueError(f'lissom::{op}: target must be "cpu-v1" or "sm80-v1"; got "{target}"')
    if target == "sm80-v1" and dtype == torch.float32:
        raise TypeError(
            f"lissom::{op}: sm80-v1 holds bfloat16, float16 and int8; got float32; cast the weight"
        )
    return target


def require_int8_columns(op: str, dtype: torch.dtype, k: int) -> None:
    """What an int8 weight can be, so that no sum leaves int32."""
    if dtype == torch.int8 and k > MOST_INT8_COLUMNS:
        raise ValueError(f"lissom::{op}: an int8 weight may have K={MOST_INT8_COLUMNS} at most; got K={k}")


def pack(values: Tensor, meta: Tensor, target: str | None = None) -> Tensor:
    """Twin of `sparse24_pack`."""
    target = resolve_target("sparse24_pack", target, values.device, values.dtype)
    n, k = _check_canonical("sparse24_pack", values, meta)
    require_int8_columns("sparse24_pack", values.dtype, k)
    _require_legal("sparse24_pack", meta, k)
    if target == "sm80-v1":
        return sm80.pack(values, nibbles(meta, k), header(n, k, values.dtype, sm80.MAGIC, sm80.HEADER_BYTES))
    dtype, device = values.dtype, values.device
    panels, records = -(-n // PANEL_ROWS), -(-k // RECORD_COLUMNS)
    code = torch.full((panels * PANEL_ROWS, records * 8), 0xE, dtype=torch.uint8, device=device)
    code[:n, : k // 4] = nibbles(meta, k)
    words = code[:, ::2] | code[:, 1::2] << 4  # little-endian bytes of the 32-bit words
    words = words.reshape(panels, PANEL_ROWS, records, 4).transpose(1, 2).reshape(panels, records, META_BYTES)
    full = torch.zeros(panels * PANEL_ROWS, records * 16, dtype=dtype, device=device)
    full[:n, : k // 2] = values
    kept = full.reshape(panels, PANEL_ROWS, records, *_vectors(dtype)).permute(0, 2, 3, 1, 4)  # lane = row
    if dtype == torch.float32:  # one vector a slot
        kept = kept.transpose(-1, -2)
    value_bytes = PANEL_ROWS * RECORD_COLUMNS // 2 * dtype.itemsize
    lanes = kept.contiguous().view(torch.uint8).reshape(panels, records, value_bytes)
    body = torch.cat((words, lanes), -1).flatten(1)
    if dtype == torch.int8:
        sums = full.sum(-1, dtype=torch.int32).reshape(panels, PANEL_ROWS)
        body = torch.cat((sums.view(torch.uint8), body), -1)
    head = torch.tensor(list(header(n, k, dtype)), dtype=torch.uint8, device=device)
    return torch.cat((head, body.flatten()))


def _vectors(dtype: torch.dtype) -> tuple[int, int]:
    """How the 16 values of a row lie in a record: vectors, and values in the lane of each; float32 before its swap."""
    return (4, 4) if dtype == torch.int8 else (8, 2)


def check_packed_size(
    op: str, packed: Tensor, n: int, k: int, dtype: torch.dtype, target: str | None = None
) -> None:
    """What can be said of a packed weight without reading its header; on the meta device any target's size is right."""
    targets = (target,) if target else TARGETS if packed.is_meta else (own_target(packed.device, dtype),)
    sizes = [packed_bytes(n, k, dtype, name) for name in targets if name and sm80.holds(name, dtype)]
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.shape[0] not in sizes:
        raise RuntimeError(
            f"lissom::{op}: packed must be the uint8 vector of {' or '.join(map(str, sizes))} bytes that sparse24_pack "
            f"returned for N={n}, K={k}, {dtype}; got {packed.dtype} {list(packed.shape)}"
        )


def _read_header(op: str, packed: Tensor, n: int, k: int, target: str = "cpu-v1") -> torch.dtype:
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < HEADER_BYTES:
        raise RuntimeError(
            f"lissom::{op}: packed must be the uint8 vector that sparse24_pack returned; "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    head = bytes(packed[:HEADER_BYTES].tolist())
    index = int.from_bytes(head[12:16], "little")
    magic = b"LISSOM24" if target == "cpu-v1" else sm80.MAGIC
    if head[:8] != magic or head[8:12] != (1).to_bytes(4, "little") or index >= len(WEIGHT_DTYPES):
        raise RuntimeError(
            f"lissom::{op}: packed has no {target} header; pack the weight again with sparse24_pack"
        )
    found = int.from_bytes(head[16:24], "little"), int.from_bytes(head[24:32], "little")
    if found != (n, k):
        raise RuntimeError(
            f"lissom::{op}: packed holds a weight of N={found[0]}, K={found[1]}; got N={n}, K={k}"
        )
    dtype = WEIGHT_DTYPES[index]
    if packed.numel() != packed_bytes(n, k, dtype, target):
        raise RuntimeError(
            f"lissom::{op}: packed is damaged: {packed.numel()} bytes for N={n}, K={k}, {dtype}"
        )
    return dtype


def unpack(
    packed: Tensor, n: int, k: int, target: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of `sparse24_unpack`."""
    target = resolve_target("sparse24_unpack", target, packed.device, dtype)
    held = _read_header("sparse24_unpack", packed, n, k, target)
    if dtype not in (None, held):
        raise TypeError(f"lissom::sparse24_unpack: packed holds {held}; got dtype={dtype}")
    if target == "sm80-v1":
        return sm80.unpack(packed, n, k, held)
    panels, records = -(-n // PANEL_ROWS), -(-k // RECORD_COLUMNS)
    head, record = (
        4 * PANEL_ROWS if held == torch.int8 else 0,
        META_BYTES + PANEL_ROWS * RECORD_COLUMNS // 2 * held.itemsize,
    )
    body = packed[HEADER_BYTES:].reshape(panels, head + records * record)
    body = body[:, head:].reshape(panels, records, record)
    words = body[..., :META_BYTES].reshape(panels, records, PANEL_ROWS, 4).transpose(1, 2)
    meta = words.reshape(panels * PANEL_ROWS, records * 4)[:n, : meta_columns(k)].clone()
    if k % 8:
        meta[:, -1] &= 15
    values = body[..., META_BYTES:].contiguous().view(held)
    vectors, each = _vectors(held)
    if held == torch.float32:
        values = values.reshape(panels, records, vectors, each, PANEL_ROWS).transpose(-1, -2)
    else:
        values = values.reshape(panels, records, vectors, PANEL_ROWS, each)
    values = values.permute(0, 3, 1, 2, 4).reshape(panels * PANEL_ROWS, records * 16)[:n, : k // 2]
    return values.contiguous(), meta


def activate(y: Tensor, act: str, op: str = "sparse24_linear") -> Tensor:
    """The epilogue's activation by name."""
    if act == "none":
        return y
    if act == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if act not in ACTIVATIONS:
        raise ValueError(f"lissom::{op}: act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    return functions[act](y)


def linear(
    x: Tensor,
    packed: Tensor,
    n: int,
    k: int,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Twin of `sparse24_linear`."""
    one_device("sparse24_linear", x=x, packed=packed, bias=bias, residual=residual)
    dtype = _read_header("sparse24_linear", packed, n, k)
    if dtype == torch.int8:
        raise TypeError("lissom::sparse24_linear: packed holds int8: call sparse24_linear_int8")
    out = linear_checks(x, n, k, bias, act, residual, out_dtype)
    if x.dtype != dtype:
        raise TypeError(f"lissom::sparse24_linear: x is {x.dtype} and the packed weight {dtype}; cast x")
    values, meta = unpack(packed, n, k)
    y = x.float() @ decompress(values, meta, k).float().t()
    if bias is not None:
        y = y + bias.float()
    y = activate(y, act)
    if residual is not None:
        y = y + residual.float()
    return y.to(out)


def linear_checks(
    x: Tensor,
    n: int,
    k: int,
    bias: Tensor | None,
    act: str,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """What `sparse24_linear` rejects by shape and dtype alone; returns the dtype of y."""
    op = "lissom::sparse24_linear"
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16; got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"{op}: x must be [..., K={k}]; got {list(x.shape)}")
    out = out_dtype or x.dtype
    if out not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: out_dtype must be float32 or x's dtype {x.dtype}; got {out}")
    _check_terms(op, (*x.shape[:-1], n), bias, act, residual, x.dtype, out)
    return out


def _check_terms(
    op: str,
    shape: tuple[int, ...],
    bias: Tensor | None,
    act: str,
    residual: Tensor | None,
    *dtypes: torch.dtype,
) -> None:
    """bias [N] in dtypes[0] or float32, residual like y: `shape`, dtypes[1]."""
    if bias is not None and tuple(bias.shape) != shape[-1:]:
        raise ValueError(f"{op}: bias must be [N={shape[-1]}]; got {list(bias.shape)}")
    if bias is not None and bias.dtype not in (dtypes[0], torch.float32):
        raise TypeError(f"{op}: bias must be float32 or {dtypes[0]}; got {bias.dtype}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"{op}: residual must have y's shape {list(shape)}; got {list(residual.shape)}")
    if residual is not None and residual.dtype != dtypes[1]:
        raise TypeError(f"{op}: residual must have y's dtype {dtypes[1]}; got {residual.dtype}")
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")


def check_linear_values(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """(N, K) of a `sparse24_linear_values`, or what it rejects by shape, device and dtype alone."""
    n, k = _check_canonical("sparse24_linear_values", values, meta)
    one_device("sparse24_linear_values", x=x, values=values, bias=bias)
    if values.dtype not in DTYPES:
        raise TypeError(
            f"lissom::sparse24_linear_values: values must be float32, bfloat16 or float16; got {values.dtype}"
        )
    linear_checks(x, n, k, bias, "none", None, None)
    return n, k


def linear_values(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """Twin of `sparse24_linear_values`."""
    n, k = check_linear_values(x, values, meta, bias)
    return linear(x, pack(values, meta), n, k, bias)


def check_dy(dy: Tensor, packed: Tensor, n: int) -> None:
    """What `sparse24_grad_input` rejects by shape, device and dtype of dy alone."""
    one_device("sparse24_grad_input", dy=dy, packed=packed)
    if dy.dim() < 1 or dy.shape[-1] != n:
        raise ValueError(f"lissom::sparse24_grad_input: dy must be [..., N={n}]; got {list(dy.shape)}")
    if dy.dtype not in DTYPES:
        raise TypeError(
            f"lissom::sparse24_grad_input: dy must be float32, bfloat16 or float16; got {dy.dtype}"
        )


def grad_input(dy: Tensor, packed: Tensor, n: int, k: int) -> Tensor:
    """Twin of `sparse24_grad_input`."""
    check_dy(dy, packed, n)
    values, meta = unpack(packed, n, k)
    if dy.dtype != values.dtype:
        raise TypeError(f"lissom::sparse24_grad_input: dy is {dy.dtype} and the packed weight {values.dtype}")
    return (dy.float() @ decompress(values, meta, k).float()).to(dy.dtype)


def check_mask_mm(dy: Tensor, x: Tensor, meta: Tensor) -> tuple[int, int]:
    """(N, K) of a `sparse24_mask_mm`, or what it rejects by shape, device and dtype alone."""
    one_device("sparse24_mask_mm", dy=dy, x=x, meta=meta)
    if dy.dtype != x.dtype or x.dtype not in DTYPES or meta.dtype != torch.uint8:
        raise TypeError(
            "lissom::sparse24_mask_mm: dy and x must have one dtype (float32, bfloat16 or float16) and meta uint8; "
            f"got {dy.dtype}, {x.dtype} and {meta.dtype}"
        )
    n, k = (dy.shape[-1], x.shape[-1]) if dy.dim() and x.dim() else (0, 1)
    if dy.shape[:-1] != x.shape[:-1] or k % 4 or tuple(meta.shape) != (n, meta_columns(k)):
        raise ValueError(
            "lissom::sparse24_mask_mm: wanted dy [..., N], x [..., K] and meta [N, ceil(K/8)]; "
            f"got {list(dy.shape)}, {list(x.shape)} and {list(meta.shape)}"
        )
    return n, k


def mask_mm(dy: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    """Twin of `sparse24_mask_mm`."""
    n, k = check_mask_mm(dy, x, meta)
    _require_legal("sparse24_mask_mm", meta, k)
    m = dy.shape[:-1].numel()
    dense = dy.reshape(m, n).float().t() @ x.reshape(m, k).float()
    return dense.gather(1, positions(meta, k)).to(x.dtype)
