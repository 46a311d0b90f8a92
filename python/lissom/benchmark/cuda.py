# SPDX-License-Identifier: Apache-2.0
"""Times of the 2:4 linear on a GPU beside those of cuBLAS and the predictions; for `lissom selftest --device cuda`."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from lissom import ops
from lissom.benchmark import predict

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SHAPES = ((4096, 4096), (8192, 8192))  # N, K
REPEATS = 15
COLD_ROWS = 16  # up to here the weights decide, and a model never finds them in the cache
_SLEEP = 20_000_000  # cycles: the host queues everything meanwhile, so that no gap of its own is timed


def driver_version() -> str:
    """Of the installed driver, or what can be known of it."""
    tool = shutil.which("nvidia-smi")
    if tool:
        asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    return "unknown (no nvidia-smi)"


def run(dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """Rows of `predict.predict` for this device, with `measured_us` and `dense_measured_us`: medians, interleaved."""
    rows = []
    for n, k in SHAPES:
        weights = _Weights(n, k, dtype)
        for m in ROWS:
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            ours, dense = _interleaved(weights.contenders(x), cold=m <= COLD_ROWS, copies=weights.copies)
            row = predict.predict(f"cuda:{torch.cuda.current_device()}", _name(dtype), m, n, k)
            rows.append(
                {**row, "measured_us": ours, "dense_measured_us": dense, "measured_ratio": dense / ours}
            )
    return rows


class _Weights:
    """As many copies of W, packed and dense, as the L2 cache cannot hold."""

    def __init__(self, n: int, k: int, dtype: torch.dtype) -> None:
        w = torch.randn(n, k, device="cuda", dtype=dtype)
        self.n, self.k = n, k
        packed = ops.sparse24_pack(*ops.sparse24_compress(w, pattern="magnitude"))
        cache = torch.cuda.get_device_properties(w.device).L2_cache_size
        self.copies = max(2, 1 + -(-3 * cache // packed.numel()))
        self.packed = [packed.clone() for _ in range(self.copies)]
        self.dense = [w.clone() for _ in range(self.copies)]

    def contenders(self, x: torch.Tensor) -> list[Callable[[int], torch.Tensor]]:
        return [
            lambda i: ops.sparse24_linear(x, self.packed[i], self.n, self.k),
            lambda i: torch.nn.functional.linear(x, self.dense[i]),
        ]


def _interleaved(contenders: list[Callable[[int], torch.Tensor]], *, cold: bool, copies: int) -> list[float]:
    """Median microseconds of each on the stream; cold: every call meets another copy of W."""
    for call in contenders:
        call(0)
    torch.cuda.synchronize()
    events = []
    torch.cuda._sleep(_SLEEP)
    for turn in range(REPEATS):
        for which, call in enumerate(contenders):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call(turn % copies if cold else 0)
            end.record()
            events.append((which, begin, end))
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in contenders]
    for which, begin, end in events:
        times[which].append(1e3 * begin.elapsed_time(end))
    return [statistics.median(found) for found in times]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; what was measured and what was predicted stand apart."""
    lines = [
        "| dtype | M | N | K | kernel | measured µs | predicted µs | cuBLAS, measured µs | ratio measured "
        "| ratio predicted |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        kernel = (
            "gemv" if row["tile"] is None else f"{row['tile'][0]} x {row['tile'][1]}, k / {row['splits']}"
        )
        sizes = " | ".join(str(row[name]) for name in ("dtype", "M", "N", "K"))
        lines.append(
            f"| {sizes} | {kernel} | {row['measured_us']:.1f} | {row['us']:.1f} | {row['dense_measured_us']:.1f} "
            f"| {row['measured_ratio']:.2f} | {row['ratio']:.2f} |"
        )
    lines += [
        "",
        f"Measured: medians of {REPEATS} by CUDA events, interleaved, W cold for M <= {COLD_ROWS}; an event costs "
        "about a microsecond. Predicted: on paper, and its ratio against a dense product at its own bound.",
    ]
    return "\n".join(lines)
