# SPDX-License-Identifier: Apache-2.0
"""The tracked files, which the house rules are about."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE_SUFFIXES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".sh"}
BINARY_SUFFIXES = {".safetensors", ".png", ".jpg", ".gz"}
ISA_UNIT = re.compile(r"_(avx2|avx512|avx512x|amx)\.cpp$")


def is_code(file: Path) -> bool:
    return file.parts[0] == ".ci" or file.suffix in CODE_SUFFIXES


# fixture -> which tracked files it goes through
KINDS: dict[str, Callable[[Path], bool]] = {
    "text_file": lambda file: file.suffix not in BINARY_SUFFIXES,
    "code": is_code,
    "package_code": lambda file: is_code(file) and file.parts[0] in ("python", "csrc"),
    "python": lambda file: file.suffix == ".py",
    "library": lambda file: file.suffix == ".py" and file.parts[0] != "tests",
    "isa_unit": lambda file: bool(ISA_UNIT.search(file.name)),
    "markdown": lambda file: file.suffix == ".md",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes one of KINDS once for each such file."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    files = [Path(name) for name in listing.splitlines() if (ROOT / name).is_file()]
    for fixture in KINDS.keys() & set(metafunc.fixturenames):
        cases = [file for file in files if KINDS[fixture](file)]
        metafunc.parametrize(fixture, [ROOT / case for case in cases], ids=map(str, cases))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
