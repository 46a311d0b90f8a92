# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters by peft on packed linears."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from lissom.hf.lora import merge_lora
from lissom.hf.quantizer import packed_modules
from lissom.hf.save import save

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


def test_merge_adds_on_the_support_and_drops_the_rest(adapted, caplog, logits, tmp_path):
    before, delta = {}, {}
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            base = layer.get_base_layer()
            before[name] = (
                base.dense_weight() if hasattr(base, "dense_weight") else base.weight.detach().clone()
            )
            delta[name] = layer.get_delta_weight("default").detach()
    assert len(before) == 7
    with caplog.at_level(logging.WARNING, logger="lissom"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = merge_lora(adapted)
    packed = packed_modules(merged)
    assert len(packed) == 14
    all_, lost = 0.0, 0.0
    for name, old in before.items():
        module = merged.get_submodule(name)
        if name in packed:
            wanted = torch.where(old != 0, old + delta[name], 0)
            all_, lost = all_ + delta[name].norm() ** 2, lost + delta[name][old == 0].norm() ** 2
            torch.testing.assert_close(module.dense_weight(), wanted)
        else:
            torch.testing.assert_close(module.weight, old + delta[name])
    assert len(caplog.records) == 1
    assert f"dropped {100 * (lost / all_) ** 0.5:.0f} %" in caplog.text
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
    merged = merge_lora(model, adapter_names=["default", "second"]).model.layers[0].self_attn.q_proj
    torch.testing.assert_close(merged.dense_weight(), torch.where(old != 0, old + delta, 0))
    torch.testing.assert_close(merged.bias, bias + shift)


def test_refusals(loaded, adapted):
    with pytest.raises(TypeError, match=r"needs a peft\.PeftModel, got Linear"):
        merge_lora(torch.nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"merge its adapters first with lissom\.hf\.merge_lora"):
        save(adapted, "nowhere")
    with pytest.raises(ValueError, match=r"merge them first with lissom\.hf\.merge_lora"):
        save(adapted.get_base_model(), "nowhere")


def test_variants_are_refused_before_anything_is_merged(loaded):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[1])
    model = peft.get_peft_model(loaded, config)
    before = model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().dense_weight()
    with pytest.raises(ValueError, match="merges plain LoRA only"):
        merge_lora(model)
    after = model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().dense_weight()
    assert torch.equal(before, after)


def test_pefts_own_merge_fails_and_changes_nothing(adapted, logits):
    wanted = logits(adapted)
    with pytest.raises(RuntimeError):
        adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), wanted)
