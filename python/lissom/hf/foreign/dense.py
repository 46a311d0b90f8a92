# SPDX-License-Identifier: Apache-2.0
"""Weights of ordinary checkpoints: values with their zeros written out, 2:4 or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lissom import ops
from lissom.hf.foreign.canonical import Source, block_rows

FORMAT = "dense"


@dataclass(frozen=True)
class DenseWeight:
    """One tensor that is stored as it is.

    Args:
        weight: float [N, K] if it is to be packed, else of any shape.
    """

    weight: Source
    format: str = FORMAT

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.weight.shape

    @property
    def dtype(self) -> str:
        """Type of the values, which conversion keeps."""
        return self.weight.dtype

    @property
    def sources(self) -> tuple[Source, ...]:
        """The tensor."""
        return (self.weight,)

    def obstacle(self) -> str | None:
        """Why the weight cannot be packed; reads it.

        Returns:
            A reason, or None.
        """
        columns = self.shape[-1]
        if columns % 4:
            return f"its {columns} input features are not a multiple of 4"
        for low, block in _blocks(self._matrix()):
            holds, row, quad = ops.sparse24_check(block)
            if not holds:
                return f"it is not 2:4 (row {low + row}, columns {4 * quad} to {4 * quad + 3})"
        return None

    def packed(self) -> tuple[Tensor, Tensor]:
        """Values [N, K/2] and metadata [N, ceil(K/8)] of the canonical form, a block of rows at a time."""
        weight = self._matrix()
        rows, columns = weight.shape
        values = weight.new_empty(rows, columns // 2)
        meta = torch.empty(rows, (columns + 7) // 8, dtype=torch.uint8)
        for low, block in _blocks(weight):
            part = slice(low, low + len(block))
            values[part], meta[part] = ops.sparse24_compress(block)
        return values, meta

    def dense(self) -> Iterator[Tensor]:
        """The tensor, a block of rows [rows, K] at a time."""
        for _, block in _blocks(self._matrix()):
            yield block

    def _matrix(self) -> Tensor:
        return self.weight.read().view(-1, self.shape[-1])


def _blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = block_rows(weight.shape[1])
    return ((low, weight[low : low + step]) for low in range(0, len(weight), step))
