# SPDX-License-Identifier: Apache-2.0
"""The 2:4 weight gradient and the transposed product on the executor: test_sparse24_gradients.cpp."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

CPU = Path(__file__).resolve().parents[2] / "csrc" / "sparse24" / "cpu" / "sparse24_format.cpp"


def run(program: Path, what: str) -> str:
    answer = subprocess.run([str(program), what], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def program(build) -> Path:
    return build("test_sparse24_gradients.cpp", CPU)


@pytest.fixture(scope="module")
def plain(simt) -> Path:
    return simt.program("test_sparse24_gradients.cpp", CPU)


def test_no_error_on_exact_inputs(program):
    assert run(program, "values").endswith(" checks, 0 failed\n")


def test_no_error_in_any_schedule(plain):
    assert run(plain, "schedules").endswith(" checks, 0 failed\n")


def test_every_barrier_and_wait_is_needed(plain):
    """Each left out, and the wait one group too weak, is reported in every schedule; all of them show in the values."""
    lines = run(plain, "mutants").splitlines()
    assert lines.pop() == "0 survivors"
    table = [
        re.match(r"(\w+) (\d) (left out|weaker): (\d+) of (\d+) reported, (\d+) by values", line)
        for line in lines
    ]
    assert len(table) == 12
    for row in table:
        assert row is not None
        reported, tried, by_values = map(int, row.groups()[3:])
        wanted = tried if row[2] != "0" else 0
        assert (reported, by_values > 0) == (wanted, wanted > 0), row[0]


def test_traffic(plain):
    """Shared memory without bank conflicts; whole sectors, but for 8 of 16 bytes of metadata; nothing read in vain."""
    for kernel in json.loads(run(plain, "counters")):
        for place in kernel["shared"]:
            assert place["wavefronts"] == place["ideal"], (kernel["kernel"], place)
        spare = sum(place["sectors"] - place["ideal"] for place in kernel["global"])
        assert spare <= 0.07 * sum(place["ideal"] for place in kernel["global"])
        tokens = 128 if ", 64>" in kernel["kernel"] else 256
        operands = 2 * 256 * tokens + (
            2 * 256 * tokens + 256 * 32 if "mask" in kernel["kernel"] else 256 * 256 * 9 // 8
        )
        assert kernel["read_footprint"] <= 1.01 * operands
