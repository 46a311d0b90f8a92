# SPDX-License-Identifier: Apache-2.0
"""Weights of compressed-tensors' formats `sparse-24-bitmask` and `sparse-bitmask`.

Bit i of byte j of a row is set where column 8j+i is kept; `compressed` holds the kept values, row by row, in order
of column. In `sparse-24-bitmask` every aligned four columns keep exactly two, zeros included, and `compressed` is
`[N, K/2]`. In `sparse-bitmask` what is not zero is kept, `compressed` is flat, `row_offsets` says where each row
begins in it, and any tensor may be stored so, one-dimensional ones too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lissom import ops
from lissom.hf.checkpoint import VALUE_DTYPES, CheckpointError
from lissom.hf.foreign.canonical import Source, block_rows, canonical, pack_nibbles, told

STRUCTURED, PLAIN = "sparse-24-bitmask", "sparse-bitmask"
_MOST_DIMENSIONS = 8
# Four bits of the mask -> our nibble p0 | p1 << 2; 0 where they keep another number than two.
_NIBBLE = torch.zeros(16, dtype=torch.uint8)
_NIBBLE[[0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100]] = torch.tensor(
    [0x4, 0x8, 0x9, 0xC, 0xD, 0xE], dtype=torch.uint8
)
_COUNT = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
_QUAD_COUNT = np.array([max(_COUNT[byte & 15], _COUNT[byte >> 4]) for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class BitmaskWeight:
    """One tensor in a bitmask format.

    Args:
        name: of the dense tensor.
        size: the tensor `shape`, [dimensions] or [dimensions, 1] integers; it is read.
        compressed: the kept values.
        bitmask: uint8 [..., ceil(K/8)].
        offsets: the tensor `row_offsets`, if there is one.

    Raises:
        CheckpointError: types and shapes do not fit each other.
    """

    name: str
    size: Source
    compressed: Source
    bitmask: Source
    offsets: Source | None = None

    def __post_init__(self) -> None:
        shape = self._read_shape()
        rows, columns = math.prod(shape[:-1]), shape[-1]
        object.__setattr__(self, "shape", shape)
        if self.compressed.dtype not in VALUE_DTYPES:
            raise CheckpointError(
                f"{told(self.compressed)} must be one of {', '.join(VALUE_DTYPES)}, got {self.compressed.dtype}: "
                "sparse weights that are quantised as well are not read; convert the checkpoint before "
                "quantisation"
            )
        wanted = [*shape[:-1], (columns + 7) // 8]
        if self.bitmask.dtype != "U8" or list(self.bitmask.shape) != wanted:
            raise CheckpointError(
                f"{told(self.bitmask)} must be U8 {wanted} for a tensor of {list(shape)}, "
                f"got {self.bitmask.dtype} {list(self.bitmask.shape)}"
            )
        found = self.compressed.shape
        if len(found) == 2 and found != (rows, columns // 2):
            raise CheckpointError(
                f"{told(self.compressed)} must be [{rows}, {columns // 2}], half of {list(shape)}, "
                f"got {list(found)}"
            )
        if len(found) not in (1, 2) or math.prod(found) > rows * columns:
            raise CheckpointError(
                f"{told(self.compressed)} holds {list(found)} values, more than {list(shape)} has room for"
            )
        if self.offsets is not None and math.prod(self.offsets.shape) != rows:
            raise CheckpointError(
                f"{told(self.offsets)} must hold one offset for each of {rows} rows, "
                f"got {list(self.offsets.shape)}"
            )

    shape: tuple[int, ...] = ()

    @property
    def format(self) -> str:
        """Which of the two formats."""
        return STRUCTURED if len(self.compressed.shape) == 2 else PLAIN

    @property
    def dtype(self) -> str:
        """Type of the values, which conversion keeps."""
        return self.compressed.dtype

    @property
    def sources(self) -> tuple[Source, ...]:
        """The three or four stored tensors."""
        parts = (self.size, self.compressed, self.bitmask, self.offsets)
        return tuple(part for part in parts if part is not None)

    def obstacle(self) -> str | None:
        """Why the weight cannot be packed; reads the mask of `sparse-bitmask`.

        Returns:
            A reason, or None.

        Raises:
            CheckpointError: the mask keeps another number of values than are stored.
        """
        if len(self.shape) != 2:
            return f"it has {len(self.shape)} dimensions"
        if self.shape[1] % 4:
            return f"its {self.shape[1]} input features are not a multiple of 4"
        if self.format == STRUCTURED:
            return None
        bits = self._read_bits()
        for low in range(0, len(bits), step := block_rows(self.shape[1])):
            over = np.argwhere(_QUAD_COUNT[bits[low : low + step].numpy()] > 2)
            if len(over):
                row, byte = low + int(over[0, 0]), int(over[0, 1])
                last = min(8 * byte + 7, self.shape[1] - 1)
                return f"it is not 2:4 (row {row}, columns {8 * byte} to {last})"
        return None

    def packed(self) -> tuple[Tensor, Tensor]:
        """Values [N, K/2] and metadata [N, ceil(K/8)] of the canonical form, a block of rows at a time.

        Raises:
            CheckpointError: the mask is corrupt.
        """
        rows, columns = self.shape
        kept = self.compressed.read()
        meta = torch.empty(rows, (columns + 7) // 8, dtype=torch.uint8)
        if self.format == STRUCTURED:
            bits = self._read_bits(count=False)
            for low in range(0, rows, step := block_rows(columns)):
                part = slice(low, low + step)
                kept[part], meta[part] = canonical(kept[part], self._meta(bits[part], low))
            return kept, meta
        values = kept.new_empty(rows, columns // 2)
        for low, block in self._blocks(kept):
            part = slice(low, low + len(block))
            values[part], meta[part] = ops.sparse24_compress(block)
        return values, meta

    def dense(self) -> Iterator[Tensor]:
        """The dense tensor, a block of rows [rows, K] at a time.

        Raises:
            CheckpointError: the mask is corrupt.
        """
        for _, block in self._blocks(self.compressed.read()):
            yield block

    def _blocks(self, kept: Tensor) -> Iterator[tuple[int, Tensor]]:
        bits, columns = self._read_bits(), self.shape[-1]
        kept, at = kept.flatten(), 0
        for low in range(0, len(bits), step := block_rows(columns)):
            unpacked = np.unpackbits(bits[low : low + step].numpy(), axis=1, count=columns, bitorder="little")
            mask = torch.from_numpy(unpacked).bool()
            count = int(mask.sum())
            yield low, kept.new_zeros(mask.shape).masked_scatter_(mask, kept[at : at + count])
            at += count

    def _read_shape(self) -> tuple[int, ...]:
        if self.size.dtype not in ("I64", "I32") or not 1 <= math.prod(self.size.shape) <= _MOST_DIMENSIONS:
            raise CheckpointError(
                f"{told(self.size)} must hold the sizes of a tensor as I64, got {self.size.dtype} "
                f"{list(self.size.shape)}"
            )
        sizes = self.size.read().flatten().tolist()
        if min(sizes) < 1:
            raise CheckpointError(f"{told(self.size)} must hold positive sizes, got {sizes}")
        return tuple(sizes)

    def _read_bits(self, *, count: bool = True) -> Tensor:
        """The mask as [rows, ceil(K/8)], checked against the number of values and the offsets."""
        columns = self.shape[-1]
        bits = self.bitmask.read().reshape(-1, (columns + 7) // 8)
        spare = bits[:, -1] >> (columns - 1) % 8 + 1 if columns % 8 else torch.zeros(1)
        if spare.any():
            raise CheckpointError(
                f"{told(self.bitmask)} is corrupt: row {int(spare.nonzero()[0])} keeps columns behind the last, "
                f"{columns - 1}"
            )
        if count:
            self._check_counts(torch.cat([_counts(block) for block in bits.split(block_rows(columns))]))
        return bits

    def _check_counts(self, counts: Tensor) -> None:
        stored, kept = math.prod(self.compressed.shape), int(counts.sum())
        if kept != stored:
            raise CheckpointError(
                f"{told(self.bitmask)} keeps {kept} values, {told(self.compressed)} has {stored}: the file is "
                "damaged or its parts belong to different models"
            )
        if self.offsets is None:
            return
        found = self.offsets.read().flatten().to(torch.int64)
        by_row = counts.view(self.shape[:-1])
        wanted = (by_row.cumsum(0) - by_row).flatten()  # along the first dimension, as its writer did
        if not torch.equal(found, wanted):
            row = int((found != wanted).nonzero()[0])
            raise CheckpointError(
                f"{told(self.offsets)} is corrupt: row {row} begins at {int(wanted[row])}, not {int(found[row])}"
            )

    def _meta(self, bits: Tensor, first_row: int) -> Tensor:
        quads = torch.stack((bits & 15, bits >> 4), -1).flatten(1)[:, : self.shape[1] // 4]
        every = _NIBBLE[quads.long()]
        if not every.all():
            row, quad = (every == 0).nonzero()[0].tolist()
            raise CheckpointError(
                f"{told(self.bitmask)} is corrupt: row {first_row + row}, quad {quad} must keep two of four columns, "
                f"its bits are {int(quads[row, quad]):04b}"
            )
        return pack_nibbles(every)


def _counts(bits: Tensor) -> Tensor:
    """Bits that are set in each row; indexing takes eight bytes a byte, so not of a whole mask at once."""
    return torch.from_numpy(_COUNT[bits.numpy()].sum(1, dtype=np.int64))
