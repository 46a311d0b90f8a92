# SPDX-License-Identifier: Apache-2.0
"""The last step of every foreign decoder: positions and values of kept weights in the one form that lissom stores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from lissom import ops
from lissom.reference.sparse24 import LEGAL_NIBBLES, nibbles

# Dense elements that are decoded at a time: what a decoder needs beside its input and output stays below 100 MB.
BLOCK_ELEMENTS = 4 << 20

_LEGAL = torch.zeros(16, dtype=torch.bool)
_LEGAL[list(LEGAL_NIBBLES)] = True


class Source(Protocol):
    """A tensor that can be looked at before it is read: `lissom.models.shards.Stored` is one."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> Tensor:
        """Its values, in memory that the reader may write to."""


def told(source: Source) -> str:
    """A tensor as messages name it: with its file, where it has one."""
    file = getattr(source, "file", None)
    return source.name if file is None else f"{source.name} in {file}"


class Foreign(Protocol):
    """One weight of a foreign checkpoint."""

    @property
    def name(self) -> str:
        """Of the dense tensor that it stands for."""

    @property
    def format(self) -> str:
        """How it is stored, such as "sparse-24-bitmask"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense tensor."""

    @property
    def dtype(self) -> str:
        """Of the dense tensor, as safetensors headers spell it."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What it is made of."""

    def obstacle(self) -> str | None:
        """Why it cannot be packed; None if it can."""

    def packed(self) -> tuple[Tensor, Tensor]:
        """Values [N, K/2] and metadata [N, ceil(K/8)] of the canonical form."""

    def dense(self) -> Iterator[Tensor]:
        """The dense tensor, a block of rows [rows, K] at a time."""


def block_rows(columns: int, multiple: int = 1) -> int:
    """Rows of a matrix that are decoded at a time.

    Args:
        columns: dense columns of the matrix.
        multiple: the rows come in groups of so many.

    Example:
        >>> block_rows(4096), block_rows(3000, 64)
        (1024, 1344)
    """
    return max(1, BLOCK_ELEMENTS // max(columns, 1) // multiple) * multiple


def first_illegal(meta: Tensor, columns: int) -> tuple[int, int, int] | None:
    """The first nibble that names no two positions.

    Args:
        meta: uint8 [rows, ceil(columns/8)], even quad in the low nibble.
        columns: dense columns.

    Returns:
        Row, quad and nibble, or None.

    Example:
        >>> first_illegal(torch.tensor([[0x4E, 0x04]], dtype=torch.uint8), 12)
        >>> first_illegal(torch.tensor([[0x4E, 0x05]], dtype=torch.uint8), 12)
        (0, 2, 5)
    """
    every = nibbles(meta, columns)
    bad = ~_LEGAL[every.long()]
    if not bad.any():
        return None
    row, quad = bad.nonzero()[0].tolist()
    return row, quad, int(every[row, quad])


def canonical(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """The unique form of kept weights, whichever positions their writer filled up with zeros.

    Args:
        values: [rows, K/2], in order of position within each quad.
        meta: uint8 [rows, ceil(K/8)] with legal nibbles only.

    Returns:
        The same weights as `sparse24_compress` would store them.

    Example:
        >>> values, meta = canonical(torch.tensor([[0.0, 7.0]]), torch.tensor([[0x4]], dtype=torch.uint8))
        >>> values.tolist(), hex(int(meta))
        ([[7.0, 0.0]], '0xd')
    """
    quads = values.unflatten(1, (-1, 2))
    loose = (quads == 0).any(-1)  # only a zero leaves a choice
    if not loose.any():
        return values, meta
    columns = values.shape[1] * 2
    every = nibbles(meta, columns)
    chosen = every[loose].long()
    dense = values.new_zeros(len(chosen), 4)
    dense.scatter_(1, torch.stack((chosen & 3, chosen >> 2), 1), quads[loose])
    kept, positions = ops.sparse24_compress(dense)
    quads, every = quads.clone(), every.clone()
    quads[loose], every[loose] = kept, positions[:, 0]
    return quads.flatten(1), pack_nibbles(every)


def pack_nibbles(every: Tensor) -> Tensor:
    """Two nibbles to a byte.

    Args:
        every: uint8 [rows, K/4].

    Returns:
        uint8 [rows, ceil(K/8)].

    Example:
        >>> [hex(byte) for byte in pack_nibbles(torch.tensor([[4, 9, 14]], dtype=torch.uint8))[0].tolist()]
        ['0x94', '0xe']
    """
    if every.shape[1] % 2:
        every = torch.cat((every, every.new_zeros(len(every), 1)), 1)
    return every[:, 0::2] | every[:, 1::2] << 4
