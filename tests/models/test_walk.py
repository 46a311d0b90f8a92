# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lissom.models.families import FAMILIES
from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import UnsupportedModelError, describe


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_family_is_found(family):
    model = build_tiny(family)
    parts = describe(model)
    assert parts.family == family
    modules = dict(model.named_modules())
    called = [linear for linear in parts.linears() if not linear.routed]
    inside = {
        name
        for block in parts.blocks
        for name, module in modules.items()
        if name.startswith(f"{block.name}.") and type(module).__name__ in ("Linear", "Conv1D")
    }
    assert {name.partition(".mlp.")[2] for name in inside - {linear.name for linear in called}} <= {
        "shared_expert_gate"
    }
    assert {linear.name for linear in called} <= inside
    for linear in called:
        assert modules[linear.name] is linear.module
        assert linear.weight().shape == linear.shape
        assert linear.weight().data_ptr() == linear.module.weight.data_ptr()
    assert all(name in modules for name in (*parts.embed, *parts.tail))
    assert parts.head is None or parts.head.name in modules


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_the_linears_that_read_the_same_tensor(family):
    model = build_tiny(family)
    linears = [linear for linear in describe(model).linears() if not linear.routed and not linear.aside]
    seen = {}
    handles = [
        linear.module.register_forward_pre_hook(
            lambda module, args, name=linear.name: seen.__setitem__(name, args[0])
        )
        for linear in linears
    ]
    model(**tiny_inputs(family))
    for handle in handles:
        handle.remove()
    for a in linears:
        for b in linears:
            assert (a.group == b.group) == (seen[a.name] is seen[b.name]), (a.name, b.name)


def test_conv1d_weight_is_a_transposed_view():
    linear = describe(build_tiny("gpt2")).linears()[0]
    assert linear.shape == (96, 32)
    linear.weight()[5, 7] = 123.0
    assert linear.module.weight[7, 5] == 123.0


def test_base_model_without_head():
    model = build_tiny("llama").model
    parts = describe(model)
    assert parts.base == ""
    assert parts.head is None
    assert parts.blocks[0].name == "layers.0"


def test_meta_model_is_described_without_values():
    with torch.device("meta"):
        model = build_tiny("llama")
    assert describe(model).linears()[0].shape == (32, 32)


def test_tied_head_and_shared_linear_are_told():
    model = build_tiny("llama", tie_word_embeddings=True)
    assert describe(model).head.shared_with == "model.embed_tokens"
    model = build_tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    shared = {linear.name: linear.shared_with for linear in describe(model).linears() if linear.shared_with}
    assert shared == {
        "model.layers.0.mlp.up_proj": "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.up_proj": "model.layers.0.mlp.up_proj",
    }


def _from_config(kind, **numbers):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **numbers))


@pytest.mark.parametrize("kind", ["phi3", "rwkv"])
def test_other_architectures_are_refused(kind):
    model = _from_config(kind, hidden_size=32, num_hidden_layers=1, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match=f"'{kind}' is not an architecture.*known: llama"):
        describe(model)


def test_model_without_config_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"Linear \(it has no config"):
        describe(nn.Linear(2, 2))


def test_fused_weight_that_nobody_knows_is_refused():
    model = build_tiny("llama")
    model.model.layers[0].mlp.experts = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(UnsupportedModelError, match=r"mlp\.experts is a fused 3-D weight"):
        describe(model)


def test_adapter_is_refused():
    model = build_tiny("llama")
    model.model.layers[1].mlp.lora_A = nn.Linear(32, 4)
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.lora_A .*merge adapters"):
        describe(model)


def test_replaced_linear_is_refused():
    model = build_tiny("llama")
    model.model.layers[0].mlp.up_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj is a Identity, not a linear layer"):
        describe(model)


@pytest.mark.parametrize(
    "stored", [torch.zeros(32, 24, dtype=torch.float32), torch.zeros(48, 32, dtype=torch.int8)]
)
def test_packed_or_quantised_weight_is_not_read_as_dense(stored):
    model = build_tiny("llama")
    module = model.model.layers[0].mlp.up_proj
    module.weight = nn.Parameter(stored, requires_grad=False)
    linear = next(x for x in describe(model).linears() if x.module is module)
    assert linear.shape == (48, 32)
    with pytest.raises(UnsupportedModelError, match="up_proj has no dense weight"):
        linear.weight()
