# SPDX-License-Identifier: Apache-2.0
"""Folded permutations leave every family's function as it is."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lissom.models.channels import RESIDUAL, find_channels
from lissom.models.families import FAMILIES
from lissom.models.fold import fold_permutation
from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import UnsupportedModelError, describe

VARIANTS = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    ("gemma3_text", {"tie_word_embeddings": False}),
    ("opt", {"word_embed_proj_dim": 32}),
    ("opt", {"word_embed_proj_dim": 32, "tie_word_embeddings": False}),
    ("opt", {"do_layer_norm_before": False}),
    ("gpt2", {"tie_word_embeddings": False}),
]


@pytest.fixture
def all_in_float64(monkeypatch):
    """transformers' norms, routers and mixers work in float32: let them stay in the model's float64."""

    def cast(function):
        def call(tensor, *args, **kwargs):
            if torch.float32 in (*args, kwargs.get("dtype")) and tensor.dtype == torch.float64:
                return tensor
            return function(tensor, *args, **kwargs)

        return call

    def computed(function):
        def call(tensor, *args, dtype=None, **kwargs):
            return function(tensor, *args, dtype=None if tensor.dtype == torch.float64 else dtype, **kwargs)

        return call

    for name in ("to", "type"):
        monkeypatch.setattr(torch.Tensor, name, cast(getattr(torch.Tensor, name)))
    to_float = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else to_float(t))
    for module in (nn.functional, torch.Tensor):
        monkeypatch.setattr(module, "softmax", computed(module.softmax))


def build(family, **config):
    """A tiny model in float64, with norms, biases and states that differ from channel to channel."""
    model = build_tiny(family, dtype=torch.float64, **config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("A_log"):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.3 * noise)
    return model


def random_orders(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        entry.name: torch.stack([torch.randperm(entry.size, generator=generator) for _ in range(entry.sets)])
        for entry in channels
    }


@torch.no_grad()
def outputs(model, family):
    result = model(**tiny_inputs(family, sequences=2, length=20))
    return result.logits if FAMILIES[family].head else result.last_hidden_state


def difference(model, family, before):
    return float((outputs(model, family) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("family, config", [*((family, {}) for family in FAMILIES), *VARIANTS])
def test_function_stays(family, config, all_in_float64):
    model = build(family, **config)
    before, state = outputs(model, family), {name: p.clone() for name, p in model.named_parameters()}
    channels = find_channels(model, describe(model))
    fold_permutation(model, channels, random_orders(channels))
    assert difference(model, family, before) < 1e-12
    moved = {piece.parameter for entry in channels for piece in entry.slices}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name]) == (name not in moved), name
        assert torch.equal(parameter.flatten().sort().values, state[name].flatten().sort().values), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_reads_channels(family):
    """All inputs can be ordered but those of Mamba's dt_proj, and of the stream where it is the model's output."""
    model = build_tiny(family)
    parts = describe(model)
    channels = find_channels(model, parts)
    readers = [reader for entry in channels for reader in entry.readers]
    assert len(readers) == len(set(readers))
    linears = {linear.name: linear for linear in parts.linears()}
    assert set(readers) <= set(linears)
    left = [name for name in linears if name not in readers]
    if FAMILIES[family].head:
        assert all(name.endswith("dt_proj") for name in left)
        assert channels[0].name == RESIDUAL
    else:
        assert RESIDUAL not in [entry.name for entry in channels]
    for entry in channels:
        assert entry.name in (RESIDUAL, entry.readers[0])
        for reader in entry.readers:
            assert linears[reader].shape[1] % (entry.sets * entry.size) == 0


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom", "gpt_oss", "deepseek_v3", "jamba"])
def test_no_slice_may_be_forgotten(family, all_in_float64):
    model = build(family, tie_word_embeddings=False)
    before = outputs(model, family)
    channels = find_channels(model, describe(model))
    orders = random_orders(channels)
    inverse = {name: order.argsort(1) for name, order in orders.items()}
    blocks = describe(model).blocks
    # An expert may see no token.
    looked_at = [e for e in channels if ".experts." not in e.name and not e.name.startswith(blocks[2].name)]
    for entry in looked_at:
        for number in range(len(entry.slices)):
            part = replace(entry, slices=entry.slices[:number] + entry.slices[number + 1 :])
            fold_permutation(model, [part], {entry.name: orders[entry.name]})
            assert difference(model, family, before) > 1e-9, entry.slices[number]
            fold_permutation(model, [part], {entry.name: inverse[entry.name]})
    assert difference(model, family, before) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back_gives_the_same_bits(dtype):
    model = build_tiny("qwen2_moe", dtype=dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    channels = find_channels(model, describe(model))
    orders = random_orders(channels)
    fold_permutation(model, channels, orders)
    fold_permutation(model, channels, {name: order.argsort(1) for name, order in orders.items()})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_order_says_what_comes_to_each_place():
    model = build_tiny("llama")
    parts = describe(model)
    channels = {entry.name: entry for entry in find_channels(model, parts)}
    name = "model.layers.1.mlp.down_proj"
    before = model.get_submodule(name).weight.clone()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    fold_permutation(model, tuple(channels.values()), {name: order[None]})
    assert torch.equal(model.get_submodule(name).weight, before[:, order])
    heads = "model.layers.1.self_attn.o_proj"
    assert (channels[heads].sets, channels[heads].size) == (2, 8)
    before = model.get_submodule(heads).weight.clone()
    order = torch.stack([torch.arange(8).roll(3), torch.arange(8)])
    fold_permutation(model, tuple(channels.values()), {heads: order})
    columns = torch.arange(32).view(4, 8)
    columns[:2] = columns[:2].roll(3, 1)  # query heads 0 and 1 share the first KV head
    assert torch.equal(model.get_submodule(heads).weight, before[:, columns.flatten()])


def test_block_by_block_is_the_same():
    whole, piecewise = build_tiny("gpt_oss"), build_tiny("gpt_oss")
    channels = find_channels(whole, describe(whole))
    orders = random_orders(channels)
    fold_permutation(whole, channels, orders)
    for within in (
        "model.layers.0.",
        "model.layers.1.",
        "model.layers.2.",
        "model.embed",
        "model.norm",
        "lm_",
    ):
        fold_permutation(piecewise, channels, orders, within=within)
    other = dict(piecewise.named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in whole.named_parameters())


def test_unknown_parts_are_refused():
    model = build_tiny("llama")
    model.model.layers[1].extra = nn.Parameter(torch.zeros(32))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.extra.*not known"):
        find_channels(model, describe(model))
    model = build_tiny("llama")
    with pytest.raises(UnsupportedModelError, match=r"'strange'.*llama"):
        find_channels(model, replace(describe(model), family="strange"))


def test_parameters_shared_by_different_channels_are_refused():
    model = build_tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match="one Parameter"):
        find_channels(model, describe(model))


@pytest.mark.parametrize(
    "order, words",
    [
        (torch.arange(48), r"int64 \[1, 48\].*\[48\]"),
        (torch.arange(48)[None].int(), "int32"),
        (torch.zeros(1, 48, dtype=torch.int64), "each of 0..47 once"),
        (torch.arange(1, 49)[None], "each of 0..47 once"),
    ],
)
def test_wrong_orders_are_refused_before_anything_moves(order, words):
    model = build_tiny("llama")
    channels = find_channels(model, describe(model))
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    good = {"model.layers.0.mlp.down_proj": torch.arange(48).flip(0)[None]}
    with pytest.raises(ValueError, match=words):
        fold_permutation(model, channels, good | {"model.layers.1.mlp.down_proj": order})
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    with pytest.raises(ValueError, match="'nothing'"):
        fold_permutation(model, channels, {"nothing": order})
