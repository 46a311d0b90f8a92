# SPDX-License-Identifier: Apache-2.0
"""Model classes whose checkpoints are not one linear a weight."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lissom.hf import convert_folder, load_model
from lissom.models.tiny import build_tiny
from lissom.nn import Sparse24Linear


@pytest.fixture
def everything_masked(tmp_path, writers):
    """Saves a tiny model with its linears cut and every weight of two dimensions in a bit mask."""

    def make(family):
        model = build_tiny(family)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                module.weight.data = writers.cut(module.weight.data)
        model.save_pretrained(tmp_path / "old")
        dense = load_file(tmp_path / "old" / "model.safetensors")
        stored = {}
        for name, tensor in dense.items():
            if not name.endswith(".weight") or tensor.dim() != 2:
                stored[name] = tensor
                continue
            parts = writers.bitmask(tensor).items()
            stored |= {f"{name.removesuffix('.weight')}.{part}": content for part, content in parts}
        save_file(stored, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
        return dense, tmp_path / "old"

    return make


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mixtral", "transformers merges it with others while loading"),
        ("qwen3_moe", "transformers merges it with others while loading"),
        ("gpt2", "its place, Conv1D, is no linear"),
        ("qwen2", "its place, Embedding, is no linear"),
        ("opt", "its place, OPTLearnedPositionalEmbedding, is no linear"),
    ],
)
def test_what_is_no_linear_of_its_own_is_written_out(family, reason, everything_masked, tmp_path):
    dense, folder = everything_masked(family)
    if family == "gpt2":
        with pytest.raises(ValueError, match=r"no linear of .* could be packed; .* Conv1D, is no linear"):
            convert_folder(folder, tmp_path / "new")
        return
    report = convert_folder(folder, tmp_path / "new")
    reasons = {layer.reason for layer in report.layers if not layer.packed}
    assert reason in reasons
    model = load_model(tmp_path / "new")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Sparse24Linear)}
    assert len(packed) == len(report.packed) > 0
    for name, module in packed.items():
        assert torch.equal(module.dense_weight(), dense[f"{name}.weight"])
    stored = load_file(tmp_path / "new" / "model.safetensors")
    for layer in report.layers:
        if not layer.packed:
            assert torch.equal(stored[layer.name], dense[layer.name]), layer.name


def test_a_checkpoint_without_the_prefix_of_the_head(write, tmp_path):
    made = write()

    def strip(state):
        for name in [name for name in state if name.startswith("model.")]:
            state[name.removeprefix("model.")] = state.pop(name)

    made.tensors(strip)
    convert_folder(made.folder, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"]["modules"][0].startswith("layers.0.")
    model = load_model(tmp_path / "new")
    for name in made.linears:
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).dense_weight(), made.dense[name])
