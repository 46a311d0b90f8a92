# SPDX-License-Identifier: Apache-2.0
"""The packed form of CUDA, made and read on the CPU: sm80-v1 bit by bit, which target a device has, what each refuses.
torch's own 2:4 tensors.
"""

from __future__ import annotations

import itertools
import struct

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from lissom import ops
from lissom.nn import Sparse24Linear
from lissom.reference import sparse24 as twin
from lissom.testing import random_sparse24

HALVES = (torch.bfloat16, torch.float16)
SIZES = [0, 1, 31, 32, 33, 70], [0, 4, 8, 28, 32, 36, 64, 68, 132]


@pytest.fixture(params=HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def half(request) -> torch.dtype:
    return request.param


def problem(n: int, k: int, dtype: torch.dtype, full: float = 0.8):
    return ops.sparse24_compress(random_sparse24(n, k, dtype=dtype, full=full))


def slow_pack(values: torch.Tensor, meta: torch.Tensor) -> bytes:
    """sm80-v1 lane by lane, register by register, from the picture in csrc/sparse24/layout.h."""
    n, k = values.shape[0], values.shape[1] * 2
    bits, code = values.view(torch.int16).tolist(), twin.nibbles(meta, k).tolist()
    index = HALVES.index(values.dtype) + 1
    out = struct.pack("<8sIiqq96x", b"LISSOM80", 1, index, n, k)

    def nibble(row: int, quad: int) -> int:
        return code[row][quad] if row < n and quad < k // 4 else 0xE

    def pair(row: int, quad: int) -> bytes:
        inside = row < n and quad < k // 4
        return struct.pack("<2h", *bits[row][2 * quad : 2 * quad + 2]) if inside else bytes(4)

    for panel, record in itertools.product(range(-(-n // 32)), range(2 * -(-k // 64))):
        for g, t in itertools.product(range(8), range(4)):
            word = 0
            for half, j in itertools.product(range(2), range(4)):
                row = 32 * panel + 16 * (t // 2) + g + 8 * half
                word |= nibble(row, 8 * record + 4 * (t % 2) + j) << (16 * half + 4 * j)
            out += struct.pack("<I", word)
        for fragment, g, t, r in itertools.product(range(2), range(8), range(4), range(4)):
            out += pair(32 * panel + 16 * fragment + g + 8 * (r % 2), 8 * record + t + 4 * (r // 2))
    return out + bytes(16 * index)


@pytest.mark.parametrize(("n", "k"), itertools.product(*SIZES))
def test_form_is_the_picture(n, k, half):
    values, meta = problem(n, k, half)
    packed = ops.sparse24_pack(values, meta, "sm80-v1")
    assert packed.shape == (twin.packed_bytes(n, k, half, "sm80-v1"),)
    assert packed.numpy().tobytes() == slow_pack(values, meta)
    assert torch.equal(packed, twin.pack(values, meta, "sm80-v1"))
    for unpack in (ops.sparse24_unpack, twin.unpack):
        again = unpack(packed, n, k, "sm80-v1", dtype=half)
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], meta)


def test_every_bit_of_a_value_survives(half):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half).reshape(1024, 64)
    meta = torch.full((1024, 16), 0x4E, dtype=torch.uint8)
    packed = ops.sparse24_pack(bits, meta, "sm80-v1")
    assert torch.equal(
        ops.sparse24_unpack(packed, 1024, 128, "sm80-v1")[0].view(torch.int16), bits.view(torch.int16)
    )


@pytest.mark.parametrize(("n", "k"), [(32, 64), (96, 192), (64, 320)])
def test_metadata_is_torchs_bit_for_bit(n, k, half):
    """A record's 32 words are those that torch's converter makes for CUTLASS; only the order of the records differs."""
    w = random_sparse24(n, k, dtype=half, seed=n)
    packed = ops.sparse24_pack(*ops.sparse24_compress(w), "sm80-v1")
    body = packed[128:-32] if half == torch.float16 else packed[128:-16]
    ours = body.reshape(n // 32, k // 32, 1152)[..., :128].contiguous().view(torch.int16)
    kept, theirs = sparse_semi_structured_from_dense_cutlass(w)
    assert torch.equal(theirs.reshape(k // 32, n // 32, 64).transpose(0, 1), ours)
    assert torch.equal(kept, ops.sparse24_compress(w)[0])


@pytest.mark.parametrize(("row", "quad"), [(0, 0), (8, 0), (16, 0), (24, 3), (7, 4), (9, 7), (31, 7), (5, 9)])
def test_one_quad_in_its_place(row, quad, half):
    """All quads keep (2, 3), one keeps (0, 1)."""
    w = torch.zeros(32, 64, dtype=half)
    w[:, 2::4], w[:, 3::4] = 1, 1
    w[row, 4 * quad : 4 * quad + 4] = torch.tensor([5, 7, 0, 0])
    packed = ops.sparse24_pack(*ops.sparse24_compress(w), "sm80-v1")
    theirs = sparse_semi_structured_from_dense_cutlass(w)[1].reshape(2, 64)
    for record in range(2):
        words = packed[128 + 1152 * record :][:128].view(torch.int16)
        assert torch.equal(words, theirs[record])
        assert (words != -0x1112).sum() == (record == quad // 8)  # 0xEEEE


def test_lengths_tell_target_and_type():
    """What a CUDA operator goes by, as it cannot read a header without waiting for the device."""
    for n, k in itertools.product([0, 1, 16, 20, 32, 100, 4096], [0, 4, 32, 64, 100, 4096]):
        forms = [("cpu-v1", torch.bfloat16), *(("sm80-v1", dtype) for dtype in (*HALVES, torch.int8))]
        assert len({twin.packed_bytes(n, k, dtype, target) for target, dtype in forms}) == 4
        assert len({twin.packed_bytes(n, k, torch.int8, target) for target in twin.TARGETS}) == 2


VALUES, META = problem(20, 40, torch.bfloat16)
PACKED = ops.sparse24_pack(VALUES, META, "sm80-v1")


def header(**changes: object) -> torch.Tensor:
    fields = {"magic": b"LISSOM80", "version": 1, "dtype": 1, "n": 20, "k": 40} | changes
    damaged = PACKED.clone()
    head = struct.pack("<8sIiqq", *fields.values())
    damaged[: len(head)] = torch.tensor(list(head), dtype=torch.uint8)
    return damaged


REFUSED = {
    "float32": (
        lambda: ops.sparse24_pack(VALUES.float(), META, "sm80-v1"),
        TypeError,
        "sm80-v1 holds bfloat16, float16 and int8",
    ),
    "unknown": (
        lambda: ops.sparse24_pack(VALUES, META, "sm90"),
        ValueError,
        '"cpu-v1" or "sm80-v1"; got "sm90"',
    ),
    "corrupt": (
        lambda: ops.sparse24_pack(VALUES, META | 1, "sm80-v1"),
        ValueError,
        "corrupt metadata: row 0, quad",
    ),
    "corrupt tail": (
        lambda: ops.sparse24_pack(VALUES[:, :18], META[:, :5], "sm80-v1"),
        ValueError,
        "row 0, quad 9 holds nibble 0x[48-9C-E]; .*0x0 behind",
    ),
    "other shape": (
        lambda: ops.sparse24_unpack(PACKED, 21, 40, "sm80-v1"),
        RuntimeError,
        "N=20, K=40; got N=21",
    ),
    "other dtype": (
        lambda: ops.sparse24_unpack(PACKED, 20, 40, "sm80-v1", dtype=torch.half),
        TypeError,
        "holds BFloat16; got",
    ),
    "truncated": (
        lambda: ops.sparse24_unpack(PACKED[:-1], 20, 40, "sm80-v1"),
        RuntimeError,
        "damaged.*need 2448 .*got 2447",
    ),
    "cpu-v1 for sm80-v1": (
        lambda: ops.sparse24_unpack(ops.sparse24_pack(VALUES, META), 20, 40, "sm80-v1"),
        RuntimeError,
        "no sm80-v1 header",
    ),
    "sm80-v1 for cpu-v1": (
        lambda: ops.sparse24_unpack(PACKED, 20, 40),
        RuntimeError,
        "target sm80-v1, for CUDA",
    ),
    "linear": (
        lambda: ops.sparse24_linear(torch.ones(3, 40).bfloat16(), PACKED, 20, 40),
        RuntimeError,
        "sm80-v1, for CUDA",
    ),
    "grad_input": (
        lambda: ops.sparse24_grad_input(torch.ones(3, 20).bfloat16(), PACKED, 20, 40),
        RuntimeError,
        "sm80-v1, for CUDA",
    ),
    "version": (
        lambda: ops.sparse24_unpack(header(version=2), 20, 40, "sm80-v1"),
        RuntimeError,
        "header of version 1",
    ),
    "dtype": (
        lambda: ops.sparse24_unpack(header(dtype=4), 20, 40, "sm80-v1"),
        RuntimeError,
        "no sm80-v1 header",
    ),
    "float16": (
        lambda: ops.sparse24_unpack(header(dtype=2), 20, 40, "sm80-v1"),
        RuntimeError,
        "damaged.*need 2464",
    ),
    "sizes": (
        lambda: ops.sparse24_unpack(header(n=2**62), 2**62, 40, "sm80-v1"),
        RuntimeError,
        "damaged: its header says",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=rf"^lissom::sparse24_\w+: (.|\n)*{words}"):
        call()


# --- which target


@pytest.fixture
def cuda_build(monkeypatch) -> None:
    monkeypatch.setattr(twin, "_has_cuda_kernels", lambda: True)


def test_target_of_a_device(monkeypatch, cuda_build):
    assert [ops.sparse24_target("cuda", dtype) for dtype in (torch.float32, *HALVES)] == [
        None,
        "sm80-v1",
        "sm80-v1",
    ]
    assert ops.sparse24_target("cpu", torch.float32) == ops.sparse24_target("meta", torch.half) == "cpu-v1"
    monkeypatch.setattr(twin, "_has_cuda_kernels", lambda: False)
    assert ops.sparse24_target("cuda", torch.float32) == ops.sparse24_target("cuda:1", torch.half) == "cpu-v1"


def test_fake_tensors_of_cuda_have_its_form(cuda_build, half):
    with FakeTensorMode():
        values = torch.empty(20, 20, dtype=half, device="cuda")
        meta = torch.empty(20, 5, dtype=torch.uint8, device="cuda")
        x = torch.empty(7, 40, dtype=half, device="cuda")
        packed = torch.ops.lissom.sparse24_pack(values, meta)
        assert packed.shape == (twin.packed_bytes(20, 40, half, "sm80-v1"),)
        assert packed.device.type == "cuda"
        assert torch.ops.lissom.sparse24_linear(x, packed, 20, 40).shape == (7, 20)
        assert torch.ops.lissom.sparse24_unpack(packed, 20, 40, dtype=half)[0].shape == (20, 20)
        other = HALVES[1 - HALVES.index(half)]
        with pytest.raises(RuntimeError, match="packed must be the uint8 vector of"):
            torch.ops.lissom.sparse24_linear(x.to(other), packed, 20, 40)
        with pytest.raises(RuntimeError, match="packed must be the uint8 vector of"):
            torch.ops.lissom.sparse24_linear(x, torch.empty_like(meta), 20, 40)
        with pytest.raises(TypeError, match="sm80-v1 holds"):
            torch.ops.lissom.sparse24_pack(values.float(), meta)


def test_opcheck_of_the_foreign_target(half):
    values, meta = problem(20, 40, half)
    packed = ops.sparse24_pack(values, meta, "sm80-v1")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments, options in (
        (torch.ops.lissom.sparse24_pack.default, (values, meta, "sm80-v1"), {}),
        (torch.ops.lissom.sparse24_unpack.default, (packed, 20, 40, "sm80-v1"), {"dtype": half}),
    ):
        result = torch.library.opcheck(operator, arguments, options, test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}


def test_a_layer_without_packed_form_stays_canonical(monkeypatch):
    """As float32 on CUDA."""
    dense = torch.nn.Linear(36, 20)
    dense.weight.data = random_sparse24(20, 36)
    packed = Sparse24Linear.from_linear(dense)
    monkeypatch.setattr(twin, "own_target", lambda device, dtype: None)
    layer = Sparse24Linear.from_linear(dense)
    assert layer.packed is None
    x = torch.randn(3, 36, requires_grad=True)
    assert torch.equal(layer(x), packed(x))
    assert layer.packed is None
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.weight.sum(0).expand(3, 36))
    moved = packed.to("cpu")
    assert moved.packed is None
    assert torch.equal(moved.dense_weight(), dense.weight)
    monkeypatch.undo()
    assert layer.pack_().packed is not None


# --- torch's own tensors


@pytest.mark.parametrize(("n", "k"), [(32, 64), (96, 192), (64, 32)])
def test_cutlass_pair_is_torchs(n, k, half):
    w = random_sparse24(n, k, dtype=half, seed=k)
    pair = ops.sparse24_to_cutlass(*ops.sparse24_compress(w))
    for ours, theirs in zip(pair, sparse_semi_structured_from_dense_cutlass(w), strict=True):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert torch.equal(ours, theirs)


def test_cutlass_pair_with_other_fillers(half):
    """Quads of fewer than two: both write legal forms of one matrix, and what comes back is ours."""
    w = random_sparse24(64, 128, dtype=half, full=0.3)
    ours = ops.sparse24_compress(w)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*ops.sparse24_to_cutlass(*ours)), w)
    theirs = sparse_semi_structured_from_dense_cutlass(w)
    assert not torch.equal(theirs[1], ops.sparse24_to_cutlass(*ours)[1])
    for a, b in zip(ops.sparse24_from_cutlass(*theirs), ours, strict=True):
        assert torch.equal(a, b)


def test_torchs_tensor_there_and_back(half):
    values, meta = problem(64, 128, half)
    tensor = ops.sparse24_to_torch(values, meta)
    assert isinstance(tensor, SparseSemiStructuredTensorCUTLASS)
    assert torch.equal(tensor.to_dense(), ops.sparse24_decompress(values, meta, 128))
    for a, b in zip(ops.sparse24_from_torch(tensor), (values, meta), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda v, m: ops.sparse24_to_cutlass(v.float(), m), TypeError, "1 of 2: take tensor.to_dense"),
        (
            lambda v, m: ops.sparse24_to_cutlass(v[:20], m[:20]),
            ValueError,
            r"multiples of 32; got \[20, 32\]",
        ),
        (lambda v, m: ops.sparse24_to_cutlass(v, m | 1), ValueError, "corrupt metadata: row 0"),
        (
            lambda v, m: ops.sparse24_from_cutlass(v, m),
            ValueError,
            r"int16 \[N=32, K/16=4\]; got torch.uint8 \[32, 8\]",
        ),
        (
            lambda v, m: ops.sparse24_from_cutlass(v, m.view(torch.int16) & 0x7FFF),
            ValueError,
            "corrupt metadata",
        ),
        (lambda v, m: ops.sparse24_from_torch(v), TypeError, "got Tensor"),
    ],
)
def test_conversions_refuse(call, error, words):
    values = torch.ones(32, 32, dtype=torch.bfloat16)
    with pytest.raises(error, match=rf"^lissom::sparse24_(.|\n)*{words}"):
        call(values, torch.full((32, 8), 0xEE, dtype=torch.uint8))
