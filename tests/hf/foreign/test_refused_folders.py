# SPDX-License-Identifier: Apache-2.0
"""Folders whose files or config are wrong: each is refused with one sentence, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lissom import assets
from lissom.hf import CheckpointError, convert_folder, load_model

S24, S, M = "sparse-24-bitmask", "sparse-bitmask", "marlin-24"
KINDS: dict[str, tuple[str, Callable[[Any], Any], str]] = {}  # name -> format, damage, what the error says


def config_kind(name: str, form: str, message: str, change: Callable[[dict[str, Any]], Any]) -> None:
    KINDS[name] = form, lambda made: made.edit(change), message


def kind(name: str, form: str, message: str) -> Callable[[Callable[[Any], Any]], None]:
    return lambda damage: KINDS.update({name: (form, damage, message)})


config_kind(
    "unknown architecture",
    S24,
    r"transformers cannot build the model .*config\.json describes",
    lambda c: c.update(model_type="nonesuch", architectures=["Nonesuch"]),
)
config_kind(
    "config of another size",
    S24,
    r"lm_head\.weight \[96, 128\], but config\.json describes \[96, 64\]",
    lambda c: c.update(hidden_size=64, head_dim=16),
)
config_kind(
    "config of absurd depth",
    S24,
    r"num_hidden_layers is 1000000000, the checkpoint has \d+ tensors",
    lambda c: c.update(num_hidden_layers=10**9),
)


@kind("no folder", S24, r"is not a model folder: there is no such folder; lissom convert reads local folders")
def _(made):
    shutil.rmtree(made.folder)


@kind("a file", S24, "is not a model folder: it is a file")
def _(made):
    shutil.rmtree(made.folder)
    made.folder.write_text("")


@kind("no config", S24, "has no config.json")
def _(made):
    (made.folder / "config.json").unlink()


@kind("config nested without end", S24, r"config\.json is not valid JSON")
def _(made):
    (made.folder / "config.json").write_text("[" * 200_000)


@kind("config not an object", S24, r"config\.json must hold a JSON object, got list")
def _(made):
    (made.folder / "config.json").write_text("[]")


@kind("GPTQ's own config broken", M, r"quantize_config\.json is not valid JSON")
def _(made):
    made.edit(lambda config: config.pop("quantization_config"))
    (made.folder / "quantize_config.json").write_text("{")


@kind(
    "GPTQ's own config without 2:4",
    M,
    r"quantize_config\.json: quantization_config says 'gptq', integers without 2:4",
)
def _(made):
    made.edit(lambda config: config.pop("quantization_config"))
    (made.folder / "quantize_config.json").write_text('{"quant_method": "gptq", "bits": 4}')


@kind("pickles", S24, "holds pickled weights only")
def _(made):
    (made.folder / "model.safetensors").rename(made.folder / "pytorch_model.bin")


@kind("cut off", S24, r"model\.safetensors is damaged or cut off")
def _(made):
    os.truncate(made.folder / "model.safetensors", (made.folder / "model.safetensors").stat().st_size // 2)


@kind("header that lies about sizes", S24, r"model\.safetensors is damaged or cut off")
def _(made):
    header = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    (made.folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


@kind("index that leads out", S24, r"shard '\.\./x\.safetensors' is not a plain file name")
def _(made):
    names = load_file(made.folder / "model.safetensors")
    (made.folder / "model.safetensors").rename(made.folder.parent / "x.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../x.safetensors")}
    (made.folder / "model.safetensors.index.json").write_text(json.dumps(index))


@kind("a pipe", S24, r"model\.safetensors must be a regular file")
def _(made):
    (made.folder / "model.safetensors").unlink()
    os.mkfifo(made.folder / "model.safetensors")


@kind(
    "nothing that is 2:4", S, r"no linear of .* could be packed; .* stays dense because it is not 2:4 \(row 0"
)
def _(made):
    state = load_file(made.folder / "model.safetensors")
    for name in [name for name in state if name.endswith(".bitmask")]:
        owner = name.removesuffix(".bitmask")
        rows, columns = state[f"{owner}.shape"].tolist()
        state[name] = torch.full((rows, columns // 8), 255, dtype=torch.uint8)
        state[f"{owner}.compressed"] = torch.ones(rows * columns)
        state[f"{owner}.row_offsets"] = torch.arange(rows) * columns
    save_file(state, made.folder / "model.safetensors")


@pytest.mark.parametrize("name", KINDS)
def test_refused(name, refuse):
    refuse(*KINDS[name])


def test_a_dense_model_has_nothing_to_convert(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing to convert: .* lissom prune makes a dense model 2:4"):
        convert_folder(assets.TINY_LLAMA, tmp_path / "new")


def test_a_file_that_shrinks_while_it_is_read(spoil, tmp_path, monkeypatch):
    made = spoil(S24)
    from lissom.hf import convert

    def shrink(*args):
        os.truncate(made.folder / "model.safetensors", 300_000)

    monkeypatch.setattr(convert, "_check_room", shrink)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors ends inside .*: it was cut off or replaced"
    ):
        convert_folder(made.folder, tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]


def test_a_weight_larger_than_memory(spoil, tmp_path, monkeypatch):
    from lissom.hf.foreign import plan

    monkeypatch.setattr(plan.os, "sysconf", lambda name: 1000)
    with pytest.raises(
        CheckpointError, match=r"needs 0\.2 GB of memory to convert, this machine has 0\.0 GB"
    ):
        convert_folder(spoil(M).folder, tmp_path / "new")


@pytest.mark.parametrize("form", [S24, S, M])
def test_loading_such_a_folder_says_what_to_do(form, spoil):
    with pytest.raises(CheckpointError, match=rf"is stored as {form}, .* \(lissom convert .*old NEW\)"):
        load_model(spoil(form).folder)
