# SPDX-License-Identifier: Apache-2.0
"""The library with CUDA kernels, built against a CPU torch: what it asks for, what it holds, that it is inert."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gate import ROOT
from sass import ARCHITECTURES

import lissom

NEEDED = re.compile(r"lib(c10|torch_cpu|stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so|ld-linux")
OPERATORS = re.findall(r"m\.def\(\s*\"(\w+)\(", (ROOT / "csrc" / "schemas.cpp").read_text(encoding="utf-8"))


def output(*command: str | Path) -> str:
    """What a tool prints; the test is skipped where it is missing."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}; `make cuda-check` fetches CUDA's tools")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def library() -> Path:
    if lissom.build_info()["cuda"] is None:
        pytest.skip("this lissom was built without CUDA kernels; `make cuda-check` builds one with them")
    return Path(lissom._C.__file__)


def has(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"lissom::{operator}", key)


def test_no_cuda_library_is_needed(library):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library))
    assert len(needed) > 3
    assert [name for name in needed if not NEEDED.match(name)] == []


def test_the_cuda_runtime_is_ours_alone(library):
    """A visible cudaMalloc would be replaced by that of torch's own runtime, of another version perhaps."""
    assert "cudaGetDeviceCount" in output("strings", library)
    names = [line.split()[-1] for line in output("nm", "-D", library).splitlines()]
    assert [name for name in names if re.match(r"_*(cuda|cu[A-Z])", name)] == []


def test_there_is_code_for_every_architecture(library):
    files = output("cuobjdump", "--list-elf", "--list-ptx", library)
    cubins = set(re.findall(r"\.(sm_\w+)\.cubin", files))
    ptx = {name.replace("sm_", "compute_") for name in re.findall(r"\.(sm_\w+)\.ptx", files)}
    assert cubins == set(ARCHITECTURES)
    assert set(lissom.cuda_info()["architectures"]) == cubins | ptx


def test_the_gate_has_seen_the_code_that_is_shipped(library, our_kernels):
    gated = {(one.kernel.architecture, one.kernel.symbol): one.kernel.registers for one in our_kernels[0]}
    shipped, architecture = {}, ""
    for line in output("cuobjdump", "--dump-resource-usage", library).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+)", line):
            shipped[architecture, symbol] = int(found[1])
    assert shipped == gated


def test_devices_or_the_reason_why_there_are_none(library):
    info = lissom.cuda_info()
    assert info["toolkit"] == lissom.build_info()["cuda"]
    assert (info["devices"] > 0) == (info["trouble"] is None)
    assert info["trouble"] is None or len(info["trouble"].split()) > 2


def test_cuda_operators_have_a_cpu_kernel_and_a_twin(library):
    for operator in OPERATORS:
        assert has(operator, "CPU"), operator
        assert has(operator, "Meta") or has(operator, "CompositeExplicitAutograd"), operator
    assert any(has(operator, "CUDA") for operator in OPERATORS)


def test_registrations_are_inert_without_a_device(library):
    code = (
        "import lissom, torch\n"
        "weight = torch.tensor([[1.0, 2.0, 0.0, 0.0] * 4] * 16)\n"
        "values, meta = lissom.ops.sparse24_compress(weight)\n"
        "assert torch.equal(lissom.ops.sparse24_decompress(values, meta, 16), weight)\n"
        "info = lissom.cuda_info()\n"
        "assert info['devices'] == 0 and info['trouble'], info\n"
    )
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(library.parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
