# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters by peft on packed linears."""

from __future__ import annotations

import copy
import io
import itertools
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

import lissom
from lissom.hf import lora
from lissom.hf.lora import merge_lora
from lissom.hf.quantizer import packed_modules
from lissom.hf.save import save
from lissom.nn import Sparse24Linear

peft = pytest.importorskip("peft", reason="peft is not installed (extra `train`)")


@pytest.fixture
def loaded(packed_folder):
    return AutoModelForCausalLM.from_pretrained(packed_folder)


@pytest.fixture
def adapted(loaded):
    """Adapters on all kinds of layers: packed with and without bias, and the dense head; not zero."""
    torch.manual_seed(0)
    targets = ["q_proj", "up_proj", "down_proj", "lm_head"]
    model = peft.get_peft_model(loaded, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_training_changes_adapters_only(loaded, tokens, logits):
    before = {name: module.dense_weight() for name, module in packed_modules(loaded).items()}
    wanted = logits(loaded)
    model = peft.get_peft_model(loaded, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"]))
    torch.testing.assert_close(logits(model), wanted)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 10
    optimizer = torch.optim.Adam(trainable, lr=5e-2)
    losses = []
    for _ in range(20):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, module in packed_modules(model.unload()).items():
        assert torch.equal(module.dense_weight(), before[name])


def test_adapter_gradients_match_the_dense_model(packed_folder, tokens):
    gradients = []
    for dense in (False, True):
        model = AutoModelForCausalLM.from_pretrained(packed_folder)
        model = model.dequantize() if dense else model
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.fixture
def first_merge(monkeypatch):
    monkeypatch.setattr(lora, "_merges", itertools.count())


def weight_of(module):
    return module.dense_weight() if isinstance(module, Sparse24Linear) else module.weight.detach().clone()


def tuned_layers(model):
    layers = model.get_base_model().named_modules()
    return {name: layer for name, layer in layers if hasattr(layer, "get_delta_weight")}


@pytest.mark.parametrize("merge", [merge_lora, lambda model: model.merge_and_unload(safe_merge=True)])
def test_merge_adds_on_the_support_and_drops_the_rest(merge, adapted, first_merge, caplog, logits, tmp_path):
    before = {name: weight_of(layer.get_base_layer()) for name, layer in tuned_layers(adapted).items()}
    delta = {
        name: layer.get_delta_weight("default").detach() for name, layer in tuned_layers(adapted).items()
    }
    assert len(before) == 7
    with caplog.at_level(logging.INFO, logger="lissom"):
        merged = merge(adapted)
    packed = packed_modules(merged)
    assert len(packed) == 14
    for name, old in before.items():
        support = old != 0 if name in packed else torch.ones_like(old, dtype=torch.bool)
        wanted = torch.where(support, old + delta[name], 0)
        torch.testing.assert_close(weight_of(merged.get_submodule(name)), wanted)
    first = next(name for name in before if name in packed)
    share = delta[first][before[first] == 0].norm() / delta[first].norm()
    assert f"dropped {100 * share:.0f} %" in caplog.records[0].message
    assert [record.levelname for record in caplog.records] == ["WARNING"] + ["INFO"] * 5
    save(merged, tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged)
    )


def test_merge_of_two_adapters_with_bias(loaded):
    config = {"r": 2, "target_modules": ["q_proj"], "lora_bias": True}
    model = peft.get_peft_model(loaded, peft.LoraConfig(**config))
    model.add_adapter("second", peft.LoraConfig(**config))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    for name in ("default", "second"):
        torch.nn.init.normal_(layer.lora_B[name].weight)
        torch.nn.init.normal_(layer.lora_B[name].bias)
    base = layer.get_base_layer()
    old, bias = base.dense_weight(), base.bias.detach().clone()
    delta = sum(layer.get_delta_weight(name).detach() for name in ("default", "second"))
    shift = sum(layer.lora_B[name].bias.detach() * layer.scaling[name] for name in ("default", "second"))
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert layer.get_base_layer() is base, "unmerging must go back behind both merges"
    merged = merge_lora(model, adapter_names=["default", "second"]).model.layers[0].self_attn.q_proj
    torch.testing.assert_close(merged.dense_weight(), torch.where(old != 0, old + delta, 0))
    torch.testing.assert_close(merged.bias, bias + shift)


def test_unmerge_restores_the_very_weights(adapted, logits):
    layers = tuned_layers(adapted).values()
    packed = [layer for layer in layers if isinstance(layer.get_base_layer(), Sparse24Linear)]
    bases = [layer.get_base_layer() for layer in packed]
    keys, wanted = set(adapted.state_dict()), logits(adapted)
    adapted.merge_adapter()
    assert set(adapted.state_dict()) == keys
    merged = logits(adapted)
    assert (merged - wanted).abs().max() > 1e-3
    with adapted.disable_adapter():
        pass
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), wanted)
    for layer, base in zip(packed, bases, strict=True):
        assert layer.get_base_layer() is base
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), merged)


def test_disabling_a_merged_adapter_gives_the_base_model(adapted, packed_folder, logits):
    adapted.merge_adapter()
    with adapted.disable_adapter():
        got = logits(adapted)
    torch.testing.assert_close(got, logits(AutoModelForCausalLM.from_pretrained(packed_folder)))


def test_saved_adapter_is_loaded_and_merged(adapted, packed_folder, logits, tmp_path):
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(packed_folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), wanted)
    torch.testing.assert_close(logits(again.merge_and_unload()), logits(adapted.merge_and_unload()))


def test_adapted_model_survives_deepcopy_and_pickling(adapted, logits):
    stream = io.BytesIO()
    torch.save(adapted, stream)
    stream.seek(0)
    copies = [copy.deepcopy(adapted), torch.load(stream, weights_only=False)]
    wanted = logits(adapted.merge_and_unload())
    for twin in copies:
        torch.testing.assert_close(logits(twin.merge_and_unload()), wanted)


def test_merges_what_was_wrapped_before_the_hook(llama, monkeypatch):
    """As in a program that imports only lissom.nn before peft."""
    model = llama()
    lissom.sparsify(model)
    hooks = torch.nn.modules.module._global_module_registration_hooks
    monkeypatch.setattr(torch.nn.modules.module, "_global_module_registration_hooks", type(hooks)())
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert "merge" not in layer.__dict__
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    old, delta = layer.get_base_layer().dense_weight(), layer.get_delta_weight("default").detach()
    merged = merge_lora(model).model.layers[0].mlp.up_proj
    torch.testing.assert_close(merged.dense_weight(), torch.where(old != 0, old + delta, 0))


def test_broken_adapter_is_refused_by_safe_merge(adapted):
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    layer.lora_B["default"].weight.data[:] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        adapted.merge_and_unload(safe_merge=True)


def test_refusals(loaded, adapted):
    with pytest.raises(TypeError, match=r"needs a peft\.PeftModel, got Linear"):
        merge_lora(torch.nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"merge its adapters first with lissom\.hf\.merge_lora"):
        save(adapted, "nowhere")
    with pytest.raises(ValueError, match=r"merge them first with lissom\.hf\.merge_lora"):
        save(adapted.get_base_model(), "nowhere")


VARIANTS = {
    "aLoRA": (
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[1]),
        "plain LoRA",
    ),
    "IA3": (
        lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "ia3.Linear adapter cannot be merged",
    ),
}


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize("merge", [merge_lora, lambda model: model.merge_and_unload()])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_adapters_train_and_are_not_merged(variant, merge, loaded, tokens):
    config, message = VARIANTS[variant]
    model = peft.get_peft_model(loaded, config())
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    before = layer.get_base_layer().dense_weight()
    with pytest.raises(ValueError, match=message):
        merge(model)
    assert torch.equal(before, layer.get_base_layer().dense_weight())
