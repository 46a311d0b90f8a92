# SPDX-License-Identifier: Apache-2.0
"""`import lissom` loads one library and nothing heavy."""

import subprocess
import sys

import pytest

HEAVY = {
    "transformers",
    "matplotlib",
    "datasets",
    "peft",
    "accelerate",
    "scipy",
    "pandas",
    "typer",
    "pydantic",
}


@pytest.mark.parametrize("statement", ["import lissom", "import torch"])
def test_import_is_light(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not HEAVY & set(result.stdout.split())
