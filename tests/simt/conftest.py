# SPDX-License-Identifier: Apache-2.0
"""Builds programs that run kernels on the executor."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXECUTOR = ("executor.cpp", "memory.cpp", "counters.cpp")
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror")
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


class Builder:
    """Compiles sources (.cpp, .cu) against dev.cuh's host half and links the executor, each object once a session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        # A sanitizer that was preloaded for torch would get in the way of the programs' own.
        self.environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}

    def _compile(self, source: Path, flags: tuple[str, ...]) -> Path:
        target = self.folder / f"{source.name}-{abs(hash((source, flags)))}.o"
        if not target.exists():
            command = [self.compiler, "-std=c++20", *WARNINGS, *flags, "-DLISSOM_SIMT"]
            command += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", str(source), "-o", str(target)]
            subprocess.run(command, check=True, env=self.environment)
        return target

    def program(self, *sources: str | Path, sanitize: bool = False, flags: tuple[str, ...] = ()) -> Path:
        """Path of the program made of `sources` (names in this folder, or paths), warnings being errors.

        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer. flags: of the first source only.
        """
        base = SANITIZERS if sanitize else ("-O1",)
        objects = [self._compile(HERE / sources[0], (*base, *flags))]
        objects += [self._compile(HERE / source, base) for source in (*sources[1:], *EXECUTOR)]
        target = self.folder / f"{Path(sources[0]).stem}-{abs(hash(tuple(objects)))}"
        if not target.exists():
            # -rdynamic: reports and counters find the kernels' names.
            link = [self.compiler, *base, "-rdynamic", *map(str, objects), "-o", str(target), "-ldl"]
            subprocess.run(link, check=True, env=self.environment)
        return target

    def run(self, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment)


@pytest.fixture(scope="session")
def simt(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    builder = Builder(tmp_path_factory.mktemp("simt"))
    if builder.compiler is None:
        pytest.skip("no C++ compiler")
    return builder


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "sanitized"])
def build(request: pytest.FixtureRequest, simt: Builder) -> Callable[..., Path]:
    """simt.program, plain and with sanitizers."""
    return lambda *sources, **options: simt.program(*sources, sanitize=request.param, **options)
