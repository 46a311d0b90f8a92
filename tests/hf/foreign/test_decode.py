# SPDX-License-Identifier: Apache-2.0
"""What the writers wrote, the readers give back, whatever the shape, the block size and the holes in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lissom import ops
from lissom.hf.checkpoint import CheckpointError
from lissom.hf.foreign import canonical
from lissom.hf.foreign.bitmask import PLAIN, STRUCTURED, BitmaskWeight
from lissom.hf.foreign.dense import DenseWeight
from lissom.hf.foreign.marlin24 import Marlin24Weight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    )


def random_two_four(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random weights, two of four at most, a third of them zero again, some infinite or no numbers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.01] = torch.inf
    weight[torch.rand(rows, columns, generator=generator) < 0.01] = torch.nan
    quads = weight.view(-1, 4)
    order = torch.rand(len(quads), 4, generator=generator).argsort(1)
    quads.scatter_(1, order[:, :2], 0)
    weight[torch.rand(rows, columns, generator=generator) < 0.3] = 0
    return weight.to(dtype)


@QUICK
@given(
    rows=st.integers(1, 40),
    quads=st.integers(1, 20),
    dtype=st.sampled_from(FLOATS),
    form=st.sampled_from([STRUCTURED, PLAIN]),
    block=st.integers(1, 2000),
    seed=st.integers(0, 2**32),
)
def test_bitmask_is_undone_bit_for_bit(writers, held, rows, quads, dtype, form, block, seed):
    weight = random_two_four(rows, 4 * quads, dtype, seed)
    stored = (writers.bitmask24 if form == STRUCTURED else writers.bitmask)(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canonical, "BLOCK_ELEMENTS", block)
        found = BitmaskWeight("a.weight", *(held(name, part) for name, part in stored.items()))
        assert found.format == form
        assert same_bits(torch.cat(list(found.dense())), weight)
        assert all(same_bits(*pair) for pair in zip(found.packed(), ops.sparse24_compress(weight)))


@QUICK
@given(
    rows=st.integers(1, 40),
    quads=st.integers(1, 20),
    dtype=st.sampled_from(FLOATS),
    block=st.integers(1, 2000),
    seed=st.integers(0, 2**32),
)
def test_dense_weights_are_packed_or_told_apart_block_by_block(held, rows, quads, dtype, block, seed):
    weight = random_two_four(rows, 4 * quads, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canonical, "BLOCK_ELEMENTS", block)
        found = DenseWeight(held("a.weight", weight))
        assert found.obstacle() is None
        assert same_bits(torch.cat(list(found.dense())), weight)
        assert all(same_bits(*pair) for pair in zip(found.packed(), ops.sparse24_compress(weight)))
        row, quad = seed % rows, seed % quads
        weight[row, 4 * quad : 4 * quad + 3] = torch.nan  # a third value, though no number
        told = f"it is not 2:4 (row {row}, columns {4 * quad} to {4 * quad + 3})"
        assert DenseWeight(held("a.weight", weight)).obstacle() == told


@pytest.mark.parametrize("columns", [1, 6, 4095])
def test_dense_weights_have_quads(held, columns):
    found = DenseWeight(held("a.weight", torch.zeros(2, columns)))
    assert found.obstacle() == f"its {columns} input features are not a multiple of 4"


@QUICK
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 9),
)
def test_bitmask_of_any_shape_is_undone(writers, held, shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=generator) * torch.randint(0, 2, shape, generator=generator)).to(
        dtype
    )
    tensor[tensor == 0] = 0  # no -0.0: the format has no place for its sign
    found = BitmaskWeight("a.weight", *(held(name, part) for name, part in writers.bitmask(tensor).items()))
    assert same_bits(torch.cat(list(found.dense())).view(shape), tensor)
    if len(shape) != 2 or shape[1] % 4:
        assert found.obstacle() is not None


@settings(QUICK, max_examples=30)  # its writer goes quad by quad
@given(
    chunks=st.integers(1, 4),
    tiles=st.integers(1, 8),
    bits=st.sampled_from([4, 8]),
    groups=st.sampled_from([1, 2, 4, 8]),
    ordered=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    block=st.integers(1, 60_000),
    seed=st.integers(0, 2**32),
)
def test_marlin24_is_undone_exactly(writers, held, chunks, tiles, bits, groups, ordered, dtype, block, seed):
    weight = random_two_four(64 * chunks, 32 * tiles, torch.float32, seed).nan_to_num(0, 2, -2)
    integers, scales = writers.quantise(weight, bits, groups)
    stored = writers.marlin24(integers, scales, bits=bits, ordered=ordered)
    dense = writers.dequantise(integers, scales, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canonical, "BLOCK_ELEMENTS", block)
        parts = [held(name, part) for name, part in zip("wms", stored)]
        name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        found = Marlin24Weight("a.weight", *parts, name, plain_scales=not ordered)
        assert found.shape == dense.shape
        values, meta = found.packed()
        wanted = ops.sparse24_compress(dense + 0)  # + 0: integers have no -0.0
        assert torch.equal(values, wanted[0])
        assert torch.equal(meta, wanted[1])
        assert torch.equal(torch.cat(list(found.dense())), dense)


@QUICK
@given(
    rows=st.integers(1, 12),
    quads=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
)
def test_any_two_positions_become_the_canonical_form(rows, quads, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    legal = torch.tensor(canonical.LEGAL_NIBBLES, dtype=torch.uint8)
    every = legal[torch.randint(0, 6, (rows, quads), generator=generator)]
    values = torch.randn(rows, 2 * quads, generator=generator).to(dtype)
    values[torch.rand(values.shape, generator=generator) < 0.4] = 0
    values[torch.rand(values.shape, generator=generator) < 0.1] = -0.0
    meta = canonical.pack_nibbles(every)
    before = values.clone(), meta.clone()
    dense = ops.sparse24_decompress(values, meta, 4 * quads)
    wanted = ops.sparse24_compress(dense)
    assert all(same_bits(*pair) for pair in zip(canonical.canonical(values, meta), wanted))
    assert same_bits(values, before[0])
    assert same_bits(meta, before[1])


def test_every_illegal_nibble_is_named():
    for nibble in range(16):
        meta = torch.full((2, 3), 0x44, dtype=torch.uint8)
        meta[1, 2] = 0x4 | nibble << 4
        found = canonical.first_illegal(meta, 24)
        assert found == (None if nibble in canonical.LEGAL_NIBBLES else (1, 5, nibble))


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - set(canonical.LEGAL_NIBBLES)))
def test_illegal_metadata_of_marlin_is_found_at_its_place(writers, held, nibble):
    integers, scales = writers.quantise(random_two_four(128, 64, torch.float32, 1).nan_to_num(0, 1, -1), 4, 1)
    words, meta, stored = writers.marlin24(integers, scales, bits=4)
    # Row 67 of 128 and its first word: x = 0, y = 1, z = 1 in chunk 1, i = 0, t = w = 0.
    place = ((((0 * 2 + 1) * 2 + 1) * 8 + 0) * 2 + 1) * 2 * 2
    flat = meta.view(-1)
    flat[place] = (int(flat[place]) & ~0xF0) | nibble << 4
    found = Marlin24Weight("a.weight", held("words", words), held("meta", meta), held("s", stored))
    with pytest.raises(CheckpointError, match=rf"meta is corrupt: row 67, quad 1 holds 0x{nibble:X}"):
        found.packed()


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_quads_of_the_mask_must_keep_two(writers, held, count):
    stored = writers.bitmask24(random_two_four(5, 40, torch.float32, 2))
    stored["bitmask"][3, 1] = 0b0011 | ((1 << count) - 1) << 4
    found = BitmaskWeight("a.weight", *(held(name, part) for name, part in stored.items()))
    with pytest.raises(
        CheckpointError, match=rf"bitmask is corrupt: row 3, quad 3 must keep two .* {(1 << count) - 1:04b}"
    ):
        found.packed()


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_scales_must_be_finite(writers, held, scale):
    integers, scales = writers.quantise(torch.ones(64, 64), 4, 2)
    words, meta, stored = writers.marlin24(integers * 0, scales, bits=4)
    stored[1, 7] = scale
    found = Marlin24Weight("a.weight", held("w", words), held("m", meta), held("s", stored))
    with pytest.raises(CheckpointError, match="s is corrupt: place 7 of group 1 holds"):
        found.packed()


def test_weights_must_fit_their_type(writers, held):
    integers, scales = writers.quantise(random_two_four(64, 64, torch.float32, 1).nan_to_num(0, 1, -1), 8, 1)
    parts = [held(n, part) for n, part in zip("wms", writers.marlin24(integers, scales * 0 + 1000, bits=8))]
    with pytest.raises(CheckpointError, match="do not fit F16: convert with dtype bfloat16 or float32"):
        Marlin24Weight("a.weight", *parts).packed()
    values, _ = Marlin24Weight("a.weight", *parts, "F32").packed()
    assert values.abs().max() == 1000 * integers.abs().max()
