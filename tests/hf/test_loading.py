# SPDX-License-Identifier: Apache-2.0
"""load_model and load_tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from lissom.hf.checkpoint import CheckpointError
from lissom.hf.loading import load_model, load_tokenizer
from lissom.hf.quantizer import packed_modules
from lissom.hf.save import save


def test_loads_packed_and_dense_folders(llama, logits, tmp_path):
    model = llama(dtype=torch.bfloat16)
    save(model, tmp_path / "packed")
    save(model, tmp_path / "dense", format="dense")
    packed, dense = load_model(tmp_path / "packed"), load_model(tmp_path / "dense")
    assert packed.dtype == dense.dtype == torch.bfloat16
    assert packed_modules(packed)
    assert not packed_modules(dense)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=2e-2, atol=2e-2)
    assert load_model(tmp_path / "packed", dtype=torch.float32).dtype == torch.float32
    assert load_model(str(tmp_path / "packed"), dtype="float32").dtype == torch.float32


def test_works_with_autoload_off(packed_folder):
    code = f"from lissom.hf import load_model; print(type(load_model({str(packed_folder)!r})).__name__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LISSOM_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.stdout.strip() == "LlamaForCausalLM", result.stderr


def test_code_in_a_checkpoint_is_never_run(packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config["model_type"] = "made-up"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('the code of the checkpoint was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(folder)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_names_that_are_not_in_the_cache_are_not_fetched(load, monkeypatch):
    def refuse(*arguments, **settings):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(
        CheckpointError, match="owner/model is neither a folder nor a model in the local cache"
    ):
        load("owner/model")


def test_loads_named_models_from_the_cache(packed_folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--model" / "snapshots" / ("0" * 40)
    shutil.copytree(packed_folder, snapshot)
    (tmp_path / "models--owner--model" / "refs").mkdir()
    (tmp_path / "models--owner--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert packed_modules(load_model("owner/model"))


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "a/b/c"])
def test_paths_that_do_not_exist(path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="there is no such folder"):
            load(path)
