# SPDX-License-Identifier: Apache-2.0
"""Every wrapper of dev.cuh, as nvcc compiled it for each architecture, executed and compared."""

from __future__ import annotations

import re
from pathlib import Path

import interpreter
import numpy as np
import pytest
import torch
from interpreter import const
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

HERE = Path(__file__).resolve().parent
DEV = interpreter.ROOT / "csrc" / "core" / "cuda" / "dev.cuh"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
RNG = np.random.default_rng(7)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def dev(request, nvcc):
    return interpreter.load(interpreter.compile_ptx(HERE / "kernels" / "dev_check.cu", request.param))


def sixty_fourths(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.integers(-64, 65, shape) / 64)


def two_of_four(rows: int, columns: int) -> torch.Tensor:
    """Random 2:4 mask, True = kept."""
    order = torch.from_numpy(RNG.random((rows, columns // 4, 4))).argsort(-1)
    return (order < 2).reshape(rows, columns)


def test_index(dev):
    out = np.zeros((2 * 3 * 2, 96, 8), np.int32)
    dev.launch("index_check", (2, 3, 2), 96, [out])
    t = np.arange(96)
    for block in range(12):
        wanted = [t, t % 32, t // 32, t * 0 + 96, t * 0 + block, t * 0 + 2, t * 0 + 3, t * 0 + 2]
        np.testing.assert_array_equal(out[block], np.stack(wanted, 1))


def test_memory(dev):
    source, out = RNG.integers(0, 256, 2048).astype(np.uint8), np.zeros(2048, np.uint8)
    dev.launch("memory_check", 1, 32, [const(source), out], shared=2048)
    for at, size in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 4), (18, 8), (22, 16)):
        part = slice(at * 64, at * 64 + 32 * size)
        wanted = np.roll(source[part].reshape(32, size), -1, 0)
        np.testing.assert_array_equal(out[part].reshape(32, size), wanted)
    halves = source[128:192].view(np.uint16).astype(np.uint8)
    np.testing.assert_array_equal(out[1984 : 1984 + 32], halves.reshape(-1, 2)[:, ::-1].ravel())


@pytest.mark.parametrize("seed", range(4))
def test_named_barriers(dev, seed):
    out = np.zeros(32, np.int32)
    dev.launch("barrier_check", 1, 64, [out], shared=256, seed=seed)
    np.testing.assert_array_equal(out, 131 - np.arange(32))


def test_warp(dev):
    v, lane = RNG.permutation(100)[:32].astype(np.int32), np.arange(32)
    v[3] = 95
    out = np.zeros((12, 32), np.int32)
    dev.launch("warp_check", 1, 32, [const(v), out])
    bytes_of = [
        (int(x) * 0x01020304 & 0xFFFFFFFF).to_bytes(4, "little") + bytes([0x88, 0x77, 0x66, 0x55]) for x in v
    ]
    wanted = [
        np.full(32, v[5]),
        v[lane // 8 * 8 + (lane + 1) % 8],
        v[lane ^ 4],
        v[np.where(lane < 3, lane, lane - 3)],
        v[np.where(lane % 16 + 2 > 15, lane, lane + 2)],
        np.full(32, np.packbits(v & 1, bitorder="little").view(np.int32)[0]),
        np.full(32, 1 + 2 + 8 * (v > 50).all()),
        np.full(32, v.sum()),
        np.full(32, v.min()),
        np.full(32, v.max()),
        np.array(
            [int.from_bytes(bytes(b[i] for i in (6, 4, 1, 5)), "little") for b in bytes_of], np.uint32
        ).view(np.int32),
        np.full(32, v.sum()),
    ]
    np.testing.assert_array_equal(out, np.stack(wanted))


@pytest.mark.parametrize("landing", interpreter.LANDINGS)
@pytest.mark.parametrize("size", [0, 3, 8, 16])
def test_asynchronous_copies(dev, landing, size):
    source, out = RNG.integers(0, 256, 512).astype(np.uint8), np.zeros(2048, np.uint8)
    dev.launch("copy_check", 1, 32, [const(source), out, size], shared=2048, landing=landing, seed=9)
    for at, width in ((0, 4), (128, 8), (512, 16)):
        whole = source[: 32 * width]
        cut = np.where(np.arange(32 * width) % width < size, whole, 0)
        np.testing.assert_array_equal(out[at : at + 32 * width], whole)
        np.testing.assert_array_equal(out[1024 + at : 1024 + at + 32 * width], cut)


def test_ldmatrix(dev):
    source = RNG.integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    out = np.zeros((14, 32), np.uint32)
    dev.launch("ldmatrix_check", 1, 32, [const(source), out], shared=512)
    lane = np.arange(32)
    for transposed, starts in ((False, (0, 1, 3)), (True, (7, 8, 10))):
        for count, start in zip((1, 2, 4), starts):
            for i in range(count):
                m = source[i].T if transposed else source[i]
                pair = m[lane // 4, lane % 4 * 2] | m[lane // 4, lane % 4 * 2 + 1].astype(np.uint32) << 16
                np.testing.assert_array_equal(out[start + i], pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_product(dev, dtype):
    a, b, c = sixty_fourths(16, 16).to(dtype), sixty_fourths(8, 16).to(dtype), sixty_fourths(16, 8).float()
    y = c.clone()
    dev.launch(
        "dense_f16_check" if dtype == torch.float16 else "dense_bf16_check",
        1,
        32,
        [const(a), const(b), y],
        shared=1024,
    )
    assert torch.equal(y.double(), a.double() @ b.double().T + c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_product_with_the_metadata_of_torch(dev, dtype):
    """Word l of a 32 x 32 block in torch's CUTLASS layout feeds lane l; selector 0 for rows 0-15, else 1."""
    for _ in range(5):
        w = torch.where(two_of_four(32, 64), sixty_fourths(32, 64), 0.0).to(dtype)
        x = sixty_fourths(8, 64).to(dtype)
        values, meta = sparse_semi_structured_from_dense_cutlass(w)
        words = meta.flatten().view(torch.int32).reshape(2, 32)  # two blocks of 32 columns
        y = torch.zeros(32, 8, dtype=torch.float64)
        for block in range(2):
            part = torch.full((32, 8), float("nan"))
            args = [
                values[:, 16 * block : 16 * block + 16].contiguous(),
                x[:, 32 * block : 32 * block + 32].contiguous(),
                words[block].contiguous(),
            ]
            kernel = "sparse_f16_check" if dtype == torch.float16 else "sparse_bf16_check"
            dev.launch(kernel, 1, 32, [*map(const, args), part], shared=4096)
            y += part
        assert torch.equal(y, w.double() @ x.double().T)


def test_sparse_int8_product_with_the_metadata_of_torch(dev):
    for _ in range(5):
        kept = two_of_four(32, 128)
        w = torch.where(kept, torch.from_numpy(RNG.integers(-127, 128, (32, 128))), 0).to(torch.int8)
        x = torch.from_numpy(RNG.integers(-128, 128, (8, 64))).to(torch.int8)
        values, meta = sparse_semi_structured_from_dense_cutlass(w)
        words = meta.flatten().reshape(2, 2, 32)  # 64 columns, 16 rows, lane
        for block in range(2):
            for half in range(2):
                y = torch.zeros(2, 16, 8, dtype=torch.int32)
                rows = slice(16 * half, 16 * half + 16)
                a = values[rows, 32 * block : 32 * block + 32].contiguous()
                dev.launch(
                    "sparse_s8_check",
                    1,
                    32,
                    [const(a), const(x), const(words[block, half].contiguous()), y],
                    shared=1024,
                )
                assert torch.equal(y[0].long(), w[rows, 64 * block : 64 * block + 64].long() @ x.long().T)
                assert torch.equal(y[1].long(), a.long() @ x[:, :32].long().T + 7)


def test_numbers(dev):
    x = torch.from_numpy(np.concatenate([RNG.normal(size=28), [0.5, 1.0, -2.0, 6.0]]).astype(np.float32))
    out, pairs = torch.zeros(16, 32), torch.zeros(32, dtype=torch.int32)
    dev.launch("number_check", 1, 32, [const(x), out, pairs])
    half, brain, d = x.half().float(), x.bfloat16().float(), x.double()
    exact = [half, brain, x, x, half, -half, brain, -brain, (d * d + 1).float(), (1 / d).float()]
    assert torch.equal(out[:10], torch.stack(exact))
    close = torch.stack(
        [torch.exp2(d), torch.exp(d), 1 / torch.sqrt((x * x).double()), torch.erf(d), torch.tanh(d)]
    )
    assert ((out[10:15] - close).abs() <= 2.0**-21 * close.abs()).all()
    assert torch.equal(out[15], -x)
    assert torch.equal(pairs & 0xFFFF, x.half().view(torch.int16).int() & 0xFFFF)
    assert (pairs >> 16 == 0x3C00).all()


@pytest.mark.parametrize("seed", range(4))
def test_atomics(dev, seed):
    out, total = np.zeros(7, np.int32), np.zeros(1, np.float32)
    dev.launch("atomic_check", 1, 64, [out, total], shared=64, seed=seed)
    assert out[:2].tolist() == [63 * 32, 63]
    assert 1 <= out[2] <= 64
    assert out[3:4].view(np.float32)[0] == 32
    assert out[4:6].tolist() == [128, 63]
    assert 1 <= out[6] <= 64
    assert total[0] == 16


def device_half() -> str:
    text = DEV.read_text(encoding="utf-8")
    return text[text.index("#define LISSOM_KERNEL") :]


def test_every_wrapper_is_used_here():
    used = (HERE / "kernels" / "dev_check.cu").read_text(encoding="utf-8")
    names = set(re.findall(r"LISSOM_DEVICE \w[\w<>:, ]*?[ &*](\w+)\(", device_half()))
    names -= {"dynamic_shared", "pointer", "address", "from_raw"}  # how the others reach memory
    assert len(names) > 40
    assert not {name for name in names if not re.search(rf"\b{name}\b", used)}


def test_every_asm_text_was_executed(dev):
    """Runs last: what the tests above ran has all opcodes of the asm texts of dev.cuh, wherever nvcc put them."""
    texts = re.findall(r'"((?:ld|cp|bar|ldmatrix|cvt)\.[\w.:]+)', device_half())
    texts += [f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32" for t in ("bf16", "f16")]
    texts += [
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{t}.{t}.f32" for t in ("bf16", "f16")
    ]
    texts += ["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"]
    texts += ["mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32"]
    assert len(texts) > 20
    executed: dict[str, bool] = {}
    for kernel in dev.kernels:
        for count, _, text in dev.counts(kernel):
            opcode = re.sub(r"^@!?%\w+\s+", "", text).split()[0]
            executed[opcode] = executed.get(opcode, True) and count > 0
    assert not [text for text in texts if not executed.get(text)]
