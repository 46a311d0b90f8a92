# SPDX-License-Identifier: Apache-2.0
"""Makes the gate's modules importable, compiles the kernels once, says which of CUDA's tools are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gate import Checked, check_all
from rules import RULES
from sass import missing_tools


@pytest.fixture(scope="session")
def toolkit() -> None:
    if missing := missing_tools():
        pytest.skip(f"no {', '.join(missing)}; `make cuda-check` fetches them")


@pytest.fixture(scope="session")
def our_kernels(toolkit) -> tuple[list[Checked], list[str]]:
    """All kernels on all architectures, and what they break of their rules."""
    return check_all(RULES)
