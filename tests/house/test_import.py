# SPDX-License-Identifier: Apache-2.0
"""`import lissom` loads one library and nothing heavy."""

import subprocess
import sys

import pytest

import lissom

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


def test_another_minor_version_of_torch_is_refused():
    code = "import torch; torch.__version__ = '2.99.1'; import lissom; lissom.build_info()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "lissom was built with torch" in result.stderr
    assert "this is torch 2.99.1; install lissom again" in result.stderr


def test_a_patch_release_of_torch_is_accepted():
    code = (
        "import torch; torch.__version__ = '.'.join(torch.__version__.split('.')[:2] + ['99']);"
        "import lissom; lissom.build_info()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_library_that_lacks_symbols_of_torch_is_explained(monkeypatch):
    def lacks(name):
        raise ImportError("_C.so: undefined symbol: _ZN3c106Symbol")

    monkeypatch.setattr(lissom.importlib, "import_module", lacks)
    with pytest.raises(
        ImportError, match=r"built with another version of torch than this one.*_ZN3c106Symbol"
    ):
        lissom.build_info()
