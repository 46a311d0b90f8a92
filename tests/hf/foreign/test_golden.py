# SPDX-License-Identifier: Apache-2.0
"""The writers of these tests give the bytes of compressed-tensors 0.14.0.1, and the readers undo them.

The digests were made once by the compressors of that release (`Marlin24Compressor`, `Sparse24BitMaskCompressor`,
`BitmaskCompressor`, on torch 2.13) from the weights of `example`. It is not needed to run the tests.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from lissom import ops
from lissom.hf.foreign.bitmask import STRUCTURED, BitmaskWeight
from lissom.hf.foreign.marlin24 import Marlin24Weight

GOLDEN = {  # format, rows, columns, bits, groups
    ("marlin-24", 64, 64, 4, 1): "859ce5c0bf14e510daa0a685",
    ("marlin-24", 256, 384, 4, 3): "8d7405ed01f83759631c6fec",
    ("marlin-24", 128, 1024, 4, 8): "11666feab3eeea33d63211d4",
    ("marlin-24", 64, 256, 4, 2): "b7a7071313b3664b145cd81a",
    ("marlin-24", 64, 64, 8, 1): "d4d72d822c02dd1bfe4f3373",
    ("marlin-24", 192, 512, 8, 4): "175fa4cfa56998c9a8f6e477",
    ("marlin-24", 64, 256, 8, 2): "dcb9888e16eceddf4cbe0430",
    ("sparse-24-bitmask", 16, 36, 4, 1): "d845c949dc94cd99ac137271",
    ("sparse-bitmask", 16, 36, 4, 1): "bdaa0061ba5973359fa89fa0",
    ("sparse-24-bitmask", 64, 64, 4, 1): "cf514378bd50622b725e7f28",
    ("sparse-bitmask", 64, 64, 4, 1): "d79c2aa4ad46b36b9156ab00",
}


def example(rows: int, columns: int, bits: int, groups: int, *, full: bool = False) -> tuple[Tensor, Tensor]:
    """Integers that are 2:4, some quads emptier unless `full`, and scales, by arithmetic alone."""
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    largest = 2 ** (bits - 1) - 1
    integers = (5 * n + 3 * k + n * k) % (2 * largest + 1) - largest
    if full:
        integers = torch.where(integers == 0, 1, integers)
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    chosen = pairs[(n[:, ::4] + 7 * (k[:, ::4] // 4)) % 6]
    kept = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(2, chosen, True)
    rows_, groups_ = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    scales = ((17 * rows_ + 29 * groups_) % 61 + 3).float() / 256
    return (integers * kept.view(rows, columns)).int(), scales.half()


def digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


def same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


@pytest.mark.parametrize("case", [case for case in GOLDEN if case[0] == "marlin-24"])
def test_marlin24(case, writers, held):
    _, rows, columns, bits, groups = case
    integers, scales = example(rows, columns, bits, groups)
    group = columns // groups
    stored = writers.marlin24(integers, scales, bits=bits, ordered=group < columns // 2)
    assert digest(*stored) == GOLDEN[case]
    parts = [held(name, part) for name, part in zip(("w", "m", "s"), stored)]
    weight = Marlin24Weight("up.weight", *parts, "F16", plain_scales=group >= columns // 2)
    assert weight.shape == (rows, columns)
    assert (weight.bits, weight.groups) == (bits, groups)
    dense = writers.dequantise(integers, scales)
    values, meta = weight.packed()
    assert all(same(*pair) for pair in zip((values, meta), ops.sparse24_compress(dense)))
    assert same(torch.cat(list(weight.dense())), dense)


@pytest.mark.parametrize("case", [case for case in GOLDEN if case[0] != "marlin-24"])
def test_bitmask(case, writers, held):
    form, rows, columns, bits, groups = case
    dense = writers.dequantise(*example(rows, columns, bits, groups, full=form == STRUCTURED))
    stored = writers.bitmask24(dense) if form == STRUCTURED else writers.bitmask(dense)
    assert digest(*stored.values()) == GOLDEN[case]
    weight = BitmaskWeight("up.weight", *(held(name, part) for name, part in stored.items()))
    assert (weight.format, weight.shape, weight.dtype) == (form, (rows, columns), "F16")
    assert weight.obstacle() is None
    assert all(same(*pair) for pair in zip(weight.packed(), ops.sparse24_compress(dense)))
    assert same(torch.cat(list(weight.dense())), dense)
