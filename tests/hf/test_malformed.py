# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints: each kind is refused with a sentence, before a kernel sees the metadata."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lissom.hf.checkpoint import CheckpointError
from lissom.hf.loading import load_model
from lissom.hf.save import save

UP = "model.layers.0.mlp.up_proj"  # [64, 32]: values [64, 16], metadata [64, 4]
DOWN = "model.layers.0.mlp.down_proj"  # [32, 64]
QUERY = "model.layers.0.self_attn.q_proj"  # [32, 32], with a bias

Damage = Callable[[Path], None]
KINDS: dict[str, tuple[Damage, str]] = {}  # name -> (what is done to the folder, what the error must say)


def kind(name: str, message: str) -> Callable[[Damage], Damage]:
    def register(damage: Damage) -> Damage:
        KINDS[name] = damage, message
        return damage

    return register


def tensors_kind(name: str, message: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """A kind made by changing tensors in the file."""

    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    kind(name, message)(damage)


def entry_kind(name: str, message: str, **changes: Any) -> None:
    """A kind made by changing keys of quantization_config."""

    def damage(folder: Path) -> None:
        edit_config(folder, lambda config: config["quantization_config"].update(changes))

    kind(name, message)(damage)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def set_nibble(meta: torch.Tensor, nibble: int) -> torch.Tensor:
    meta[3, 1] = (meta[3, 1] & 0x0F) | (nibble << 4)  # row 3, quad 3
    return meta


LEGAL = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
for illegal in set(range(16)) - set(LEGAL):
    tensors_kind(
        f"nibble {illegal:#x}",
        rf"{UP}\.weight_meta is corrupt.*row 3.*quad 3",
        lambda state, nibble=illegal: set_nibble(state[f"{UP}.weight_meta"], nibble),
    )
tensors_kind(
    "metadata of wrong type",
    r"weight_meta must be U8 \[64, 4\].*got I8",
    lambda state: state.update({f"{UP}.weight_meta": state[f"{UP}.weight_meta"].to(torch.int8)}),
)
tensors_kind(
    "metadata of float type",
    r"weight_meta must be U8 .*got F32",
    lambda state: state.update({f"{UP}.weight_meta": state[f"{UP}.weight_meta"].float()}),
)
tensors_kind(
    "metadata too narrow",
    r"weight_meta must be U8 \[64, 4\].*got U8 \[64, 3\]",
    lambda state: state.update({f"{UP}.weight_meta": state[f"{UP}.weight_meta"][:, :3].clone()}),
)
tensors_kind(
    "metadata with too few rows",
    r"weight_meta must be U8 \[64, 4\].*got U8 \[63, 4\]",
    lambda state: state.update({f"{UP}.weight_meta": state[f"{UP}.weight_meta"][1:].clone()}),
)
tensors_kind(
    "metadata flat",
    r"weight_meta must be U8 \[64, 4\].*got U8 \[256\]",
    lambda state: state.update({f"{UP}.weight_meta": state[f"{UP}.weight_meta"].flatten()}),
)
tensors_kind(
    "metadata missing",
    rf"{UP} is listed as packed, but {UP}\.weight_meta is missing",
    lambda state: state.pop(f"{UP}.weight_meta"),
)
tensors_kind("values missing", rf"{UP}\.weight is missing", lambda state: state.pop(f"{UP}.weight"))
tensors_kind(
    "module missing",
    rf"{UP} is listed as packed, but the checkpoint has no {UP}\.weight",
    lambda state: [state.pop(f"{UP}.{part}") for part in ("weight", "weight_meta")],
)
tensors_kind(
    "values of integer type",
    r"up_proj\.weight must be one of F32, BF16, F16, got I32",
    lambda state: state.update({f"{UP}.weight": state[f"{UP}.weight"].int()}),
)
tensors_kind(
    "values dense",
    r"weight_meta must be U8 \[64, 8\] beside a weight of \[64, 32\]",
    lambda state: state.update({f"{UP}.weight": torch.zeros(64, 32)}),
)
tensors_kind(
    "K not a multiple of 4",
    r"weight must be \[N, K/2\] with K a multiple of 4, got \[64, 15\]",
    lambda state: state.update({f"{UP}.weight": state[f"{UP}.weight"][:, 1:].clone()}),
)
tensors_kind(
    "zero rows",
    r"weight must be \[N, K/2\] .* got \[0, 16\]",
    lambda state: state.update({f"{UP}.weight": torch.zeros(0, 16)}),
)
tensors_kind(
    "N other than in the config",
    r"stores a matrix \[60, 32\], but config\.json describes \[64, 32\]",
    lambda state: state.update(
        {f"{UP}.{p}": state[f"{UP}.{p}"][4:].clone() for p in ("weight", "weight_meta")}
    ),
)
tensors_kind(
    "K other than in the config",
    r"stores a matrix \[32, 32\], but config\.json describes \[32, 64\]",
    lambda state: state.update(
        {f"{DOWN}.{part}": state[f"{QUERY}.{part}"].clone() for part in ("weight", "weight_meta")}
    ),
)
tensors_kind(
    "bias of wrong length",
    r"q_proj\.bias must be a float tensor \[32\], got F32 \[31\]",
    lambda state: state.update({f"{QUERY}.bias": torch.zeros(31)}),
)
tensors_kind("bias missing", r"the checkpoint lacks .*q_proj\.bias", lambda state: state.pop(f"{QUERY}.bias"))
tensors_kind(
    "bias surplus",
    r"the checkpoint has .*up_proj\.bias",
    lambda state: state.update({f"{UP}.bias": torch.zeros(64)}),
)
tensors_kind(
    "extra tensor in a packed module",
    r"unexpected tensor .*up_proj\.scales",
    lambda state: state.update({f"{UP}.scales": torch.zeros(64)}),
)
tensors_kind(
    "metadata of an unlisted module",
    r"model\.norm\.weight_meta is stored, but config\.json does not list",
    lambda state: state.update({"model.norm.weight_meta": torch.zeros(4, dtype=torch.uint8)}),
)
entry_kind("newer format", r"format_version 2 is newer than this lissom.*upgrade lissom", format_version=2)
entry_kind(
    "format version not a number", r"format_version must be a positive integer, got '1'", format_version="1"
)
entry_kind("format version zero", r"format_version must be a positive integer, got 0", format_version=0)
entry_kind(
    "unknown metadata layout", r"meta_layout must be 'nibble-p0p1', got 'bitmask'", meta_layout="bitmask"
)
entry_kind("unknown pattern", r"pattern must be '2:4', got '4:8'", pattern="4:8")
entry_kind("unknown key", r"unknown key 'scale'", scale=1)
entry_kind("modules not a list", r"modules must be a non-empty list", modules={"a": 1})
entry_kind("modules empty", r"modules must be a non-empty list", modules=[])
entry_kind("module named twice", r"modules names 'a' more than once", modules=["a", "b", "a"])


def move_up(folder: Path, new: str) -> None:
    """Gives the packed tensors of UP, and its entry in the list, to another module."""
    state = load_file(folder / "model.safetensors")
    for part in ("weight", "weight_meta"):
        state[f"{new}.{part}"] = state.pop(f"{UP}.{part}")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    modules = [new if name == UP else name for name in entry["modules"]]
    edit_config(folder, lambda config: config["quantization_config"].update(modules=modules))


@kind("module not in the model", r"lists the packed module model\.layers\.7\.mlp\.up_proj.*does not have")
def _(folder: Path) -> None:
    move_up(folder, "model.layers.7.mlp.up_proj")


@kind("module not a linear", r"lists model\.norm as packed, but it is a LlamaRMSNorm, not a linear")
def _(folder: Path) -> None:
    move_up(folder, "model.norm")


@kind("cut off", r"model\.safetensors is damaged or cut off")
def _(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@kind("empty file", r"model\.safetensors is damaged or cut off")
def _(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


@kind("header longer than the file", r"model\.safetensors is damaged or cut off")
def _(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data) * 2) + data[8:])


@kind("trailing bytes", r"model\.safetensors is damaged or cut off")
def _(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(b"\0" * 8)


def write_header(folder: Path, header: str, size: int) -> None:
    data = struct.pack("<Q", len(header)) + header.encode() + b"\0" * size
    (folder / "model.safetensors").write_bytes(data)


@kind("negative size", r"model\.safetensors is damaged or cut off")
def _(folder: Path) -> None:
    write_header(folder, '{"a":{"dtype":"U8","shape":[-8],"data_offsets":[0,8]}}', 8)


@kind("overlapping tensors", r"model\.safetensors is damaged or cut off")
def _(folder: Path) -> None:
    entry = '{"dtype":"U8","shape":[8],"data_offsets":[0,8]}'
    write_header(folder, f'{{"a":{entry},"b":{entry}}}', 8)


@kind("tensor named twice", r"names 'a' more than once in its header")
def _(folder: Path) -> None:
    entry = '{"dtype":"U8","shape":[8],"data_offsets":[0,8]}'
    write_header(folder, f'{{"a":{entry},"a":{entry}}}', 8)


@kind("folder in the place of the weights", r"model\.safetensors must be a regular file")
def _(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@kind("dangling link", r"has no weights")
def _(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone.safetensors")


@kind("no weights", r"has no weights")
def _(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@kind("pickled weights", r"holds pickled weights only")
def _(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@kind("empty folder", r"is not a model folder: it has no config\.json")
def _(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@kind("file in the place of the folder", r"is not a model folder: it is a file")
def _(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


@kind("no folder", r"is not a model folder: there is no such folder")
def _(folder: Path) -> None:
    shutil.rmtree(folder)


@kind("config not JSON", r"config\.json is not valid JSON")
def _(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@kind("config not text", r"config\.json is not valid JSON")
def _(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


@kind("config not an object", r"config\.json must hold a JSON object, got list")
def _(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@kind("entry not an object", r"quantization_config must be an object")
def _(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(quantization_config=[1]))


@kind("entry missing", r"holds packed weights, but its config\.json has no lissom quantization_config")
def _(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))


def shard(folder: Path, **files: str) -> None:
    """Splits the weights in two files; ``files`` replaces the names that the index gives to them."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((0, 1)):
        chosen = {name: tensor for i, (name, tensor) in enumerate(sorted(state.items())) if i % 2 == part}
        save_file(chosen, folder / f"{'ab'[number]}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, files.get("ab"[number], f"{'ab'[number]}.safetensors"))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@kind("missing shard", r"c\.safetensors is missing")
def _(folder: Path) -> None:
    shard(folder, b="c.safetensors")


@kind("shard outside the folder", r"shard '\.\./b\.safetensors' is not a plain file name")
def _(folder: Path) -> None:
    shard(folder, b="../b.safetensors")
    shutil.move(folder / "b.safetensors", folder.parent / "b.safetensors")


@kind("pickled shard", r"b\.bin is not a safetensors file")
def _(folder: Path) -> None:
    shard(folder, b="b.bin")
    shutil.move(folder / "b.safetensors", folder / "b.bin")


@kind("index without a map", r"must hold a non-empty object weight_map")
def _(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


@kind("tensor in another shard than the index says", r"says that .* is in .*, where it is not")
def _(folder: Path) -> None:
    shard(folder, a="b.safetensors", b="a.safetensors")


@kind("tensor in two shards", r"is stored twice")
def _(folder: Path) -> None:
    shard(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


@pytest.fixture
def folder(packed_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_folder, tmp_path / "model"))


def test_the_undamaged_folder_loads(folder):
    assert load_model(folder).config.model_type == "llama"


@pytest.mark.parametrize("name", KINDS)
def test_load_model_refuses(name, folder):
    damage, message = KINDS[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


# transformers opens every shard that the index names, wherever a tensor lies: nothing is lost.
HARMLESS = {"tensor in another shard than the index says"}


@pytest.mark.parametrize("name", [name for name in KINDS if name not in HARMLESS])
def test_from_pretrained_refuses(name, folder):
    """Our hook speaks where transformers asks it in time, elsewhere transformers does; nobody is silent."""
    KINDS[name][0](folder)
    with pytest.raises((OSError, RuntimeError, ValueError, AttributeError, TypeError, KeyError)):
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLM.from_pretrained])
def test_missing_ordinary_tensor_is_refused(load, folder):
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing from the checkpoint"):
        load(folder)


def test_missing_tensor_of_a_dense_model_is_refused_by_load_model(folder, tmp_path):
    save(load_model(folder), tmp_path / "dense", format="dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensors of its model, the first is model\.norm\.weight"
    ):
        load_model(tmp_path / "dense")


@pytest.mark.parametrize(
    "name", ["values dense", "N other than in the config", "bias of wrong length", "values missing"]
)
def test_ignoring_mismatched_sizes_does_not_let_random_weights_in(name, folder):
    KINDS[name][0](folder)
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_nibble_behind_the_last_quad_must_be_zero(llama, tmp_path):
    save(llama(intermediate_size=68), tmp_path / "model")  # 17 quads a row: half a byte is left over
    state = load_file(tmp_path / "model" / "model.safetensors")
    state[f"{DOWN}.weight_meta"][3, 8] |= 0x40
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.weight_meta is corrupt.*row 3.*quad 17"):
        load_model(tmp_path / "model")


def test_values_may_be_nan_and_infinite(folder):
    state = load_file(folder / "model.safetensors")
    state[f"{UP}.weight"][0, 0], state[f"{UP}.weight"][1, 1] = torch.nan, -torch.inf
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    weight = load_model(folder).get_submodule(UP).dense_weight()
    assert weight[0].isnan().sum() == 1
    assert weight[1].isinf().sum() == 1
