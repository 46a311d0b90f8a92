# SPDX-License-Identifier: Apache-2.0
"""The 2:4 format and gradient kernels as nvcc compiled them, by their launchers over the stand-in runtime."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import interpreter
import pytest
import torch
from interpreter import buffers, const, launchers

from lissom.reference import sparse24 as twin
from lissom.testing import random_sparse24

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "sparse24" / "cuda"
HALVES = (torch.bfloat16, torch.float16)
HEADER, OPT_IN = 128, 48 * 1024
# landing and seed of the blocks' and warps' order: forward, reverse, random
WAYS = list(itertools.product(interpreter.LANDINGS, (0, 1, 2)))


@pytest.fixture(scope="module")
def library(nvcc) -> ctypes.CDLL:
    return launchers([CUDA / f"{name}.cu" for name in ("format", "pack", "mask_mm", "grad_input")])


def way(index: int) -> None:
    landing, seed = WAYS[index % len(WAYS)]
    interpreter.library().ptx_set_options(ctypes.byref(interpreter.options(landing, seed)))


def call(library: ctypes.CDLL, name: str, *arguments: object, **memory: object) -> int:
    """A launcher on tensors and numbers. `memory`: what it may touch, const() where it may only read."""
    plain = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in arguments
    ]
    with buffers(**memory):
        return getattr(library, f"lissom_sparse24_{name}")(*plain, None)


def launches() -> list[list[str]]:
    return [line.split("\t") for line in interpreter.library().ptx_launches().decode().splitlines()]


def check(library, w: torch.Tensor) -> list[int]:
    scratch, verdict = torch.empty(max(w.shape[0], 1), dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    error = call(
        library, "check", w, *w.shape, w.element_size(), scratch, verdict, w=const(w), s=scratch, v=verdict
    )  # fmt: skip
    assert error == 0, interpreter.error()
    return verdict.tolist()


@pytest.mark.parametrize(
    ("index", "n", "k"), [(i, n, k) for i, (n, k) in enumerate([(0, 8), (1, 4), (9, 136), (300, 12)])]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_format(library, index, n, k, dtype):
    way(index)
    w = random_sparse24(n, k, dtype=dtype, full=0.7)
    assert check(library, w) == [1, -1, -1, 0]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    dense = torch.randn(n, k).round(decimals=1).to(dtype)  # ties and zeros
    for source, magnitude in ((w, 0), (dense, 1)):
        values, meta = (
            torch.empty(n, k // 2, dtype=dtype),
            torch.empty(n, twin.meta_columns(k), dtype=torch.uint8),
        )
        arguments = (source, values, meta, n, k, dtype.itemsize, magnitude)
        assert call(library, "compress", *arguments, w=const(source), v=values, m=meta) == 0, (
            interpreter.error()
        )
        wanted = twin.compress(source, pattern="magnitude" if magnitude else "auto")
        assert torch.equal(values.view(bits), wanted[0].view(bits))
        assert torch.equal(meta, wanted[1])
        again = torch.empty(n, k, dtype=dtype)
        arguments = (values, meta, again, n, k, dtype.itemsize)
        assert call(library, "decompress", *arguments, v=const(values), m=const(meta), w=again) == 0
        assert torch.equal(again, twin.decompress(*wanted, k))
        kept = torch.empty_like(values)
        arguments = (again, meta, kept, n, k, dtype.itemsize)
        assert call(library, "gather", *arguments, v=kept, m=const(meta), w=const(again)) == 0
        assert torch.equal(kept, values)


def test_first_bad_quad(library):
    way(2)
    w = torch.zeros(600, 140)
    w[[599, 257, 300], 8:11] = 1
    w[257, 136:140] = 1
    assert check(library, w) == [0, 257, 2, 3]
    meta = torch.full((40, 18), 0xEE, dtype=torch.uint8)
    meta[:, 17] = 0xE
    scratch, verdict = torch.empty(40, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    memory = {"m": const(meta), "s": scratch, "v": verdict}
    for changes, wanted in (
        ((), [1, -1, -1, 0]),
        ([(33, 17, 0x1E)], [0, 33, 35, 1]),
        ([(33, 2, 0xF4)], [0, 33, 5, 15]),
    ):
        for row, column, byte in changes:
            meta[row, column] = byte
        assert call(library, "check_meta", meta, 40, 140, scratch, verdict, **memory) == 0, (
            interpreter.error()
        )
        assert verdict.tolist() == wanted


@pytest.mark.parametrize(
    ("index", "n", "k"), [(i, n, k) for i, (n, k) in enumerate([(0, 4), (1, 4), (33, 68), (70, 132)])]
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pack(library, index, n, k, dtype):
    way(index)
    values, meta = twin.compress(random_sparse24(n, k, dtype=dtype, full=0.8))
    wanted = twin.pack(values, meta, "sm80-v1")
    packed = torch.full_like(wanted, 0x55)
    code = twin.DTYPES.index(dtype)
    assert (
        call(library, "pack", values, meta, packed, n, k, code, v=const(values), m=const(meta), p=packed) == 0
    )
    assert torch.equal(packed, wanted)
    values_again, meta_again = torch.empty_like(values), torch.empty_like(meta)
    memory = {"v": values_again, "m": meta_again, "p": const(packed)}
    assert call(library, "unpack", packed, values_again, meta_again, n, k, code, **memory) == 0
    assert torch.equal(values_again, values)
    assert torch.equal(meta_again, meta)


def exact(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Multiples of 1/64 in [-1, 1], whose sums of products are exact; rows on 16 bytes, NaN between them."""
    padded = torch.full((rows, -(-columns // 8) * 8 + 8), torch.nan).to(dtype)
    padded[:, :columns] = torch.randint(-64, 65, (rows, columns)) / 64
    return padded


@pytest.mark.parametrize(
    ("index", "m", "n", "k"),
    [(i, *s) for i, s in enumerate([(33, 130, 132), (1, 3, 4), (0, 5, 8), (161, 20, 36), (129, 128, 128)])],
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mask_mm(library, index, m, n, k, dtype):
    way(index + (dtype == torch.float16))
    torch.manual_seed(index)
    dy, x = exact(m, n, dtype), exact(m, k, dtype)
    meta = twin.compress(random_sparse24(n, k, dtype=dtype))[1]
    values = torch.full((n, k // 2), 7.0, dtype=dtype)
    code = twin.DTYPES.index(dtype)
    arguments = (code, dy, dy.shape[1], x, x.shape[1], meta, values, m, n, k)
    memory = {"dy": const(dy), "x": const(x), "meta": const(meta), "values": values}
    assert call(library, "mask_mm", *arguments, **memory) == 0, interpreter.error()
    assert torch.equal(values, twin.mask_mm(dy[:, :n], x[:, :k], meta))
    kernel, grid, threads, shared, *_ = launches()[-1]
    assert "mask_mm_kernel" in kernel
    assert (grid, threads) == (f"{-(-n // 128) * -(-k // 128)},1,1", "256,1,1")
    assert int(shared) > OPT_IN  # so the stand-in has seen the request for it


@pytest.mark.parametrize(
    ("index", "m", "n", "k"),
    [(i, *s) for i, s in enumerate([(130, 33, 132), (1, 3, 4), (5, 0, 8), (20, 161, 36), (128, 64, 128)])],
)
@pytest.mark.parametrize("rows", [64, 128])
def test_grad_input(library, index, m, n, k, rows):
    dtype = HALVES[(index + rows // 64) % 2]
    way(index + rows // 64)
    torch.manual_seed(index)
    dy, code = exact(m, n, dtype), twin.DTYPES.index(dtype)
    w = torch.randint(-64, 65, (n, k)) / 64
    values, meta = twin.compress(w.to(dtype), pattern="magnitude")
    packed = twin.pack(values, meta, "sm80-v1")
    dx = torch.full((m, k), 7.0, dtype=dtype)
    arguments = (code, rows, dy, dy.shape[1], packed[HEADER:], dx, m, n, k)
    memory = {"dy": const(dy), "packed": const(packed), "dx": dx}
    assert call(library, "grad_input", *arguments, **memory) == 0, interpreter.error()
    assert torch.equal(dx, (dy[:, :n].float() @ twin.decompress(values, meta, k).float()).to(dtype))
    _, grid, threads, shared, *_ = launches()[-1]
    assert (grid, threads) == (f"{-(-m // rows) * -(-k // 128)},1,1", "256,1,1")
    assert int(shared) == 2 * (4 * rows * 32 + 2 * 32 * 128)


def test_wrong_arguments_and_errors_come_back(library):
    room = torch.zeros(4096, dtype=torch.uint8)
    invalid = 1
    assert call(library, "check", room, 1, 4, 3, room, room) == invalid
    assert call(library, "pack", room, room, room, 1, 4, 0) == invalid
    assert call(library, "mask_mm", 0, room, 8, room, 8, room, room, 1, 4, 4) == invalid
    assert call(library, "mask_mm", 1, room, 12, room, 8, room, room, 1, 4, 4) == invalid
    assert call(library, "grad_input", 1, 32, room, 8, room, room, 1, 4, 4) == invalid
    assert launches() == []
    for name, error in (("cudaFuncSetAttribute", 98), ("cudaLaunchKernel", 719)):
        interpreter.library().ptx_inject(name.encode(), 1, error)
        assert call(library, "mask_mm", 1, room, 8, room, 8, room, room, 1, 4, 4, room=room) == error
    interpreter.library().ptx_inject(b"cudaLaunchKernel", 1, 719)
    verdict = torch.zeros(4, dtype=torch.int64)
    assert call(library, "check", room, 1, 4, 2, room, verdict, room=room, verdict=verdict) == 719
    assert launches() == []  # the second kernel is not started behind a failed first
