# SPDX-License-Identifier: Apache-2.0
"""`pytest --no-skip`, by which CI notices that a tool is missing, and the marker `cuda`, which goes by folder."""

import re
import shutil
import subprocess
import sys

TESTS = """
import pytest

def test_skips(): pytest.skip("no nvcc")

@pytest.mark.skipif(True, reason="no nvdisasm")
def test_is_skipped(): pass

@pytest.mark.optional
def test_may_skip(): pytest.skip("no triton")

@pytest.mark.xfail
def test_is_expected_to_fail(): raise AssertionError

def test_passes(request): assert (request.node.get_closest_marker("cuda") is not None) == IN_SIMT
"""


def run(root, folder) -> str:
    shutil.copy(root / "tests" / "conftest.py", folder)
    shutil.copy(root / "pyproject.toml", folder)
    for name in ("simt", "ops"):
        (folder / name).mkdir()
        (folder / name / f"test_{name}.py").write_text(f"IN_SIMT = {name == 'simt'}\n{TESTS}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-skip", "simt", "ops"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_a_skip_is_reported_as_a_failure(root, tmp_path):
    out = run(root, tmp_path)
    assert "--no-skip: Skipped: no nvcc" in out
    assert "--no-skip: Skipped: no nvdisasm" in out
    assert "--no-skip: Skipped: no triton" not in out
    assert re.search(r"2 failed, 2 passed, 2 skipped, 2 xfailed, 2 errors", out), out
