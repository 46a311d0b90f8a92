# SPDX-License-Identifier: Apache-2.0
"""Compiles and runs test_layout.cpp: the packed format's index maths without Python, torch or a kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build_and_run(folder: Path, source: Path, include: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "test"
    command = [
        COMPILER,
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        f"-I{include}",
        str(source),
        "-o",
        str(program),
    ]
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        command += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run(command, check=True)
    return subprocess.run([str(program)], capture_output=True, text=True)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_layout(tmp_path):
    answer = build_and_run(tmp_path, Path(__file__).with_name("test_layout.cpp"), ROOT / "csrc")
    assert (answer.returncode, answer.stdout) == (0, "layout: ok\n"), answer.stderr


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("sparse24/layout.h", "case 0x1: return 0xC;", "case 0x1: return 0x8;"),
        ("sparse24/layout.h", ": q * 64 + slot * 2", ": q * 64 + slot * 4"),
        ("sparse24/layout.h", "q / 2 * 64 + q % 2 * 2", "q / 2 * 64 + q % 2"),
        ("sparse24/layout.h", "t == DType::i8 ? kPanelRows * 4", "t == DType::i8 ? kPanelRows * 2"),
        ("sparse24/layout.h", "kMostInt8Columns = 262140", "kMostInt8Columns = 262144"),
        ("core/types.h", "u + 0x7fffu +", "u + 0x8000u +"),
    ],
)
def test_a_wrong_constant_is_found(tmp_path, file, right, wrong):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    broken = tmp_path / "csrc" / file
    text = broken.read_text(encoding="utf-8")
    assert right in text
    broken.write_text(text.replace(right, wrong), encoding="utf-8")
    answer = build_and_run(tmp_path, Path(__file__).with_name("test_layout.cpp"), tmp_path / "csrc")
    assert answer.returncode != 0
