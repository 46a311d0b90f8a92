# SPDX-License-Identifier: Apache-2.0
"""State of nn.Sparse24Linear: state dicts, copies, pickles, moves, shared and damaged weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from lissom import ops
from lissom.nn import Sparse24Linear
from lissom.testing import random_sparse24


def make(k: int = 36, n: int = 20, bias: bool = True, dtype: torch.dtype = torch.float32) -> Sparse24Linear:
    torch.manual_seed(0)
    dense = nn.Linear(k, n, bias, dtype=dtype)
    dense.weight.data = random_sparse24(n, k, dtype=dtype)
    return Sparse24Linear.from_linear(dense)


def x_for(layer: Sparse24Linear) -> torch.Tensor:
    return torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1)).to(
        layer.weight.dtype
    )


def same(a: Sparse24Linear, b: Sparse24Linear) -> bool:
    return torch.equal(a(x_for(a)), b(x_for(a))) and torch.equal(a.dense_weight(), b.dense_weight())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_state_dict_roundtrip(dtype, bias, assign, trainable):
    layer = make(bias=bias, dtype=dtype)
    state = layer.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        "weight": ((20, 18), dtype),
        "weight_meta": ((20, 5), torch.uint8),
        **({"bias": ((20,), dtype)} if bias else {}),
    }
    assert not state["weight"].isnan().any()
    other = Sparse24Linear(36, 20, bias, dtype=dtype).requires_grad_(trainable)
    assert not same(layer, other)
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert same(layer, other)
    again = other.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_state_dict_is_the_same_packed_or_not():
    layer = make()
    packed = layer.state_dict()
    unpacked = layer.unpack_().state_dict()
    assert all(torch.equal(packed[name], unpacked[name]) for name in unpacked)
    assert all(
        isinstance(t, nn.Parameter)
        for name, t in make().state_dict(keep_vars=True).items()
        if name != "weight_meta"
    )


def test_state_dict_in_a_file():
    model, stream = nn.Sequential(make(128, 256), nn.ReLU()), io.BytesIO()
    torch.save(model.state_dict(), stream)
    assert stream.tell() < 128 * 256 * 4 * 0.6  # canonical, not dense
    stream.seek(0)
    other = nn.Sequential(Sparse24Linear(128, 256), nn.ReLU())
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert same(model[0], other[0])


def damage(state: dict, **changes) -> dict:
    return {name: changes.get(name, tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_corrupt_metadata_is_refused_at_load_and_never_used(assign, trainable):
    layer = make().requires_grad_(trainable)
    state = make().state_dict()
    meta = state["weight_meta"].clone()
    meta[7, 3] = 0x44 | 0x0B
    message = r"0\.weight_meta: .*corrupt metadata: row 7, quad 6 holds nibble 0xF"
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(layer).load_state_dict(
            {f"0.{k}": v for k, v in damage(state, weight_meta=meta).items()}, assign=assign
        )
    with pytest.raises(ValueError, match="row 7, quad 6"):
        layer(x_for(layer))
    layer.load_state_dict(state)  # and it recovers
    assert same(layer, make())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": torch.ones(20, 36)}, r"size mismatch for weight: .*\[20, 36\]"),
        (
            {"weight_meta": torch.zeros(20, 4, dtype=torch.uint8)},
            r"size mismatch for weight_meta: .*\[20, 4\]",
        ),
        ({"bias": torch.ones(21)}, "size mismatch for bias"),
    ],
)
def test_wrong_shapes_are_refused(changes, words):
    layer = make()
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict(damage(make().state_dict(), **changes))
    assert layer.dense_weight().isfinite().all()


@pytest.mark.parametrize("missing", ["weight", "weight_meta", "bias"])
def test_missing_and_unexpected_names_are_refused(missing):
    state = make().state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{missing}"'):
        make().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"packed"'):
        make().load_state_dict(make().state_dict() | {"packed": torch.ones(1)})


def test_dense_linear_does_not_load_it():
    """A loader that does not know the format must stop, not go on with half a weight."""
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(36, 20).load_state_dict(make().state_dict(), strict=False)


def test_loading_by_direct_assignment():
    """As model loaders do: new tensors are put in place of the old ones, then pack_()."""
    source, layer = make().state_dict(), Sparse24Linear(36, 20, device="meta")
    layer.weight = nn.Parameter(source["weight"], requires_grad=False)
    layer.weight_meta, layer.bias = source["weight_meta"], nn.Parameter(source["bias"])
    assert same(layer.pack_(), make())
    bad = Sparse24Linear(36, 20, device="meta")
    bad.weight = nn.Parameter(source["weight"][:, :4], requires_grad=False)
    bad.weight_meta = source["weight_meta"]
    with pytest.raises(ValueError, match=r"weight must be \[20, 18\]; got \[20, 4\]"):
        bad.pack_()


@pytest.mark.parametrize("trainable", [False, True])
def test_deepcopy_and_pickle(trainable):
    layer = make().requires_grad_(trainable)
    wanted = layer(x_for(layer))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for again in (copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        assert torch.equal(again(x_for(layer)), wanted)
        assert again.weight.requires_grad == trainable
        assert same(again, layer)
        with torch.no_grad():
            again.bias.add_(1)
            again.unpack_().weight.add_(1)
        assert torch.equal(layer(x_for(layer)), wanted)


@pytest.mark.parametrize("trainable", [False, True])
def test_to_another_dtype(trainable):
    layer = make().requires_grad_(trainable)
    dense = layer.dense_weight()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    assert torch.equal(half.dense_weight(), dense.bfloat16())
    assert half(x_for(half)).dtype == torch.bfloat16
    assert half.state_dict()["weight_meta"].dtype == torch.uint8
    assert torch.equal(half.float().dense_weight(), dense.bfloat16().float())
    same_dtype = layer.to(torch.float32)
    assert same_dtype is layer
    assert torch.equal(layer.dense_weight(), dense)


def test_to_a_dtype_without_kernel_is_refused():
    with pytest.raises(TypeError, match="float32, bfloat16, float16"):
        make().double()


def test_meta_device():
    with torch.device("meta"):
        layer = Sparse24Linear(36, 20)
    assert layer.weight.is_meta
    assert layer.weight_meta.is_meta
    assert layer(torch.ones(3, 36, device="meta")).shape == (3, 20)
    moved = make().to("meta")
    assert moved.weight.is_meta
    assert moved(torch.ones(2, 36, device="meta")).shape == (2, 20)
    for empty in (layer, moved):
        empty.to_empty(device="cpu")
        empty.load_state_dict(make().state_dict())
        assert same(empty, make())


def test_a_layer_used_twice_stays_one_layer():
    layer = make(36, 36)
    model = nn.ModuleDict({"a": layer, "b": layer})
    state = model.state_dict()
    assert state.keys() == {f"{m}.{t}" for m in "ab" for t in ("weight", "weight_meta", "bias")}
    other = nn.Sequential()
    shared = Sparse24Linear(36, 36)
    other = nn.ModuleDict({"a": shared, "b": shared})
    other.load_state_dict(state)
    assert other["a"] is other["b"]
    assert same(other["b"], layer)
    copied = copy.deepcopy(model)
    assert copied["a"] is copied["b"]


def test_two_layers_with_one_packed_parameter_are_refused():
    """The values of a packed layer are not in its Parameter: a second layer must not pack the placeholder."""
    first, second = make(), make()
    second.unpack_()
    second.weight = first.weight
    with pytest.raises(RuntimeError, match="placeholder"):
        second(x_for(second))


def test_parameters_cover_what_an_optimizer_and_a_counter_see():
    layer = make()
    assert sum(p.numel() for p in layer.parameters()) == 20 * 18 + 20
    assert [p.requires_grad for p in layer.parameters()] == [False, True]
    assert [name for name, _ in layer.named_buffers()] == ["packed"]
    assert [name for name, _ in layer.unpack_().named_buffers()] == ["weight_meta"]


def test_canonical_gives_the_form_of_the_definition():
    w = random_sparse24(20, 36)
    for a, b in zip(make().canonical(), ops.sparse24_compress(w), strict=True):
        assert torch.equal(a, b)
