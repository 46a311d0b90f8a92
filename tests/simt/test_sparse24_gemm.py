# SPDX-License-Identifier: Apache-2.0
"""The 2:4 GEMM and GEMV on the executor: test_sparse24_gemm.cpp."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BF16, INT8 = 1, 3
GEMV = -1


def run(program: Path, *arguments: object) -> str:
    answer = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def program(simt) -> Path:
    return simt.program("test_sparse24_gemm.cpp")


def test_no_error_on_exact_inputs(program):
    """Every tile, type and tail."""
    assert run(program, "values").endswith(" checks, 0 failed\n")


def test_no_access_astray(simt):
    """Every tile over its edges, with sanitizers."""
    assert run(simt.program("test_sparse24_gemm.cpp", sanitize=True), "edges").endswith(" checks, 0 failed\n")


def test_no_error_in_any_order(program):
    """Each tile in 26 orders of threads and landings of copies."""
    assert run(program, "schedules").endswith(" checks, 0 failed\n")


def test_every_barrier_and_wait_is_needed(program):
    """In every tile each one left out, and each wait one group too weak, is reported whatever the schedule."""
    lines = run(program, "mutants").splitlines()
    assert lines.pop() == "81 mutants, 81 killed, 0 survivors"
    for line in lines[2:]:
        reported = re.search(r"\| (\d+) of (\d+) \|", line)
        assert reported is not None
        assert reported[1] == reported[2], line


# tile, m, n, k, type, splits: whole tiles, and the bytes of W, of x as often as a row of tiles reads it, and of y.
@pytest.mark.parametrize(
    "case",
    [
        (0, 256, 512, 512, BF16, 1),
        (2, 128, 256, 512, INT8, 1),
        (5, 16, 128, 1024, BF16, 2),
        (GEMV, 4, 128, 2048, BF16, 1),
    ],
)
def test_traffic(program, case):
    """No bank conflict, no half-used sector, and hardly a byte that need not move."""
    tile, m, n, k, dtype, splits = case
    kernels = json.loads(run(program, "counters", *case))
    main = kernels[0] if "reduce" not in kernels[0]["kernel"] else kernels[1]
    for kernel in kernels:
        for place in kernel["shared"]:
            assert place["wavefronts"] == place["ideal"], place
        for place in kernel["global"]:
            few = (
                "reduce" in kernel["kernel"] and place["operation"] == "load"
            )  # its bias, four rows a thread
            assert place["sectors"] == place["ideal"] or few, place
    size = 1 if dtype == INT8 else 2
    weights = n * k // 2 * size + n * k // 8  # values, and four bits a pair
    y = m * n * 2 if splits == 1 else splits * m * n * 4
    assert main["read_footprint"] + main["write_footprint"] <= 1.05 * (weights + m * k * size + y)
    rows, tokens = {0: (256, 128), 2: (128, 64), 5: (64, 16), GEMV: (32, 4)}[tile]
    moved = sum(place["sectors"] * 32 for place in main["global"])
    assert moved <= 1.05 * (weights * (m / tokens) + m * k * size * (n / rows) + y)
