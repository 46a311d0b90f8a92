# SPDX-License-Identifier: Apache-2.0
"""The counts behind every prediction (csrc/sparse24/cuda/plan.h) against those of the executor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BF16, F16, INT8 = 1, 2, 3
GEMV = -1


# tile, m, n, k, type, splits
@pytest.mark.parametrize(
    "case",
    [
        (0, 128, 256, 256, BF16, 1),
        (3, 64, 128, 512, F16, 2),
        (2, 64, 128, 2048, INT8, 1),  # long: scales and bias are not in the model
        (5, 16, 128, 1024, BF16, 2),
        (9, 8, 64, 1024, BF16, 1),
        (GEMV, 2, 96, 1024, BF16, 1),
    ],
    ids=lambda case: f"tile {case[0]}, {case[1]}x{case[2]}x{case[3]}",
)
def test_counts_of_the_model_are_those_of_the_executor(simt, case):
    executor = simt.program(HERE / "test_sparse24_gemm.cpp")
    answer = simt.run(executor, "counters", *case)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    kernels = json.loads(answer.stdout)
    main = next(kernel for kernel in kernels if "reduce" not in kernel["kernel"])
    model = simt.run(simt.program("test_sparse24_counts.cpp"), *case).stdout.split()
    blocks, _, matrix, wavefronts, copied, moved = map(int, model)

    _, m, n, _, _, splits = case
    assert main["blocks"] == blocks
    assert sum(main["matrix"].values()) == matrix
    counted = sum(place["wavefronts"] for place in main["shared"])
    assert counted == wavefronts
    y = m * n * (4 * splits if splits > 1 else 2)
    read = 32 * sum(place["sectors"] for place in main["global"]) - y
    assert read == pytest.approx(copied, rel=0.02)
    # What crosses the bus: W, x, y once each.
    footprint = main["read_footprint"] + main["write_footprint"]
    assert footprint - y + 2 * m * n == pytest.approx(moved, rel=0.02)
