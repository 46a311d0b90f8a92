# SPDX-License-Identifier: Apache-2.0
"""To and from torch's own 2:4 tensors in the CUTLASS layout, `torch.sparse.SparseSemiStructuredTensorCUTLASS`.

They keep the same values in the same order; of the metadata only the order differs: 16-bit words of four quads, laid so
that one 32-bit word after the other is what the lanes of a warp take. Tensors of any device, no kernel involved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from lissom.ops.sparse24 import sparse24_compress, sparse24_decompress, sparse24_validate_meta

_TYPES = (torch.bfloat16, torch.float16)


def _check(op: str, values: Tensor) -> tuple[int, int]:
    if values.dtype not in _TYPES:
        raise TypeError(
            f"lissom::{op}: the CUTLASS layout holds 2:4 weights of bfloat16 and float16 here; got {values.dtype}"
            + (
                "; in float32 it keeps 1 of 2: take tensor.to_dense()"
                if values.dtype == torch.float32
                else ""
            )
        )
    if values.dim() != 2 or values.shape[0] % 32 or values.shape[1] % 16:
        raise ValueError(
            f"lissom::{op}: values must be [N, K/2] with N and K multiples of 32; got {list(values.shape)}"
        )
    return values.shape[0], values.shape[1] * 2


def sparse24_to_cutlass(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (packed, meta) that torch's CUTLASS kernels take, of a canonical form.

    Args:
        values: [N, K/2] bfloat16 or float16, N and K multiples of 32. meta: [N, K/8] uint8.

    Returns:
        packed, which is `values`, and int16 [N, K/16].

    Raises:
        TypeError: other dtypes. ValueError: other sizes, or corrupt metadata.

    >>> values, meta = sparse24_compress(torch.eye(32, dtype=torch.float16))
    >>> sparse24_to_cutlass(values, meta)[1].shape
    torch.Size([32, 2])
    """
    n, k = _check("sparse24_to_cutlass", values)
    sparse24_validate_meta(meta, k)
    words = meta.contiguous().view(torch.int16)
    # row = 32 R + 16 f + 8 b + g, column = 2 C + s: two rows' words lie side by side, then s, f, g, R, C
    order = words.reshape(n // 32, 2, 2, 8, k // 32, 2).permute(4, 0, 3, 1, 5, 2)
    return values, order.reshape(n, k // 16)


def sparse24_from_cutlass(packed: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Canonical form of a pair as torch's CUTLASS kernels take it: inverse of `sparse24_to_cutlass`.

    torch fills quads of fewer than two non-zeros by another rule; the form is made ours, so that equal weights stay
    equal bytes.

    Args:
        packed: [N, K/2] bfloat16 or float16, N and K multiples of 32. meta: int16 [N, K/16].

    Raises:
        TypeError: other dtypes. ValueError: other sizes, or corrupt metadata.

    >>> values, meta = sparse24_compress(torch.eye(32, dtype=torch.float16))
    >>> torch.equal(sparse24_from_cutlass(*sparse24_to_cutlass(values, meta))[1], meta)
    True
    """
    n, k = _check("sparse24_from_cutlass", packed)
    if meta.dtype != torch.int16 or tuple(meta.shape) != (n, k // 16):
        raise ValueError(
            f"lissom::sparse24_from_cutlass: meta must be int16 [N={n}, K/16={k // 16}]; "
            f"got {meta.dtype} {list(meta.shape)}"
        )
    order = meta.reshape(k // 32, n // 32, 8, 2, 2, 2).permute(1, 3, 5, 2, 0, 4)
    ours = order.reshape(n, k // 16).contiguous().view(torch.uint8)
    return sparse24_compress(sparse24_decompress(packed, ours, k))


def sparse24_to_torch(values: Tensor, meta: Tensor) -> SparseSemiStructuredTensorCUTLASS:
    """torch's 2:4 tensor [N, K] of a canonical form, to be put in place of a linear's weight on CUDA.

    >>> values, meta = sparse24_compress(torch.eye(64, dtype=torch.float16))
    >>> sparse24_to_torch(values, meta).shape
    torch.Size([64, 64])
    """
    packed, order = sparse24_to_cutlass(values, meta)
    shape = torch.Size((values.shape[0], values.shape[1] * 2))
    return SparseSemiStructuredTensorCUTLASS(shape, packed, order, None, None, None)


def sparse24_from_torch(tensor: SparseSemiStructuredTensorCUTLASS) -> tuple[Tensor, Tensor]:
    """Canonical form of torch's 2:4 tensor in the CUTLASS layout.

    A tensor of the cuSPARSELt layout keeps its metadata in a private order: take `tensor.to_dense()` and
    `sparse24_compress`.

    >>> values, meta = sparse24_compress(torch.eye(64, dtype=torch.float16))
    >>> torch.equal(sparse24_from_torch(sparse24_to_torch(values, meta))[0], values)
    True
    """
    if (
        not isinstance(tensor, SparseSemiStructuredTensorCUTLASS)
        or tensor.packed is None
        or tensor.meta is None
    ):
        raise TypeError(
            "lissom::sparse24_from_torch: wanted a SparseSemiStructuredTensorCUTLASS that is not transposed; "
            f"got {type(tensor).__name__}; take its to_dense() and sparse24_compress"
        )
    return sparse24_from_cutlass(tensor.packed, tensor.meta)
