# SPDX-License-Identifier: Apache-2.0
"""Linears that pack themselves while a checkpoint is loaded."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.base import HfQuantizer

from lissom import ops
from lissom.hf.arrival import ArrivingLinear, expect, release_pages
from lissom.hf.checkpoint import CheckpointError
from lissom.hf.quantizer import packed_modules
from lissom.hf.save import save
from lissom.nn import Sparse24Linear

LINEARS = 14  # packed ones in the models used here


def mark(tensor: torch.Tensor) -> torch.Tensor:
    """As transformers marks a tensor of the checkpoint."""
    tensor._is_hf_initialized = True
    return tensor


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2), (torch.bfloat16, 3)], ids=str)
def test_canonical_tensors_of_one_layer_only_are_alive(packed_folder, monkeypatch, dtype, most):
    """Values (as stored, and converted) and metadata: no more, whoever holds them."""
    seen: set[StorageWeakRef] = set()
    alive: list[int] = []
    set_attribute, pack = nn.Module.__setattr__, ops.sparse24_pack

    def see(*parts):
        seen.update(StorageWeakRef(part.untyped_storage()) for part in parts)
        alive.append(sum(not reference.expired() for reference in seen))

    def seeing_set(self, name, value):
        is_part = isinstance(self, Sparse24Linear) and name in ("weight", "weight_meta")
        if is_part and value is not None and not value.is_meta:
            see(value)
        set_attribute(self, name, value)

    def seeing_pack(values, meta, *rest):
        see(values, meta)
        return pack(values, meta, *rest)

    monkeypatch.setattr(nn.Module, "__setattr__", seeing_set)
    monkeypatch.setattr(ops, "sparse24_pack", seeing_pack)
    AutoModelForCausalLM.from_pretrained(packed_folder, dtype=dtype)
    assert len(seen) >= 2 * LINEARS
    assert max(alive) <= most, "tensors of earlier layers are still there"


@pytest.mark.skipif(not hasattr(HfQuantizer, "get_new_dtype"), reason="this transformers converts in advance")
def test_values_are_converted_one_layer_at_a_time(packed_folder, monkeypatch):
    arrived = []
    record = ArrivingLinear._pack_arrived
    monkeypatch.setattr(
        ArrivingLinear, "_pack_arrived", lambda self: (arrived.append(self.weight.dtype), record(self))
    )
    model = AutoModelForCausalLM.from_pretrained(packed_folder, dtype=torch.bfloat16)
    assert arrived == [torch.float32] * LINEARS
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_only_ordinary_layers_are_left(packed_folder):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    assert {type(module) for module in packed_modules(model).values()} == {Sparse24Linear}
    for name, module in packed_modules(model).items():
        assert not {"_own", "_name", "dtype_when_packed"} & set(vars(module)), name
        assert module.packed is not None
        assert module.weight_meta is None


@pytest.mark.parametrize("order", [("weight", "weight_meta"), ("weight_meta", "weight")])
def test_packs_when_the_second_tensor_comes(order):
    values, meta = ops.sparse24_compress(torch.randn(16, 32), pattern="magnitude")
    parts = {
        "weight": mark(nn.Parameter(values)),  # transformers makes floats require grad
        "weight_meta": mark(meta.clone()),
    }
    layer = expect(Sparse24Linear(32, 16, bias=False, device="meta"), "up", own=False)
    setattr(layer, order[0], parts[order[0]])
    assert layer.packed is None
    setattr(layer, order[1], parts[order[1]])
    assert torch.equal(layer.packed, ops.sparse24_pack(values, meta))
    layer.packed = torch.empty_like(layer.packed)  # as transformers does with what no checkpoint holds
    layer.finish()
    assert torch.equal(layer.packed, ops.sparse24_pack(values, meta))
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("fresh", ["weight", "weight_meta"])
def test_fresh_tensors_do_not_count_as_arrived(fresh):
    values, meta = ops.sparse24_compress(torch.randn(16, 32), pattern="magnitude")
    parts = {"weight": nn.Parameter(values, requires_grad=False), "weight_meta": meta}
    layer = expect(Sparse24Linear(32, 16, bias=False, device="meta"), "up", own=False)
    for name, part in parts.items():
        setattr(layer, name, part if name == fresh else mark(part))
    assert layer.packed is None
    layer.dtype_when_packed = torch.bfloat16
    layer.finish()
    assert torch.equal(layer.packed, ops.sparse24_pack(values.bfloat16(), meta))


def test_corrupt_metadata_stop_loading_at_once(packed_folder, tmp_path, monkeypatch):
    state = load_file(packed_folder / "model.safetensors")
    first = "model.layers.0.mlp.down_proj"
    state[f"{first}.weight_meta"].zero_()
    (tmp_path / "config.json").write_text((packed_folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    packed = []
    record = ArrivingLinear._pack_arrived
    monkeypatch.setattr(
        ArrivingLinear, "_pack_arrived", lambda self: (packed.append(self._name), record(self))
    )
    with pytest.raises(CheckpointError, match=rf"{first}\.weight_meta is corrupt"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed == [first]


@pytest.fixture
def large_folder(llama, tmp_path) -> Path:
    """A packed model whose linears span many pages."""
    save(llama(hidden_size=512, intermediate_size=2048, vocab_size=16), tmp_path / "model")
    return tmp_path / "model"


def test_tensors_that_the_caller_owns_stay_as_they_are(large_folder):
    state = load_file(large_folder / "model.safetensors")  # mapped
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.mul_(2)  # in memory, not in the file
    copy = {name: tensor.clone() for name, tensor in state.items()}
    config = LlamaConfig.from_pretrained(large_folder)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert len(packed_modules(model)) == LINEARS
    for name, tensor in state.items():
        assert torch.equal(tensor, copy[name]), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, copy[name]), name


def resident(path: Path) -> int:
    """Bytes of a mapped file that count as memory of this process."""
    size, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            inside = fields[-1] == str(path)
        elif inside and fields[0] == "Rss:":
            size += int(fields[1]) * 1024
    return size


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_releases_the_pages_of_a_mapped_file_and_no_neighbour(tmp_path):
    path = tmp_path / "x.safetensors"
    side, middle = torch.randn(64), torch.randn(1 << 19)
    save_file({"a": side, "b": middle, "c": side.clone()}, path)
    state = load_file(path)
    state["a"].neg_()
    state["c"].neg_()
    assert torch.equal(state["b"], middle)
    assert resident(path) >= middle.nbytes
    release_pages(state["b"])
    assert resident(path) <= 4 * mmap.PAGESIZE
    for name, wanted in {"a": -side, "b": middle, "c": -side}.items():
        assert torch.equal(state[name], wanted), name


def test_releases_nothing_of_a_tensor_with_gaps():
    whole = torch.ones(4, 1 << 14)
    release_pages(whole[:, ::2])
    release_pages(whole.t())
    release_pages(whole[:0])
    assert whole.all()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_loading_keeps_only_the_dense_tensors_mapped(large_folder):
    path = large_folder / "model.safetensors"
    model = AutoModelForCausalLM.from_pretrained(large_folder)
    assert path.stat().st_size > 16 << 20
    # What is left: first and last pages of each tensor, and those that the system maps around a fault.
    assert resident(path) < path.stat().st_size / 4
    assert len(packed_modules(model)) == LINEARS
