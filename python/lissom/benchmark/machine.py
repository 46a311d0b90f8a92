# SPDX-License-Identifier: Apache-2.0
"""The two ceilings of this machine: memory bandwidth and dense arithmetic, as dense code reaches them."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_STREAM_BYTES = 512 << 20
_GEMM = 2048
_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def median_seconds(calls: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, float]:
    """Median time of each call, interleaved A B C A B C so that drift of the machine meets all alike.

    Args:
        calls: name -> function of the round's index (to rotate cold copies).
        rounds: counted rounds, after one warm-up.

    >>> sorted(median_seconds({"a": lambda r: None, "b": lambda r: None}, 3))
    ['a', 'b']
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(-1, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call(index)
            if index >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def onto_huge_pages(address: int, count: int) -> bool:
    """Moves memory that is already written onto huge pages, all but what fills none of them.

    Args:
        address: of the first byte. count: bytes.

    Returns:
        Whether it was done (Linux 6.1 or later; false if there is not one whole page).

    >>> onto_huge_pages(0, 100)
    False
    """
    first = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    length = (address + count) // _HUGE_PAGE * _HUGE_PAGE - first
    if length <= 0 or not sys.platform.startswith("linux"):
        return False
    advise = ctypes.CDLL(None).madvise
    return advise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_COLLAPSE) == 0


def read_gbps(threads: int, *, rounds: int = 5) -> float:
    """Read bandwidth in GB/s: the best of three plain passes over 512 MiB."""
    data = torch.ones(_STREAM_BYTES // 4)
    matrix, vector = data.view(-1, 4096), torch.ones(4096)
    passes = {
        "dot": lambda _: torch.dot(data, data),
        "sum": lambda _: data.sum(),
        "gemv": lambda _: torch.mv(matrix, vector),
    }
    with torch_threads(threads):
        return _STREAM_BYTES / min(median_seconds(passes, rounds).values()) / 1e9


def gemm_gflops(dtype: torch.dtype, threads: int, *, rounds: int = 5) -> float:
    """Dense arithmetic in GFLOP/s: a 2048-cubed product as torch runs it; 256-cubed where that is slow."""

    def rate(size: int, count: int) -> float:
        a = torch.ones(size, size, dtype=dtype)
        return 2 * size**3 / median_seconds({"mm": lambda _: torch.mm(a, a)}, count)["mm"] / 1e9

    with torch_threads(threads):
        small = rate(256, 3)  # a CPU without bf16 units may take minutes for the large one
        return rate(_GEMM, rounds) if small > 20 else small


def measure(*, threads: int = 1, quick: bool = True) -> dict[str, Any]:
    """Both ceilings.

    Args:
        threads: threads of the measurement. quick: three rounds instead of seven.

    Returns:
        `cpu`, `core`, `isa`, `threads`, `gbps` (read, GB/s) and `gflops` {dtype: dense GFLOP/s}.
    """
    import lissom

    rounds = 3 if quick else 7
    info = lissom.cpu_info()
    return {
        "cpu": info["model"],
        "core": info["core"],
        "isa": info["isa"],
        "threads": threads,
        "gbps": read_gbps(threads, rounds=rounds),
        "gflops": {
            str(dtype).removeprefix("torch."): gemm_gflops(dtype, threads, rounds=rounds)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }
