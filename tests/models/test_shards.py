# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lissom.hf import CheckpointError
from lissom.models import shards
from lissom.models.shards import DTYPES, ShardWriter, stored_tensors


def random_tensor(shape, dtype, seed=0):
    bits = torch.randint(0, 2, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        return bits[..., 0].bool()
    return bits.to(torch.uint8).view(dtype).reshape(shape)


def same_bits(left, right):
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.nbytes == right.nbytes
        and (
            left.numel() == 0
            or torch.equal(
                left.contiguous().reshape(-1).view(torch.uint8),
                right.contiguous().reshape(-1).view(torch.uint8),
            )
        )
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    forms=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_written_safetensors_reads_and_the_other_way_round(forms, tmp_path):
    tensors = {
        f"layer.{number}": random_tensor(shape, DTYPES[dtype], number)
        for number, (dtype, shape) in enumerate(forms)
    }
    ours = tmp_path / "ours"
    ours.mkdir(exist_ok=True)
    writer = ShardWriter(ours, tensors)
    writer.add(tensors)
    writer.finish()
    read = load_file(ours / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[name], tensors[name]) for name in tensors)
    save_file(tensors, ours / "model.safetensors")
    stored = stored_tensors(ours)
    assert all(same_bits(stored[name].read(), tensors[name]) for name in tensors)
    assert all(b"".join(stored[name].chunks()) == bytes(shards._buffer(tensors[name])) for name in tensors)
    assert all(stored[name].meta().shape == tensors[name].shape for name in tensors)


def test_several_files_get_an_index(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    tensors = {name: torch.full((4, 5), number) for number, name in enumerate("abcdef")}  # 160 bytes each
    save_file(tensors, source / "model.safetensors")
    writer = ShardWriter(target, "abcdefgh", shard_bytes=330)
    writer.add({"g": torch.eye(3)[:, 1:], "h": torch.ones(2).t()})  # not contiguous
    writer.copy(stored_tensors(source).values())
    assert writer.names == set("abcdefgh")
    writer.finish()
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert sorted(file.name for file in target.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 160 + 24 + 8
    assert index["weight_map"] == dict(zip("abcdefgh", [names[i] for i in (0, 1, 1, 2, 2, 3, 0, 0)]))
    found = stored_tensors(target)
    assert all(torch.equal(found[name].read(), tensors[name]) for name in tensors)
    assert torch.equal(found["g"].read(), torch.eye(3)[:, 1:])


def test_a_name_is_written_once(tmp_path):
    writer = ShardWriter(tmp_path, "a")
    writer.add({"a": torch.ones(1)})
    with pytest.raises(ValueError, match="a was written before"):
        writer.add({"a": torch.ones(1)})


@pytest.mark.parametrize("expected", [0, 3, 40])
def test_headers_that_outgrow_their_room_begin_another_file(tmp_path, expected):
    names = [f"layer.{'x' * 70}.{number}" for number in range(40)]
    writer = ShardWriter(tmp_path, names[:expected])
    for number, name in enumerate(names):
        writer.add({name: torch.full((1, 1, 1, 1, 1, 1, 1, number), number, dtype=torch.float64)})
    writer.finish()
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (expected == 40)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {name: tensor.shape[-1] for name, tensor in found.items()} == {
        name: i for i, name in enumerate(names)
    }
    assert stored_tensors(tmp_path).keys() == set(names)


def test_a_file_that_shrank_is_noticed(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    (stored,) = stored_tensors(tmp_path).values()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends inside a: it was cut off"):
        stored.read()
    with pytest.raises(CheckpointError, match="ends inside a: it was cut off"):
        list(stored.chunks())


def test_a_type_that_torch_cannot_hold_is_refused(tmp_path):
    header = b'{"a":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (stored,) = stored_tensors(tmp_path).values()
    with pytest.raises(CheckpointError, match="a is stored as F8_E8M0"):
        stored.read()
