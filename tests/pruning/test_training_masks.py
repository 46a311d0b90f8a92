# SPDX-License-Identifier: Apache-2.0
"""Where the masks of a training come from, and that packed linears need none."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lissom
from lissom.models.tiny import build_tiny
from lissom.models.walk import describe
from lissom.nn import Sparse24Linear
from lissom.pruning.training import keep_masks


def make_net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).to(dtype)


@torch.no_grad()
def set_two_four(model):
    """Half of each linear to zero, in place; returns where."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            order = module.weight.abs().reshape(-1, 4).argsort(-1)
            pruned = torch.zeros(len(order), 4, dtype=torch.bool).scatter_(1, order[:, :2], True)
            masks[name] = pruned.view(module.weight.shape)
            module.weight.masked_fill_(masks[name], 0)
    return masks


@pytest.fixture
def pruned_llama():
    model = build_tiny("llama")
    return lissom.prune(model, pattern="2:4", method="magnitude").train()


def language_step(model, optimizer, seed=0):
    tokens = torch.randint(97, (4, 16), generator=torch.Generator().manual_seed(seed))
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("family, pattern", [("llama", "2:4"), ("gpt2", "1:4"), ("opt", "60%")])
def test_recorded_layers(family, pattern):
    model = lissom.prune(build_tiny(family), pattern=pattern, method="magnitude").train()
    zeros = {name: model.get_submodule(name).weight == 0 for name in model.config.lissom["layers"]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with keep_masks(model) as keeper:
        losses = [language_step(model, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert set(keeper.names) == set(model.config.lissom["layers"]) == keeper.masks().keys()
    for name, pruned in zeros.items():
        assert torch.equal(model.get_submodule(name).weight == 0, pruned)
        assert torch.equal(keeper.masks()[name], pruned)


def test_each_layer_has_a_pattern_of_its_own():
    model = build_tiny("llama")
    pattern = {"re:.*down_proj": "dense", "re:.*mlp.*": "2:4", "re:.*": "50%"}
    lissom.prune(model, pattern=pattern, method="magnitude")
    keeper = keep_masks(model)
    assert len(keeper.names) == 18
    assert not [name for name in keeper.names if "down_proj" in name]
    model.model.layers[0].self_attn.q_proj.weight.data[:8] = 1
    with pytest.raises(ValueError, match=r"q_proj has \d+ zeros where 50% asks for 512; 1 of 18 layers have"):
        keep_masks(model)


BREAKS = {
    "2:4": ((0, slice(3)), "is not 2:4 in 1 of 16 groups"),
    "1:4": ((0, slice(2)), "is not 1:4 in 1 of 16 groups"),
    "2:4t": ((slice(3), 0), "is not 2:4t in 1 of 32 groups"),
    "2:4+70%": ((slice(None), slice(0, 8, 2)), "has 32 zeros where 2:4+70% asks for 40"),
    "65%": ((slice(4), slice(None)), "has 32 zeros where 65% asks for 40"),
}


@pytest.mark.parametrize("spec", BREAKS)
@pytest.mark.parametrize("as_map", [True, False])
def test_patterns_are_verified(spec, as_map):
    layer = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    text = json.dumps({"re:.*": spec}) if as_map else spec
    model.config = SimpleNamespace(lissom={"pattern": text, "layers": ["0"]})
    assert keep_masks(model).names == ("0",)
    where, message = BREAKS[spec]
    layer.weight.data[where] = 1
    with pytest.raises(ValueError, match=re.escape(f"0 {message}; 1 of 1 layers have lost")):
        keep_masks(model)


def test_lost_pattern_is_reported(pruned_llama):
    layer = pruned_llama.model.layers[1].mlp.down_proj
    layer.weight.data[3, 4:8] = 1
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj is not 2:4 in 1 of 384 groups; 1 of 21"):
        keep_masks(pruned_llama)
    assert len(keep_masks(pruned_llama, "zeros").names) == 21
    pruned_llama.config.lissom["pattern"] = "50%"
    with pytest.raises(ValueError, match="down_proj has 766 zeros where 50% asks for 768"):
        keep_masks(pruned_llama)


def test_zeros_leave_embeddings_and_fresh_adapters():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4, padding_idx=0), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    model["fresh"] = nn.Linear(4, 4)
    nn.init.zeros_(model["fresh"].weight)
    with pytest.raises(ValueError, match="no mask to keep"):
        keep_masks(model, "zeros")
    model["body"] = nn.Linear(4, 4)
    model["body"].weight.data[0, 0] = 0
    assert keep_masks(model, "zeros").names == ("body",)


def test_shared_weights_are_masked_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    masks = set_two_four(model)
    for given_masks in ("zeros", {"0": masks["0"], "1.weight": masks["0"]}):
        with keep_masks(model, given_masks) as keeper:
            assert keeper.names == ("0",)
            train_shared = torch.optim.Adam(model.parameters(), lr=0.1)
            model(torch.ones(1, 8)).sum().backward()
            train_shared.step()
    assert torch.equal(model[1].weight == 0, masks["0"])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 8, 4))  # [experts, out, in]
        self.down = nn.Parameter(
            torch.randn(3, 4, 8)
        )  # [experts, in, out]: transposed, as some models store it

    def forward(self, x):
        return torch.einsum("ebi,eio->bo", torch.einsum("bi,eoi->ebo", x, self.gate_up), self.down.mT)


def test_experts_by_name():
    model = nn.Sequential(Experts())
    mask = torch.rand(3, 8, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    model[0].gate_up.data[mask] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with keep_masks(model, {"0.gate_up": mask}):
        for _ in range(3):
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
    assert torch.equal(model[0].gate_up == 0, mask)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_recorded_experts_are_parts_of_one_weight(family):
    """Both layouts of a fused weight: [experts, out, in], and transposed in gpt_oss."""
    model = lissom.prune(
        build_tiny(family), pattern="2:4", method="magnitude", exclude=[r"re:.*down_proj\.1"]
    ).train()
    refs = {ref.name: ref for ref in describe(model).linears()}
    experts = {name: ref.weight() == 0 for name, ref in refs.items() if ref.expert is not None}
    refs["model.layers.0.mlp.experts.down_proj.1"].weight()[0, 0] = 0  # not pruned: none of the mask
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with keep_masks(model) as keeper:
        for seed in range(3):
            language_step(model, optimizer, seed)
    fused = model.model.layers[0].mlp.experts.down_proj
    mask = keeper.masks()["model.layers.0.mlp.experts.down_proj"]
    assert mask.shape == fused.shape
    assert mask.float().mean() == 0.5 * (1 - 1 / len(fused))
    for name, pruned in experts.items():
        assert torch.equal(refs[name].weight() == 0, pruned), name
    refs["model.layers.1.mlp.experts.gate_up_proj.0"].weight()[5, :4] = 1
    with pytest.raises(ValueError, match=r"1\.mlp\.experts\.gate_up_proj\.0 is not 2:4 in 1 of"):
        keep_masks(model)


def test_refusals():
    model = make_net()
    set_two_four(model)
    right = model[0].weight == 0
    for masks, error, message in (
        (None, ValueError, "does not say which layers were pruned: pass masks='zeros'"),
        ("all", ValueError, "None, 'zeros' or a mapping from names to masks, got 'all'"),
        ({}, ValueError, "no mask to keep"),
        ({"7": right}, ValueError, "masks names '7', which is neither"),
        ({"1": right}, ValueError, "masks names '1', which is neither"),
        ({"0": right.float()}, TypeError, r"mask of 0 must be a bool tensor.* got torch\.float32"),
        ({"0": right.tolist()}, TypeError, "got list"),
        ({"0": right.t()}, ValueError, r"must be \[24, 16\] as its weight, got \[16, 24\]"),
        ({"0": ~right}, ValueError, "marks 192 weights that are not zero: True means pruned.* ~mask"),
    ):
        with pytest.raises(error, match=message):
            keep_masks(model, masks)
    with pytest.raises(ValueError, match=r"0 is Parameter .* on meta: a mask is kept only where"):
        keep_masks(make_net().to("meta"), {"0": right})
    with pytest.raises(ValueError, match=r"0 is Parameter \[4, 0\]"):
        keep_masks(nn.Sequential(nn.Linear(0, 4)), {"0": torch.zeros(4, 0, dtype=torch.bool)})
    keeper = keep_masks(model, {"0": right})
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(RuntimeError, match="0 is no longer a parameter, and its mask is for a whole weight"):
        keeper.check()


# --- packed linears keep theirs by construction


def test_packed_values_train_and_the_mask_stays(pruned_llama):
    dense = copy.deepcopy(pruned_llama)
    lissom.sparsify(pruned_llama)
    packed = [module for module in pruned_llama.modules() if isinstance(module, Sparse24Linear)]
    assert len(packed) == 21
    for module in packed:
        module.weight.requires_grad_(True)
    metas = [module.canonical()[1].clone() for module in packed]
    keeper = keep_masks(pruned_llama)
    assert keeper.names == ()
    assert len(keeper.packed) == 21
    results = []
    for model in (pruned_llama, dense):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        with keep_masks(model):
            results.append([language_step(model, optimizer, seed) for seed in range(5)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for module, meta in zip(packed, metas, strict=True):
        assert module.weight.grad is not None
        assert module.weight.grad.any()
        assert torch.equal(module.canonical()[1], meta)
    lookup = dict(dense.named_modules())
    for name, module in pruned_llama.named_modules():
        if isinstance(module, Sparse24Linear):
            torch.testing.assert_close(module.dense_weight(), lookup[name].weight.data, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="q_proj is packed and keeps its mask by construction"):
        keep_masks(pruned_llama, {"model.layers.0.self_attn.q_proj": torch.zeros(32, 32, dtype=torch.bool)})
