# SPDX-License-Identifier: Apache-2.0
"""Programs that never import lissom."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lissom import _autoload
from lissom.hf.save import save

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
packed = [type(m).__name__ for m in model.modules()].count("Sparse24Linear")
print(json.dumps([packed, model(torch.arange(24).view(2, 12)).logits.tolist()]))
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_plain_transformers_loads_a_packed_folder(llama, logits, tmp_path):
    model = llama()
    save(model, tmp_path / "out")
    result = run_python(LOAD, str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    packed, got = json.loads(result.stdout)
    assert packed == 14
    torch.testing.assert_close(torch.tensor(got), logits(model), rtol=1e-5, atol=1e-5)


def test_without_autoload_loading_fails_loudly(packed_folder):
    result = run_python(LOAD, str(packed_folder), LISSOM_AUTOLOAD="0")
    assert result.returncode != 0
    assert "RuntimeError" in result.stderr
    assert "ignore_mismatched_sizes" in result.stderr
    assert "MISMATCH" in result.stderr
    assert result.stdout == ""


def test_import_torch_costs_nothing_heavy_and_survives_a_broken_library():
    code = """
import sys
sys.modules["lissom._C"] = None  # importing it now raises ImportError
import torch
print([name for name in sys.modules if name.split(".")[0] in ("lissom", "transformers")])
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert set(ast.literal_eval(result.stdout)) == {"lissom", "lissom._C", "lissom._autoload"}


@pytest.mark.parametrize(
    "first",
    ["import torch, transformers.quantizers.auto", "import transformers.quantizers.auto, torch"],
    ids=["torch first", "transformers first"],
)
def test_import_order_does_not_matter(first):
    code = f"""
{first}
import sys
from transformers import LlamaForCausalLM
from transformers.quantizers import auto
print("lissom" in auto.AUTO_QUANTIZER_MAPPING, "lissom" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
print("lissom.hf.quantizer" in sys.modules)
"""
    result = run_python(code)
    assert result.stdout.split() == ["True", "True", "False"], result.stderr


def test_uses_the_standard_library_only():
    tree = ast.parse(Path(_autoload.__file__).read_text(encoding="utf-8"))
    at_import = {node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    names = {
        name.split(".")[0]
        for node in at_import - inside
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
    }
    assert names <= set(sys.stdlib_module_names)


def test_never_raises(monkeypatch, caplog):
    broken = ModuleType(_autoload._AWAITED)
    broken.AUTO_QUANTIZATION_CONFIG_MAPPING = None  # not the table that register expects
    monkeypatch.setitem(sys.modules, _autoload._AWAITED, broken)
    with caplog.at_level(logging.WARNING, logger="lissom"):
        _autoload.autoload()
    assert "could not register" in caplog.text


def test_registers_late_when_torch_is_imported_by_the_awaited_module(monkeypatch):
    half_done = ModuleType(_autoload._AWAITED)
    monkeypatch.setitem(sys.modules, _autoload._AWAITED, half_done)
    before = list(sys.meta_path)
    _autoload.autoload()
    (finder,) = [found for found in sys.meta_path if found not in before]
    assert finder.find_spec("json.tool") is None
    half_done.AUTO_QUANTIZATION_CONFIG_MAPPING, half_done.AUTO_QUANTIZER_MAPPING = {}, {}
    assert finder.find_spec("json.tool") is None
    assert "lissom" in half_done.AUTO_QUANTIZER_MAPPING
    assert sys.meta_path == before


def test_off_switch_leaves_the_import_system_alone(monkeypatch):
    monkeypatch.setenv("LISSOM_AUTOLOAD", "0")
    monkeypatch.delitem(sys.modules, _autoload._AWAITED, raising=False)
    before = list(sys.meta_path)
    _autoload.autoload()
    assert sys.meta_path == before
