# SPDX-License-Identifier: Apache-2.0
"""The 2:4 kernels that check, compress, pack and back on the executor: test_sparse24_format.cpp."""

from __future__ import annotations

import json
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
    return build("test_sparse24_format.cpp", CPU)


@pytest.fixture(scope="module")
def plain(simt) -> Path:
    return simt.program("test_sparse24_format.cpp", CPU)


def test_every_bit_is_that_of_the_cpu(program):
    assert run(program, "formats").endswith(" checks, 0 failed\n")


def test_the_barrier_is_needed(plain):
    reported, by_value = run(plain, "mutants").splitlines()
    assert "26 of 26 reported" in reported
    assert not by_value.split(":")[1].startswith(" 0 of")


def test_memory_is_touched_in_whole_sectors(plain):
    """But for the metadata, a byte for two lanes and for 8 values, and the unpacking of lanes into rows."""
    kernels = {k["kernel"].split("(")[0].split("::")[-1]: k for k in json.loads(run(plain, "counters"))}
    assert set(kernels) == {
        "verdict_kernel",
        "check_kernel<unsigned short>",
        "compress_kernel<unsigned short, false>",
        "decompress_kernel<unsigned short>",
        "pack_kernel<2>",
        "unpack_kernel<2>",
    }
    for name, kernel in kernels.items():
        if name == "verdict_kernel":
            continue
        moved = kernel["read_footprint"] + kernel["write_footprint"]
        dense = 64 * 512 * 2  # bytes of w
        least = {"check": dense + 512, "pack": dense * 9 // 8, "unpack": dense * 9 // 8}.get(
            name.split("_")[0], dense * 25 // 16
        )
        assert moved <= 1.05 * least, name
        for place in kernel["global"]:
            if place["operation"] == "store" or name.startswith(("check", "compress", "decompress")):
                assert place["sectors"] == place["ideal"], (name, place)


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("format.cuh", "j < i ? magnitude(quad[j]) >=", "j < i ? magnitude(quad[j]) >"),
        ("pack.cuh", "(4 * t + 16 * (r / 2)) / (2 * Bytes)", "(4 * t + 8 * (r / 2)) / (2 * Bytes)"),
    ],
)
def test_a_planted_fault_is_found(simt, tmp_path, file, right, wrong):
    """A few, as each is a build: the comparison with the CPU does see what the kernels do."""
    folder = tmp_path / "sparse24" / "cuda"
    folder.mkdir(parents=True)
    text = (CPU.parents[1] / "cuda" / file).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (folder / file).write_text(text.replace(right, wrong), encoding="utf-8")
    broken = simt.program("test_sparse24_format.cpp", CPU, flags=(f"-I{tmp_path}",))
    answer = subprocess.run([str(broken), "formats"], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "FAILED" in answer.stdout
