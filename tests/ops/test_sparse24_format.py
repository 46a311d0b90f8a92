# SPDX-License-Identifier: Apache-2.0
"""The canonical and the packed form: sparse24_check, check_meta, compress, decompress, pack, unpack."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom import ops
from lissom.reference import sparse24 as twin
from lissom.testing import DTYPES, random_sparse24, slow_compress, slow_pack

LEGAL = {(0, 1): 0x4, (0, 2): 0x8, (1, 2): 0x9, (0, 3): 0xC, (1, 3): 0xD, (2, 3): 0xE}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# every kind of value: zeros of both signs, the least denormal, one, infinities, NaN with payloads and both signs
SPECIAL = {
    torch.float32: [0, 1 << 31, 1, 0x3F800000, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC12345, 0xFFFFFFFF],
    torch.bfloat16: [0, 1 << 15, 1, 0x3F80, 0x7F80, 0xFF80, 0x7F81, 0x7FC5, 0xFFFF],
    torch.float16: [0, 1 << 15, 1, 0x3C00, 0x7C00, 0xFC00, 0x7C01, 0x7E55, 0xFFFF],
}


def from_bits(patterns: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    size = dtype.itemsize * 8
    signed = [[b - 2**size if b >= 2 ** (size - 1) else b for b in row] for row in patterns]
    return torch.tensor(signed, dtype=BITS[dtype]).view(dtype)


def bits(t: torch.Tensor) -> list:
    return t.contiguous().view(BITS[t.dtype]).tolist()


@st.composite
def weights(draw, *, sparse: bool = True):
    """[N, K] of any bit patterns, with at most two non-zeros a quad if `sparse`."""
    dtype = draw(st.sampled_from(DTYPES))
    top = 2 ** (dtype.itemsize * 8) - 1
    value = st.one_of(st.sampled_from(SPECIAL[dtype]), st.integers(0, top))
    zero = st.sampled_from(SPECIAL[dtype][:2])

    def quad():
        kept = draw(st.sampled_from([(), *[(i,) for i in range(4)], *LEGAL])) if sparse else range(4)
        return [draw(value if i in kept else zero) for i in range(4)]

    n, quads = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return from_bits([[b for _ in range(quads) for b in quad()] for _ in range(n)], dtype)


@given(weights())
@settings(max_examples=150, deadline=None)
def test_roundtrip_keeps_every_bit_but_the_sign_of_zero(w):
    values, meta = ops.sparse24_compress(w)
    again = ops.sparse24_decompress(values, meta, w.shape[1])
    assert bits(again) == bits(w.masked_fill(w == 0, 0))
    packed = ops.sparse24_pack(values, meta)
    unpacked, unpacked_meta = ops.sparse24_unpack(packed, *w.shape)
    assert bits(unpacked) == bits(values)
    assert torch.equal(unpacked_meta, meta)


@given(weights())
@settings(max_examples=150, deadline=None)
def test_form_is_the_definition_and_unique(w):
    values, meta = ops.sparse24_compress(w)
    slow_values, slow_meta = slow_compress(w)
    size = 2 ** (w.element_size() * 8)
    assert [[b % size for b in row] for row in bits(values)] == slow_values
    assert meta.tolist() == slow_meta
    # compressing what was decompressed gives the same bytes: one matrix, one form
    same = ops.sparse24_compress(ops.sparse24_decompress(values, meta, w.shape[1]))
    assert bits(same[0]) == bits(values)
    assert torch.equal(same[1], meta)
    assert ops.sparse24_check_meta(meta, w.shape[1]) == (True, -1, -1)
    assert ops.sparse24_pack(values, meta).numpy().tobytes() == slow_pack(values, meta)


@given(weights(sparse=False))
@settings(max_examples=100, deadline=None)
def test_check_agrees_with_compress(w):
    counts = (w.unflatten(1, (-1, 4)) != 0).sum(-1)
    bad = (counts > 2).nonzero()
    if len(bad) == 0:
        assert ops.sparse24_check(w) == (True, -1, -1)
        ops.sparse24_compress(w)
        return
    row, quad = bad[0].tolist()
    assert ops.sparse24_check(w) == (False, row, quad)
    with pytest.raises(ValueError, match=rf"row {row}, quad {quad} .*has {int(counts[row, quad])} non-zeros"):
        ops.sparse24_compress(w)


@given(st.integers(1, 4), st.integers(1, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_any_bytes_as_metadata_are_legal_or_refused(n, quads, data):
    columns = (quads + 1) // 2
    raw = data.draw(
        st.lists(st.lists(st.integers(0, 255), min_size=columns, max_size=columns), min_size=n, max_size=n)
    )
    meta = torch.tensor(raw, dtype=torch.uint8)
    nibbles = [[(row[i // 2] >> 4 * (i % 2)) & 15 for i in range(2 * columns)] for row in raw]
    wrong = [
        (r, q)
        for r, row in enumerate(nibbles)
        for q, code in enumerate(row)
        if (code not in LEGAL.values() if q < quads else code != 0)
    ]
    assert ops.sparse24_check_meta(meta, 4 * quads) == ((False, *wrong[0]) if wrong else (True, -1, -1))
    values = torch.ones(n, 2 * quads)
    if not wrong:
        ops.sparse24_pack(values, meta)
        ops.sparse24_validate_meta(meta, 4 * quads)
        return
    row, quad = wrong[0]
    message = rf"corrupt metadata: row {row}, quad {quad} holds nibble 0x{nibbles[row][quad]:X}"
    for refuse in (
        lambda: ops.sparse24_validate_meta(meta, 4 * quads),
        lambda: ops.sparse24_pack(values, meta),
        lambda: ops.sparse24_decompress(values, meta, 4 * quads),
        lambda: ops.sparse24_mask_mm(torch.ones(1, n), torch.ones(1, 4 * quads), meta),
        lambda: ops.sparse24_linear_values(torch.ones(1, 4 * quads), values, meta),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()


@pytest.mark.parametrize("kept", [(), *[(i,) for i in range(4)], *LEGAL], ids=str)
def test_filler_rule(kept, dtype):
    quad = torch.zeros(1, 4, dtype=dtype)
    quad[0, list(kept)] = 1
    wanted = {(): 0xE, (0,): 0xC, (1,): 0xD, (2,): 0xE, (3,): 0xE, **LEGAL}[kept]
    values, meta = ops.sparse24_compress(quad)
    assert meta.tolist() == [[wanted]]
    assert values.sum() == len(kept)


def test_minus_zero_is_zero(dtype):
    """A peer once took -0.0 for a kept value and multiplied garbage (vllm-project/vllm pull 13198)."""
    w = torch.tensor([[-0.0, 1, -0.0, 2, -0.0, -0.0, -0.0, -0.0]], dtype=dtype)
    assert ops.sparse24_check(w) == (True, -1, -1)
    values, meta = ops.sparse24_compress(w)
    assert meta.tolist() == [[0xED]]
    assert bits(values) == bits(torch.tensor([[1, 2, 0, 0]], dtype=dtype))


def test_magnitude_keeps_the_largest_and_breaks_ties_downwards(dtype):
    w = torch.tensor([[1, -3, 2, 0.5, 1, -1, 1, 1, 0, 0, 2, 0, torch.nan, torch.inf, 9, 8]], dtype=dtype)
    values, meta = ops.sparse24_compress(w, pattern="magnitude")
    dense = ops.sparse24_decompress(values, meta, 16)
    wanted = torch.tensor([[0, -3, 2, 0, 1, -1, 0, 0, 0, 0, 2, 0, torch.nan, torch.inf, 0, 0]], dtype=dtype)
    assert bits(dense) == bits(wanted)


@pytest.mark.parametrize(("n", "k"), itertools.product([0, 1, 15, 16, 17, 300], [0, 4, 8, 28, 32, 36, 132]))
def test_packed_form_of_odd_shapes(n, k, dtype):
    values, meta = ops.sparse24_compress(random_sparse24(n, k, dtype=dtype, full=0.8))
    packed = ops.sparse24_pack(values, meta)
    assert packed.shape == (twin.packed_bytes(n, k, dtype),)
    if n < 300:
        assert packed.numpy().tobytes() == slow_pack(values, meta)
    again = ops.sparse24_unpack(packed, n, k, dtype=dtype)
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], meta)


@pytest.mark.parametrize("name", ["compress", "decompress", "check", "check_meta", "pack", "unpack"])
def test_twin_gives_the_same_bytes(name, dtype):
    w = random_sparse24(37, 76, dtype=dtype, full=0.7)
    values, meta = twin.compress(w)
    arguments = {
        "compress": (w,),
        "decompress": (values, meta, 76),
        "check": (torch.ones_like(w),),
        "check_meta": (meta | 1, 76),
        "pack": (values, meta),
        "unpack": (twin.pack(values, meta), 37, 76),
    }[name]
    ours = getattr(torch.ops.lissom, f"sparse24_{name}")(*arguments)
    theirs = getattr(twin, name)(*arguments)
    for a, b in zip(*[r if isinstance(r, tuple) else (r,) for r in (ours, theirs)], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@given(weights(sparse=False))
@settings(max_examples=100, deadline=None)
def test_twin_keeps_the_same_two(w):
    for ours, theirs in zip(
        ops.sparse24_compress(w, pattern="magnitude"), twin.compress(w, pattern="magnitude"), strict=True
    ):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_first_bad_quad_is_the_first_in_any_number_of_threads():
    w = torch.zeros(1000, 64)
    w[[700, 900], 8:11] = 1
    w[700, 60:63] = 1
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        assert ops.sparse24_check(w) == (False, 700, 2)
