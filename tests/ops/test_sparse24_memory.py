# SPDX-License-Identifier: Apache-2.0
"""What sparse24 kernels touch, and who may call them: reads stay inside x, threads do not meet, 2^31 is no limit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lissom
from lissom import ops
from lissom.testing import random_sparse24, tiers

# Inputs end exactly where a page begins that may not be touched (and, a second time, begin where one ends): a read of
# one byte too many is a segmentation fault, in optimised code and with masked loads, which sanitizers do not follow.
GUARDED = """
import ctypes, itertools, mmap, sys
import torch
import lissom
from lissom import ops, testing

PAGE = mmap.PAGESIZE
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
keep = []

def fenced(t, at_end):
    size = t.numel() * t.element_size()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    keep.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (0, pages + 1):
        if mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0):
            raise OSError(ctypes.get_errno())
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    inside = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=offset) if size else t.flatten()
    return inside.copy_(t.flatten()).view(t.shape)

if sys.argv[1:] == ["overrun"]:  # the fence itself works
    t = fenced(torch.ones(8), True)
    ctypes.string_at(t.data_ptr(), 33)
    sys.exit("no fault")
torch.set_num_threads(1)
for kernel in sys.argv[1:]:
    print(kernel, flush=True)
    isa, name, path = kernel.split("-", 2)
    dtype = getattr(torch, name)
    lissom.set_cpu_isa(isa)
    lissom._C.force_path(path)
    for k, at_end in itertools.product((4, 8, 12, 20, 28, 32, 36, 60, 68), (False, True)):
        keep.clear()
        n = 21
        w = testing.random_sparse24(n, k, dtype=dtype)
        values, meta = ops.sparse24_compress(fenced(w, at_end))
        values, meta = fenced(values, at_end), fenced(meta, at_end)
        ops.sparse24_decompress(values, meta, k)
        ops.sparse24_check_meta(meta, k)
        packed = fenced(ops.sparse24_pack(values, meta), at_end)
        ops.sparse24_unpack(packed, n, k)
        bias = fenced(torch.randn(n), at_end)
        for m in (1, 2, 3, 7, 16, 17, 50):
            x, residual = fenced(torch.randn(m, k).to(dtype), at_end), fenced(torch.randn(m, n).to(dtype), at_end)
            y = ops.sparse24_linear(x, packed, n, k, bias, "none", residual)
            assert torch.equal(y, ops.sparse24_linear(x.clone(), packed, n, k, bias, "none", residual.clone()))
            ops.sparse24_grad_input(residual, packed, n, k)
            ops.sparse24_mask_mm(residual, x, meta)
print("inside")
"""


def run_guarded(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LISSOM_AUTOLOAD": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", GUARDED, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_reads_stay_inside_their_tensors(all_kernels):
    answer = run_guarded(*map(str, all_kernels))
    *done, last = answer.stdout.split()
    assert last == "inside", f"{last}: {answer.stderr or f'killed by signal {-answer.returncode}'}"
    assert len(done) == len(all_kernels)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_the_fence_catches_one_byte():
    answer = run_guarded("overrun")
    assert answer.returncode != 0
    assert "no fault" not in answer.stderr


def many_problems():
    cases = []
    for i, dtype in enumerate(lissom.testing.DTYPES * 3):
        n, k, m = 40 + 17 * i, 32 + 12 * i, [1, 5, 40, 70, 16, 33, 90, 2, 64][i]
        packed = ops.sparse24_pack(*ops.sparse24_compress(random_sparse24(n, k, dtype=dtype, seed=i)))
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(i)).to(dtype)
        cases.append((x, packed, n, k))
    return cases


def test_several_python_threads_at_once(isa):
    cases = many_problems()
    wanted = [ops.sparse24_linear(*case) for case in cases]

    def work(i):
        return [torch.equal(ops.sparse24_linear(*cases[j % 9]), wanted[j % 9]) for j in range(i, i + 60)]

    with ThreadPoolExecutor(6) as pool:
        assert all(all(answers) for answers in pool.map(work, range(6)))


def test_switching_tiers_while_others_compute():
    """A product that meets the switch runs wholly in one tier: nothing crashes, every result is a tier's result."""
    cases = many_problems()
    allowed = []
    for x, packed, n, k in cases:
        results = []
        for isa in tiers():
            lissom.set_cpu_isa(isa)
            for path in lissom.testing.paths(isa, x.dtype):
                lissom._C.force_path(path)
                results.append(ops.sparse24_linear(x, packed, n, k))
        lissom._C.force_path("")
        allowed.append(results)
    stop = threading.Event()

    def switch():
        while not stop.is_set():
            for isa in tiers():
                lissom.set_cpu_isa(isa)

    switcher = threading.Thread(target=switch)
    switcher.start()
    try:
        for i in range(400):
            y = ops.sparse24_linear(*cases[i % 9])
            assert any(torch.equal(y, result) for result in allowed[i % 9])
    finally:
        stop.set()
        switcher.join()


def test_the_interpreter_lock_is_released():
    """Other Python threads run in the middle of a product: with the lock held, none could."""
    n, k, m = 1024, 2048, 256
    lissom.set_cpu_isa("portable")
    torch.set_num_threads(1)
    packed = ops.sparse24_pack(*ops.sparse24_compress(random_sparse24(n, k)))
    x, ticks, span = torch.ones(m, k), [], []

    def product():
        span.append(time.perf_counter())
        ops.sparse24_linear(x, packed, n, k)
        span.append(time.perf_counter())

    worker = threading.Thread(target=product)
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0002)
    quarter = (span[1] - span[0]) / 4
    assert sum(span[0] + quarter < tick < span[1] - quarter for tick in ticks) >= 3


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs /proc")
def test_set_num_threads_is_honoured():
    """With one thread no worker of torch's pool gains CPU time; with two, one does."""
    lissom.set_cpu_isa("portable")
    n, k, m = 1024, 1024, 128
    packed = ops.sparse24_pack(*ops.sparse24_compress(random_sparse24(n, k)))
    x = torch.ones(m, k)

    def cpu_of_others() -> int:
        own, total = threading.get_native_id(), 0
        for task in os.listdir("/proc/self/task"):
            if int(task) != own:
                with open(f"/proc/self/task/{task}/stat") as stat:
                    fields = stat.read().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total

    torch.set_num_threads(2)
    wanted = ops.sparse24_linear(x, packed, n, k)
    torch.set_num_threads(1)
    ops.sparse24_linear(x, packed, n, k)
    before = cpu_of_others()
    for _ in range(10):
        assert torch.equal(ops.sparse24_linear(x, packed, n, k), wanted)
    assert cpu_of_others() - before <= 1
    torch.set_num_threads(2)
    before = cpu_of_others()
    for _ in range(40):  # about a second of work: many ticks of 10 ms for a worker, were there one
        ops.sparse24_linear(x, packed, n, k)
    assert cpu_of_others() - before >= 5


# --- more than 2^31 elements: a few GiB each


def needs_gib(size: int) -> None:
    with open("/proc/meminfo") as info:
        free = next(int(line.split()[1]) for line in info if line.startswith("MemAvailable")) >> 20
    if free < size:
        pytest.skip(f"needs {size} GiB of free memory; this machine has {free}")


@pytest.mark.slow
def test_more_than_2_31_elements_of_x_and_y():
    """[M, K] and [M, N] both beyond: rows from far behind must be what they are alone."""
    needs_gib(18)
    m, n, k = (1 << 26) + 70, 33, 32
    packed = ops.sparse24_pack(*ops.sparse24_compress(random_sparse24(n, k, dtype=torch.bfloat16)))
    row = torch.randn(1, k).bfloat16()
    x = row.expand(m, k).contiguous()
    marked = [0, (1 << 31) // k, (1 << 31) // k + 1, m - 1]
    for i in marked:
        x[i] = i % 7 + 1
    y = ops.sparse24_linear(x, packed, n, k)
    assert x.numel() > 1 << 31
    assert y.numel() > 1 << 31
    for i in [*marked, 5, (1 << 31) // n, m - 2]:
        assert torch.equal(y[i], ops.sparse24_linear(x[i : i + 1], packed, n, k)[0]), i


@pytest.mark.slow
def test_more_than_2_31_elements_of_w():
    """N K beyond 2^31: every step of the format, and products of the last rows."""
    needs_gib(14)
    k = 4096
    n = (1 << 31) // k + 40
    block = random_sparse24(64, k, dtype=torch.bfloat16)
    values, meta = ops.sparse24_compress(block)
    rows = torch.arange(n) * 7 % 64
    values, meta = values[rows], meta[rows]
    packed = ops.sparse24_pack(values, meta)
    del values, meta
    x = torch.randn(2, k).bfloat16()
    y = ops.sparse24_linear(x, packed, n, k)
    alone = ops.sparse24_linear(x, ops.sparse24_pack(*ops.sparse24_compress(block)), 64, k)
    assert torch.equal(y, alone[:, rows])
    again, meta = ops.sparse24_unpack(packed, n, k)
    del packed
    assert torch.equal(ops.sparse24_decompress(again[-80:], meta[-80:], k), block[rows[-80:]] + 0.0)
    dense = ops.sparse24_decompress(again, meta, k)
    del again, meta
    assert dense.numel() > 1 << 31
    assert torch.equal(dense[-1], block[rows[-1]] + 0.0)
    assert ops.sparse24_check(dense) == (True, -1, -1)
    dense[n - 1, k - 3 :] = 1
    assert ops.sparse24_check(dense) == (False, n - 1, k // 4 - 1)
