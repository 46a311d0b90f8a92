# SPDX-License-Identifier: Apache-2.0
"""Writers of the retired formats, told by their descriptions, and folders made with them.

They were compared once, tensor by tensor, with what wrote such checkpoints: compressed-tensors 0.3.3, 0.4.0, 0.5.0,
0.7.1, 0.8.0, 0.9.0, 0.9.4, 0.10.2, 0.12.0 and 0.14.0.1 (the last that could), and the `pack` of IST-DASLab's
Sparse-Marlin. `test_golden.py` holds digests of what compressed-tensors 0.14.0.1 wrote.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from lissom.hf import CheckpointError, convert_folder
from lissom.models.shards import DTYPES

logging.disable_progress_bar()

# Which two of four columns a Marlin writer stores, by those that are not zero.
STORED = {
    (): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3),
    (0, 1): (0, 1), (0, 2): (0, 2), (0, 3): (0, 3), (1, 2): (1, 2), (1, 3): (1, 3), (2, 3): (2, 3),
}  # fmt: skip
SPELLED = {dtype: name for name, dtype in DTYPES.items()}
NAMES = {
    "compressed-tensors": ("weight_packed", "meta", "scale_packed"),
    "gptq": ("B_24", "B_meta", "s"),
    "sparse-marlin": ("B", "meta", "s"),
}


def cut(weight: Tensor) -> Tensor:
    """The weight with the two smallest of every four zeroed."""
    quads = weight.reshape(-1, 4).clone()
    return quads.scatter_(1, quads.abs().topk(2, 1, largest=False).indices, 0).view_as(weight)


def bitmask24(weight: Tensor) -> dict[str, Tensor]:
    """`sparse-24-bitmask`: the two largest of every four columns, in order, and which they were."""
    quads = weight.abs().reshape(-1, 4)
    kept = torch.zeros_like(quads, dtype=torch.bool).scatter_(1, quads.topk(2, 1).indices, True)
    kept = kept.view_as(weight)
    return {
        "shape": torch.tensor(weight.shape).view(-1, 1),
        "compressed": weight[kept].view(weight.shape[0], -1),
        "bitmask": torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little")),
    }


def bitmask(weight: Tensor) -> dict[str, Tensor]:
    """`sparse-bitmask`: what is not zero, of a tensor of any shape."""
    kept = weight != 0
    counts = kept.sum(-1)
    return {
        "shape": torch.tensor(weight.shape),
        "compressed": weight[kept],
        "bitmask": torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little")),
        "row_offsets": counts.cumsum(0) - counts if counts.dim() else torch.tensor(0),
    }


def quantise(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """Integers [N, K] and half-precision scales [N, groups], symmetric."""
    parts = weight.float().unflatten(1, (groups, -1))
    scales = (parts.abs().amax(-1) * 2 / (2**bits - 1)).clamp(min=1e-4).half()
    integers = (parts / scales.unsqueeze(-1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return integers.flatten(1).int(), scales


def dequantise(integers: Tensor, scales: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weights that integers and scales stand for."""
    parts = integers.float().unflatten(1, (scales.shape[1], -1))
    return (parts * scales.float().unsqueeze(-1)).flatten(1).to(dtype)


def marlin24(integers: Tensor, scales: Tensor, *, bits: int, ordered: bool = True) -> tuple[Tensor, ...]:
    """Words, metadata and scales of marlin-24, one element after the other by its row and column."""
    rows = len(integers)
    quads = integers.view(rows, -1, 4).tolist()
    places = np.array([[STORED[tuple(i for i in range(4) if quad[i])] for quad in row] for row in quads])
    kept = np.take_along_axis(integers.view(rows, -1, 4).numpy(), places, 2).reshape(rows, -1)
    words = _words(kept.astype(np.int64) + 2 ** (bits - 1), bits)
    meta = _meta(places[..., 0] | places[..., 1] << 2)
    stored = scales.t().contiguous()
    if ordered and scales.shape[1] > 1:
        place = torch.arange(rows)
        stored = stored[:, place - place % 8 + 4 * (place % 2) + place % 8 // 2]
    return torch.from_numpy(words), torch.from_numpy(meta), stored.half()


def _words(kept: np.ndarray, bits: int) -> np.ndarray:
    """A lane of 32 holds columns 2l, 2l+1, 2l+8, 2l+9 of rows 8i to 8i+7; lanes and rows follow each other."""
    rows, half = kept.shape
    n, k = np.indices(kept.shape)
    lane = 4 * (n % 64 // 8) + k % 8 // 2
    high, odd, far = n % 8 // 4, k % 2, k % 16 // 8
    if bits == 4:
        word, field_ = n // 64 * 128 + 4 * lane + n % 4, 4 * odd + 2 * high + far
    else:
        word, field_ = n // 64 * 256 + 8 * lane + 2 * (n % 4) + high, 2 * odd + far
    words = np.zeros((half // 16, rows * bits // 2), dtype=np.int64)
    np.add.at(words, (k // 16, word), kept << bits * field_)
    return words.astype(np.uint32).view(np.int32)


def _meta(nibbles: np.ndarray) -> np.ndarray:
    """Four quads to a word; rows change places within 64, then odd and even rows and words with each other."""
    rows = len(nibbles)
    words = (nibbles.reshape(rows, -1, 4) << np.array([0, 4, 8, 12])).sum(-1)
    r, c = np.indices(words.shape)
    row = r // 64 * 64 + 32 * (r // 2 % 2) + 4 * (r // 8 % 8) + 2 * (r % 2) + r // 4 % 2
    row, column = row - row % 2 + c % 2, c - c % 2 + row % 2
    flat = np.zeros(words.size, dtype=np.uint16)
    flat[column // 2 * 2 * rows + 2 * row + column % 2] = words
    return flat.view(np.int16).reshape(-1, 2 * rows)


def sparsity_entry(form: str, version: str = "0.9.4") -> dict[str, Any]:
    """The entry that llm-compressor wrote for a sparse model."""
    settings = {"format": form, "global_sparsity": 0.42, "ignore": ["lm_head"], "targets": ["Linear"]}
    sparsity = settings | {"sparsity_structure": "2:4", "registry_requires_subclass": False}
    return {"quant_method": "compressed-tensors", "version": version, "sparsity_config": sparsity}


def marlin_entry(bits: int = 4, group: int | None = 128, **more: Any) -> dict[str, Any]:
    """The entry that llm-compressor wrote for marlin-24; versions from 0.7 to 0.10 left themselves out."""
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": group, "num_bits": bits,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "group" if group else "channel",
        "symmetric": True, "type": "int",
    }  # fmt: skip
    scheme = {
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    entry = {"config_groups": {"group_0": scheme}, "format": "marlin-24", "global_compression_ratio": None}
    entry |= {"ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors"}
    return entry | {"quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}} | more


@dataclass
class Made:
    """A foreign folder, and the tensors of the dense model that it stands for."""

    folder: Path
    dense: dict[str, Tensor]
    linears: list[str]
    form: str
    config: dict[str, Any] = field(default_factory=dict)

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change config.json."""
        config = json.loads((self.folder / "config.json").read_text())
        change(config)
        (self.folder / "config.json").write_text(json.dumps(config))

    def tensors(self, change: Callable[[dict[str, Tensor]], Any]) -> None:
        """Change the tensors of an unsharded folder."""
        state = load_file(self.folder / "model.safetensors")
        change(state)
        save_file(
            {name: tensor.clone().contiguous() for name, tensor in state.items()},
            self.folder / "model.safetensors",
            metadata={"format": "pt"},
        )


@dataclass
class Recipe:
    """How `make_folder` writes a Llama."""

    form: str = "sparse-24-bitmask"
    dtype: torch.dtype = torch.float32
    bits: int = 4
    group: int | None = 128
    names: str = "compressed-tensors"
    ordered: bool = True
    old_names: bool = False  # the tensor's name instead of the module's
    entry: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def encode(self, name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Stored tensors of one linear, and the weight that they stand for."""
        module = name.removesuffix(".weight")
        if self.form == "dense":
            return {name: weight}, weight
        if self.form != "marlin-24":
            parts = (bitmask24 if self.form == "sparse-24-bitmask" else bitmask)(weight)
            owner = name if self.old_names else module
            return {f"{owner}.{part}": tensor for part, tensor in parts.items()}, weight
        groups = weight.shape[1] // self.group if self.group else 1
        integers, scales = quantise(weight, self.bits, groups)
        dense = dequantise(integers, scales, self.dtype)
        # compressed-tensors orders the scales of groups that are smaller than half of the inputs.
        small = self.names != "compressed-tensors" or (self.group or 0) < weight.shape[1] // 2
        parts = marlin24(integers, scales, bits=self.bits, ordered=self.ordered and small)
        return {f"{module}.{part}": tensor for part, tensor in zip(NAMES[self.names], parts)}, dense

    def declaration(self) -> dict[str, Any]:
        if self.entry is not None or self.form == "dense":
            return self.entry or {}
        return {
            "quantization_config": marlin_entry(self.bits, self.group, version="0.12.2")
            if self.form == "marlin-24"
            else sparsity_entry(self.form)
        }


def make_folder(folder: Path, recipe: Recipe) -> Made:
    """A Llama of two layers with 2:4 linears, in a foreign format; the head and the embedding stay dense."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**(sizes | heads | recipe.settings), dtype=recipe.dtype)
    model = LlamaForCausalLM(config).to(recipe.dtype).eval()
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    linears = [
        f"{name}.weight" for name, module in model.model.named_modules(prefix="model") if _is_linear(module)
    ]
    dense, state = dict(stored), dict(stored)
    for name in linears:
        weight = cut(stored[name])
        weight[0, :8], weight[1, 1:4] = 0, 0  # quads with less than two weights
        del state[name]
        parts, dense[name] = recipe.encode(name, weight)
        state |= parts
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    made = Made(folder, dense, linears, recipe.form)
    made.edit(lambda values: values.update(recipe.declaration()))
    made.config = json.loads((folder / "config.json").read_text())
    return made


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Matrices are tiny: a second thread would only wait. The conftest of all tests sets the number back."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Held:
    """A tensor in memory, in the place of one in a file."""

    name: str
    tensor: Tensor
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        return self.tensor.clone()


@pytest.fixture
def held() -> Callable[[str, Tensor], Held]:
    return lambda name, tensor: Held(name, tensor, SPELLED[tensor.dtype], tuple(tensor.shape))


@pytest.fixture
def writers() -> Any:
    """The functions of this module."""
    chosen = (cut, bitmask24, bitmask, quantise, dequantise, marlin24, sparsity_entry, marlin_entry)
    return SimpleNamespace(**{function.__name__: function for function in chosen})


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Made]:
    """Writes a foreign folder: write("marlin-24", bits=8, ...)."""

    def make(form: str = "sparse-24-bitmask", **more: Any) -> Made:
        return make_folder(tmp_path / "old", Recipe(form, **more))

    return make


def _random_parts(form: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Legal content without any meaning, made fast."""

    def pairs(codes: list[int]) -> Tensor:
        chosen = torch.randint(0, 6, (rows, columns // 4), generator=generator)
        nibbles = torch.tensor(codes, dtype=torch.uint8)[chosen]
        return nibbles[:, 0::2] | nibbles[:, 1::2] << 4

    if form == "marlin-24":
        words = torch.randint(-(2**31), 2**31, (columns // 32, 2 * rows), generator=generator).int()
        meta = pairs([0x4, 0x8, 0x9, 0xC, 0xD, 0xE]).view(torch.int16).view(columns // 32, -1)
        return {"weight_packed": words, "meta": meta, "scale_packed": torch.ones(columns // 128, rows).half()}
    mask = pairs([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100])
    values = torch.randn(rows, columns // 2, generator=generator).half()
    if form == "sparse-24-bitmask":
        return {"shape": torch.tensor([[rows], [columns]]), "compressed": values, "bitmask": mask}
    if form == "dense":
        quads = torch.cat((values.view(-1, 2), torch.zeros(rows * columns // 4, 2)), 1)
        return {"weight": quads.view(rows, columns).half()}
    return {"shape": torch.tensor([rows, columns]), "compressed": values.flatten(), "bitmask": mask}


@pytest.fixture
def bulk(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a folder of 40 equal layers, 330 MB when packed: bulk("marlin-24")."""

    def make(form: str) -> Path:
        width, depth = 1024, 40
        sizes = {
            "hidden_size": width,
            "intermediate_size": width,
            "vocab_size": 64,
            "num_hidden_layers": depth,
        }
        config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, dtype=torch.float16)
        folder, generator = tmp_path / form, torch.Generator().manual_seed(0)
        folder.mkdir()
        ends = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        state = {
            name: torch.ones(64, width).half() for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        state["model.norm.weight"] = torch.ones(width).half()
        for layer in (f"model.layers.{index}" for index in range(depth)):
            for end in ends:
                parts = _random_parts(form, width, width, generator)
                state |= {f"{layer}.{end}.{part}": tensor.contiguous() for part, tensor in parts.items()}
            for norm in ("input", "post_attention"):
                state[f"{layer}.{norm}_layernorm.weight"] = torch.ones(width).half()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(
            json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
        )
        return folder

    return make


@pytest.fixture(scope="session")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    root = tmp_path_factory.mktemp("foreign")
    return {
        form: make_folder(root / form, Recipe(form)) for form in ("sparse-24-bitmask", "sparse-bitmask")
    } | {"marlin-24": make_folder(root / "marlin-24", Recipe("marlin-24", dtype=torch.float16))}


@pytest.fixture
def spoil(_kept: dict[str, Made], tmp_path: Path) -> Callable[[str], Made]:
    """Gives a copy of a good folder, to be damaged."""

    def copy(form: str) -> Made:
        good = _kept[form]
        return Made(
            Path(shutil.copytree(good.folder, tmp_path / "old")), good.dense, good.linears, good.config
        )

    return copy


@pytest.fixture
def refuse(spoil: Callable[[str], Made], tmp_path: Path) -> Callable[[str, Callable[[Any], Any], str], None]:
    """Damage a folder of a format; converting it must fail with a message, in one line, and leave nothing behind."""

    def check(form: str, damage: Callable[[Any], Any], message: str) -> None:
        damage(made := spoil(form))
        with pytest.raises(CheckpointError, match=message) as caught:
            convert_folder(made.folder, tmp_path / "new")
        assert "\n" not in str(caught.value)
        assert {entry.name for entry in tmp_path.iterdir()} <= {"old", "x.safetensors"}

    return check
