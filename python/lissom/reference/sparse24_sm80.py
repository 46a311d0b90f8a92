# SPDX-License-Identifier: Apache-2.0
"""The packed form "sm80-v1" of a 2:4 weight in torch, as csrc/sparse24/layout.h draws it; 16-bit types and int8."""

from __future__ import annotations

import torch
from torch import Tensor

MAGIC = b"LISSOM80"
PANEL_ROWS, HEADER_BYTES, FRAGMENT_BYTES = 32, 128, 512
TYPES = (torch.bfloat16, torch.float16, torch.int8)


def holds(target: str, dtype: torch.dtype) -> bool:
    """Whether a target has a form for a dtype."""
    return target != "sm80-v1" or dtype in TYPES


def _blocks(n: int, k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Panels, records a panel and bytes of metadata a record, which holds 64 bytes of a dense row."""
    columns = 64 // dtype.itemsize
    return -(-n // PANEL_ROWS), -(-k // (2 * columns)) * 2, 256 // dtype.itemsize


def packed_bytes(n: int, k: int, dtype: torch.dtype) -> int:
    """The length also tells the type: bfloat16 has 16 bytes at the end, float16 32, int8 48."""
    panels, records, meta_bytes = _blocks(n, k, dtype)
    record = meta_bytes + 2 * FRAGMENT_BYTES
    return HEADER_BYTES + panels * records * record + 16 * (1 + TYPES.index(dtype))


def pack(values: Tensor, code: Tensor, header: bytes) -> Tensor:
    """values [N, K/2], code uint8 [N, K/4] (one nibble each), header of 128 bytes.

    >>> pack(torch.ones(1, 2).half(), torch.tensor([[0xE]], dtype=torch.uint8), bytes(128)).shape
    torch.Size([2464])
    """
    (n, quads), size = code.shape, values.element_size()
    panels, records, meta_bytes = _blocks(n, 4 * quads, values.dtype)
    full_code = torch.full((panels * 32, records * 16 // size), 0xE, dtype=torch.uint8, device=code.device)
    full_code[:n, :quads] = code
    both = full_code[:, ::2] | full_code[:, 1::2] << 4  # bytes of two quads
    # rows are (fragment, half, g), bytes (record, s, byte)
    if size == 2:  # a word is lane 4 g + 2 fragment + s, rows g and g + 8
        words = both.reshape(panels, 2, 2, 8, records, 2, 2).permute(0, 4, 3, 1, 5, 2, 6)
    else:  # a word is lane 4 g + 2 s + half of its fragment
        words = both.reshape(panels, 2, 2, 8, records, 2, 4).permute(0, 4, 1, 3, 5, 2, 6)
    full = torch.zeros(panels * 32, records * 32 // size, dtype=values.dtype, device=values.device)
    full[:n, : 2 * quads] = values
    # columns are (record, upper half of the step, t, place); a lane is 4 g + t, its registers (upper half, row half)
    lanes = full.reshape(panels, 2, 2, 8, records, 2, 4, 4 // size).permute(0, 4, 1, 3, 6, 5, 2, 7)
    kept = lanes.contiguous().view(torch.uint8).reshape(panels, records, 2 * FRAGMENT_BYTES)
    body = torch.cat((words.reshape(panels, records, meta_bytes), kept), -1)
    head = torch.tensor(list(header), dtype=torch.uint8, device=values.device)
    return torch.cat((head, body.flatten(), head.new_zeros(16 * (1 + TYPES.index(values.dtype)))))


def unpack(packed: Tensor, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The canonical form (values, meta) of a packed one that has been checked."""
    (panels, records, meta_bytes), size = _blocks(n, k, dtype), dtype.itemsize
    record = meta_bytes + 2 * FRAGMENT_BYTES
    body = packed[HEADER_BYTES : HEADER_BYTES + panels * records * record].reshape(panels, records, record)
    if size == 2:
        words = body[..., :meta_bytes].reshape(panels, records, 8, 2, 2, 2, 2).permute(0, 3, 5, 2, 1, 4, 6)
    else:
        words = body[..., :meta_bytes].reshape(panels, records, 2, 8, 2, 2, 4).permute(0, 2, 5, 3, 1, 4, 6)
    meta = words.reshape(panels * 32, records * 8 // size)[:n, : (k + 7) // 8].clone()
    if k % 8:
        meta[:, -1] &= 15
    lanes = body[..., meta_bytes:].contiguous().view(dtype)
    lanes = lanes.reshape(panels, records, 2, 8, 4, 2, 2, 4 // size).permute(0, 2, 6, 3, 1, 5, 4, 7)
    values = lanes.reshape(panels * 32, records * 32 // size)
    return values[:n, : k // 2].contiguous(), meta
