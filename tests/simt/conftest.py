# SPDX-License-Identifier: Apache-2.0
"""`build`: programs that run kernels on the executor."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
EXECUTOR = [HERE / f"{name}.cpp" for name in ("executor", "memory", "counters")]

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(*sources, flags=(), first=None): a program of these files and the executor, each compiled once a session.

    The first file looks for headers in the folder `first` before ours.
    """
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("simt")
    made: dict[object, Path] = {}

    def compiled(source: Path, flags: tuple[str, ...]) -> Path:
        if (source, flags) not in made:
            target = made[source, flags] = folder / f"{len(made)}.o"
            command = [COMPILER, "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-DLISSOM_SIMT", *flags]
            command += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-c", "-x", "c++", str(source), "-o", str(target)]
            subprocess.run(command, check=True)
        return made[source, flags]

    def program(*sources: Path, flags: tuple[str, ...] = (), first: Path | None = None) -> Path:
        changed = (f"-I{first}",) if first else ()
        objects = [compiled(sources[0], (*changed, *flags))]
        objects += [compiled(source, flags) for source in (*sources[1:], *EXECUTOR)]
        target = folder / f"{objects[0].stem}.program"
        command = [COMPILER, *flags, "-rdynamic", *map(str, objects), "-o", str(target), "-ldl"]
        subprocess.run(command, check=True)
        return target

    return program
