# SPDX-License-Identifier: Apache-2.0
"""Weights of marlin-24: 2:4 and 4 or 8 bit integers at once, laid out for one GPU kernel.

The integers of a weight W [N, K] are q = W / s, with one scale s for each output row and group of inputs. The kept
ones, u = q + 2^(bits-1), form C [K/2, N] and are stored as int32 words [K/32, N*bits/2], metadata as int16 words in
[K/32, 2N], scales as [groups, N]. Each layout only renames bits of the row n and of the position k in C:

    words     n = 64 c + 8 i + 4 b + j       k = 16 t + 8 h + 2 l + e
              4 bits: word (t, c, i, l, j), nibble number e b h (three bits, e the highest)
              8 bits: word (t, c, i, l, j, b), byte number e h
    metadata  row r = 64 c + 8 i + 4 x + 2 y + z, words of 16 columns 2 t + w: word (t, c, y, i, z, w, x)
    scales    n = 8 i + 4 x + y: place (i, y, x), where there are several groups
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lissom import ops
from lissom.hf.checkpoint import VALUE_DTYPES, CheckpointError
from lissom.hf.foreign.canonical import Source, block_rows, canonical, first_illegal, told
from lissom.models.shards import DTYPES

FORMAT = "marlin-24"
BITS = (4, 8)
_CHUNK = 64  # output rows that the layout keeps together


@dataclass(frozen=True)
class Marlin24Weight:
    """One quantised 2:4 weight.

    Args:
        name: of the dense tensor.
        words: I32 [K/32, N*bits/2], the integers.
        meta: I16 [K/32, 2N] or [N, K/16], the positions.
        scales: float [groups, N].
        dtype: of the dense tensor, as safetensors headers spell it.
        plain_scales: the scales are in order of rows, though there are several groups.

    Raises:
        CheckpointError: types and shapes do not fit each other.
    """

    name: str
    words: Source
    meta: Source
    scales: Source
    dtype: str = "F16"
    plain_scales: bool = False
    shape: tuple[int, ...] = ()
    bits: int = 0

    def __post_init__(self) -> None:
        for part, types in ((self.words, ("I32",)), (self.meta, ("I16",)), (self.scales, VALUE_DTYPES)):
            if part.dtype not in types or len(part.shape) != 2 or 0 in part.shape:
                raise CheckpointError(
                    f"{told(part)} must be a matrix of {' or '.join(types)}, got {part.dtype} {list(part.shape)}"
                )
        tiles, width = self.words.shape
        groups, rows = self.scales.shape
        columns = 32 * tiles
        bits = next((bits for bits in BITS if 2 * width == bits * rows), None)
        if rows % _CHUNK or bits is None:
            raise CheckpointError(
                f"{told(self.words)} {list(self.words.shape)} beside {told(self.scales)} {list(self.scales.shape)}: "
                f"N = {rows} rows must be a multiple of {_CHUNK} and the words [K/32, 2N] for 4 bits, [K/32, 4N] for "
                "8; the two belong to different weights, or this is another format"
            )
        if self.meta.shape not in ((tiles, 2 * rows), (rows, 2 * tiles)):
            raise CheckpointError(
                f"{told(self.meta)} must be [{tiles}, {2 * rows}] or [{rows}, {2 * tiles}] for a weight "
                f"[{rows}, {columns}], got {list(self.meta.shape)}"
            )
        if columns % groups or columns // groups % 4:
            raise CheckpointError(
                f"{told(self.scales)} has {groups} groups for {columns} inputs: a group must be a whole number of "
                "quads (four inputs)"
            )
        object.__setattr__(self, "shape", (rows, columns))
        object.__setattr__(self, "bits", bits)

    @property
    def format(self) -> str:
        """How it is stored, with bits and group size."""
        return f"{FORMAT} int{self.bits}, {f'groups of {self.group}' if self.groups > 1 else 'by row'}"

    @property
    def groups(self) -> int:
        """Scales a row."""
        return self.scales.shape[0]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.groups

    @property
    def sources(self) -> tuple[Source, ...]:
        """The three stored tensors."""
        return self.words, self.meta, self.scales

    def obstacle(self) -> str | None:
        """None: the format has nothing but 2:4 weights."""
        return None

    def packed(self) -> tuple[Tensor, Tensor]:
        """Values [N, K/2] and metadata [N, K/8] of the canonical form, a block of rows at a time.

        Raises:
            CheckpointError: illegal metadata, scales that are not finite, or values that `dtype` cannot hold.
        """
        rows, columns = self.shape
        words, scales = self.words.read(), self._read_scales()
        meta = self._split_meta(self.meta.read())
        values = torch.empty(rows, columns // 2, dtype=DTYPES[self.dtype])
        packed = torch.empty(rows, columns // 8, dtype=torch.uint8)
        for low in range(0, rows, step := block_rows(columns, _CHUNK)):
            part = slice(low, min(low + step, rows))
            positions = self._meta_block(meta, part)
            values[part], packed[part] = canonical(
                self._scaled(self._integers(words, part), scales[part]), positions
            )
        return values, packed

    def dense(self) -> Iterator[Tensor]:
        """The dense tensor, a block of rows [rows, K] at a time.

        Raises:
            CheckpointError: as for `packed`.
        """
        values, meta = self.packed()
        for low in range(0, len(values), step := block_rows(self.shape[1])):
            part = slice(low, low + step)
            yield ops.sparse24_decompress(values[part], meta[part], self.shape[1])

    def _read_scales(self) -> Tensor:
        """float32 [N, groups]."""
        scales = self.scales.read().float()
        if not scales.isfinite().all():
            group, row = (~scales.isfinite()).nonzero()[0].tolist()
            raise CheckpointError(
                f"{told(self.scales)} is corrupt: place {row} of group {group} holds {float(scales[group, row])}, "
                "a scale must be finite"
            )
        largest = float(scales.abs().max()) * 2 ** (self.bits - 1)
        if largest > torch.finfo(DTYPES[self.dtype]).max:
            raise CheckpointError(
                f"{self.name} has scales up to {float(scales.abs().max()):g}, its weights do not fit {self.dtype}: "
                "convert with dtype bfloat16 or float32"
            )
        if self.groups > 1 and not self.plain_scales:
            scales = scales.unflatten(1, (-1, 4, 2)).transpose(2, 3).flatten(1)
        return scales.t().contiguous()

    def _integers(self, words: Tensor, rows: slice) -> Tensor:
        """q of some rows, uint8 [rows, K/2], offset by 2^(bits-1)."""
        chunks = slice(rows.start // _CHUNK, rows.stop // _CHUNK)
        shape = (8, 4, 4) if self.bits == 4 else (8, 4, 4, 2)
        block = words.unflatten(1, (-1, math.prod(shape)))[:, chunks].unflatten(2, shape)
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        fields = (block.unsqueeze(-1) >> shifts & (1 << self.bits) - 1).to(torch.uint8)
        if self.bits == 4:  # t c i l j e b h
            fields = fields.unflatten(-1, (2, 2, 2)).permute(1, 2, 6, 4, 0, 7, 3, 5)
        else:  # t c i l j b e h
            fields = fields.unflatten(-1, (2, 2)).permute(1, 2, 5, 4, 0, 7, 3, 6)
        return fields.reshape(rows.stop - rows.start, -1)

    def _scaled(self, integers: Tensor, scales: Tensor) -> Tensor:
        values = (integers.float() - (1 << self.bits - 1)).unflatten(1, (self.groups, -1))
        return (values * scales.unsqueeze(-1)).flatten(1).to(DTYPES[self.dtype])

    def _split_meta(self, meta: Tensor) -> Tensor:
        """Words by (t, c, y, i, z, w, x)."""
        return meta.reshape(self.shape[1] // 32, -1, 2, 8, 2, 2, 2)

    def _meta_block(self, meta: Tensor, rows: slice) -> Tensor:
        part = meta[:, rows.start // _CHUNK : rows.stop // _CHUNK].permute(1, 3, 6, 2, 4, 0, 5)
        words = part.reshape(rows.stop - rows.start, -1)
        found = words.contiguous().view(torch.uint8)  # four quads a word, the first in the lowest bits
        illegal = first_illegal(found, self.shape[1])
        if illegal:
            row, quad, nibble = illegal
            raise CheckpointError(
                f"{told(self.meta)} is corrupt: row {rows.start + row}, quad {quad} holds 0x{nibble:X}; wanted two "
                "positions in increasing order (0x4 0x8 0x9 0xC 0xD 0xE)"
            )
        return found
