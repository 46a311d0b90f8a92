# SPDX-License-Identifier: Apache-2.0
"""When CMakeLists.txt compiles the CUDA kernels, and what it says when it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gate import ROOT


def fake_torch(folder: Path, *, cuda: bool) -> Path:
    """The installed torch, with what marks a CUDA build or without it."""
    installed = Path(torch.__file__).parent
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(installed / "include")
    for name in ("libc10.so", "libtorch_cpu.so"):
        (folder / "lib" / name).symlink_to(installed / "lib" / name)
    if cuda:
        (folder / "lib" / "libtorch_cuda.so").touch()
    return folder


def path_without_nvcc(folder: Path) -> str:
    """PATH as it is, but folders that have an nvcc give way to one with links to all else that they have."""
    parts = []
    for i, part in enumerate(os.environ["PATH"].split(os.pathsep)):
        if not Path(part, "nvcc").exists():
            parts.append(part)
            continue
        parts.append(str(folder / str(i)))
        Path(parts[-1]).mkdir(parents=True)
        for program in Path(part).iterdir():
            if program.name != "nvcc":
                Path(parts[-1], program.name).symlink_to(program)
    return os.pathsep.join(parts)


def configure(folder: Path, *, choice: str, cuda_torch: bool, nvcc: str | None) -> tuple[bool, str]:
    """Runs CMake's first half.

    Args:
        choice: LISSOM_CUDA.
        cuda_torch: whether torch is a CUDA build.
        nvcc: the release it says it is; "real" takes the one of PATH, None has none.

    Returns:
        Whether CUDA kernels are in the plan, and what CMake said.
    """
    pybind11 = pytest.importorskip("pybind11")
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    path = os.environ["PATH"] if nvcc == "real" else path_without_nvcc(folder / "bin")
    if nvcc not in (None, "real"):
        script = folder / "nvcc" / "nvcc"
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {nvcc}, V{nvcc}.1"\n')
        script.chmod(0o755)
        path = f"{script.parent}{os.pathsep}{path}"
    build = folder / "build"
    settings = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "LISSOM_TORCH": str(fake_torch(folder / "torch", cuda=cuda_torch)),
        "LISSOM_CUDA": choice,
    }
    command = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *[f"-D{k}={v}" for k, v in settings.items()]]
    answer = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    plan = build / "build.ninja"
    said = " ".join((answer.stdout + answer.stderr).split())
    return plan.exists() and "device.cu" in plan.read_text(), said


@pytest.mark.parametrize(
    "choice, cuda_torch, nvcc, said",
    [
        ("AUTO", False, "13.0", "No CUDA kernels: torch is no CUDA build"),
        ("AUTO", True, None, "No CUDA kernels: no nvcc in PATH"),
        ("AUTO", True, "12.4", "is of release 12.4, 13.0 or newer is needed"),
        ("OFF", True, "13.0", "No CUDA kernels: LISSOM_CUDA=0"),
    ],
)
def test_a_cpu_build_says_why(tmp_path, choice, cuda_torch, nvcc, said):
    planned, log = configure(tmp_path, choice=choice, cuda_torch=cuda_torch, nvcc=nvcc)
    assert not planned
    assert said in log
    assert "Generating done" in log


@pytest.mark.parametrize("nvcc, said", [(None, "no nvcc in PATH"), ("12.4", "13.0 or newer is needed")])
def test_asked_for_and_impossible_is_an_error(tmp_path, nvcc, said):
    planned, log = configure(tmp_path, choice="ON", cuda_torch=False, nvcc=nvcc)
    assert not planned
    assert "LISSOM_CUDA=1 asks for CUDA kernels" in log
    assert said in log
    assert "Generating done" not in log


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("choice, cuda_torch", [("AUTO", True), ("ON", False)])
def test_cuda_kernels_are_in_the_plan(tmp_path, choice, cuda_torch):
    planned, log = configure(tmp_path, choice=choice, cuda_torch=cuda_torch, nvcc="real")
    assert planned, log


def test_a_wrong_wish_is_one_sentence(tmp_path):
    settings = {**os.environ, "LISSOM_CUDA": "yes"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    answer = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert answer.returncode != 0
    assert "LISSOM_CUDA must be 1 (CUDA kernels), 0 (none) or unset; got 'yes'" in answer.stderr
