# SPDX-License-Identifier: Apache-2.0
"""Makes `import interpreter` work for the tests of this folder; says which tool is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import interpreter


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--triton-python", help="Python of an environment that has Triton, for tests/ptx/test_triton.py"
    )


@pytest.fixture(autouse=True)
def _tools(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test needs a C++ compiler, those with the fixture `nvcc` the CUDA compiler; the stand-in starts afresh."""
    if interpreter.CXX is None:
        pytest.skip("no C++ compiler")
    interpreter.library().ptx_reset()
    yield
    interpreter.library().ptx_reset()


@pytest.fixture(scope="session")
def nvcc() -> str:
    if interpreter.NVCC is None:
        pytest.skip("no nvcc: third_party/cuda_toolchain.sh installs one")
    return interpreter.NVCC
