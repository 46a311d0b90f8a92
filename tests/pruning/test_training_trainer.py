# SPDX-License-Identifier: Apache-2.0
"""Masks in transformers' Trainer, trl's SFTTrainer and peft."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lissom
from lissom import assets
from lissom.models.tiny import build_tiny
from lissom.pruning.training import KeepMasksCallback, keep_masks

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "fine-tune-a-pruned-model.md"


@pytest.fixture
def pruned_llama():
    model = build_tiny("llama")
    return lissom.prune(model, pattern="2:4", method="magnitude").train()


class Windows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = torch.randint(97, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trainer_of(model, folder, *callbacks, **arguments):
    from transformers import Trainer, TrainingArguments

    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    settings = TrainingArguments(str(folder), **{**defaults, **arguments})
    return Trainer(model, settings, train_dataset=Windows(), callbacks=list(callbacks))


def zeros_of(model):
    return {name: model.get_submodule(name).weight == 0 for name in model.config.lissom["layers"]}


def assert_same_zeros(model, zeros):
    for name, pruned in zeros.items():
        assert torch.equal(model.get_submodule(name).weight == 0, pruned), name


def test_trainer_keeps_and_resumes(pruned_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    zeros = zeros_of(pruned_llama)
    callback = KeepMasksCallback()
    trainer_of(pruned_llama, tmp_path, callback, gradient_accumulation_steps=2).train()
    assert callback.keeper is None
    assert_same_zeros(pruned_llama, zeros)
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert_same_zeros(resumed, zeros)
    trainer_of(resumed, tmp_path, KeepMasksCallback, gradient_accumulation_steps=2).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert_same_zeros(resumed, zeros)
    for name, weight in pruned_llama.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight)


def test_trainer_without_the_callback_loses_the_mask_and_a_resume_says_so(pruned_llama, tmp_path):
    trainer_of(pruned_llama, tmp_path).train()
    with pytest.raises(ValueError, match="21 of 21 layers have lost the pattern"):
        trainer_of(pruned_llama, tmp_path, KeepMasksCallback()).train(resume_from_checkpoint=True)


def test_callback_covers_what_is_written_behind_the_step(pruned_llama):
    callback = KeepMasksCallback()
    callback.on_train_begin(None, None, None, model=pruned_llama)
    first = callback.keeper
    callback.on_train_begin(None, None, None, model=pruned_llama)
    assert first is not callback.keeper
    layer = pruned_llama.model.layers[0].mlp.up_proj
    layer.weight.data += 1
    with pytest.raises(RuntimeError, match="up_proj: 768 pruned weights are not zero"):
        callback.on_step_end(None, None, SimpleNamespace(should_save=True))
    callback.on_step_end(None, None, SimpleNamespace(should_save=False))
    callback.on_optimizer_step(None, None, None)
    callback.on_epoch_end(None, None, SimpleNamespace(should_save=True))
    layer.weight.data += 1
    with pytest.raises(RuntimeError, match="up_proj"):
        callback.on_train_end(None, None, None)
    with pytest.raises(AttributeError, match="no attribute 'keepr'"):
        _ = callback.keepr


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed (extra `train`)")


def fill_adapters(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def test_lora_by_trainer_on_a_dense_pruned_model(peft, pruned_llama, tmp_path):
    zeros = zeros_of(pruned_llama)
    model = peft.get_peft_model(pruned_llama, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert set(keep_masks(model, "zeros").names) == set(zeros)
    trainer_of(model, tmp_path, KeepMasksCallback()).train()
    fill_adapters(model)
    keeper = keep_masks(model)
    merged = model.merge_and_unload()
    with pytest.raises(RuntimeError, match="21 of 21 layers"):
        keeper.check()
    keeper.apply()
    assert_same_zeros(merged, zeros)


def test_lora_on_a_packed_model_merges_by_itself(peft, pruned_llama, tmp_path):
    from lissom.hf.lora import merge_lora

    zeros = zeros_of(pruned_llama)
    lissom.sparsify(pruned_llama)
    model = peft.get_peft_model(pruned_llama, peft.LoraConfig(r=4, target_modules="all-linear"))
    callback = KeepMasksCallback()
    trainer_of(model, tmp_path, callback).train()
    fill_adapters(model)
    merged = merge_lora(model)
    for name, pruned in zeros.items():
        assert torch.equal(merged.get_submodule(name).dense_weight() == 0, pruned)


def test_copies_that_peft_trains_are_masked_by_their_names(peft, pruned_llama):
    settings = peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["down_proj"])
    zeros = zeros_of(pruned_llama)
    model = peft.get_peft_model(pruned_llama, settings)
    with pytest.raises(ValueError, match=r"0\.mlp\.down_proj, which has no weight in this model: pass masks"):
        keep_masks(model)
    copies = {
        f"{name}.modules_to_save.default": pruned for name, pruned in zeros.items() if "down_proj" in name
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with keep_masks(model, copies):
        tokens = Windows()[0]["input_ids"][None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert_same_zeros(model.merge_and_unload(), {n: z for n, z in zeros.items() if "down_proj" in n})


# --- the guide


def test_guide_of_trl_runs(tmp_path, monkeypatch):
    """Its other sections run in tests/house/test_howto.py, which must not depend on trl."""
    pytest.importorskip("trl", reason="trl is not installed (extra `train`)")
    text = GUIDE.read_text(encoding="utf-8")
    (script,) = re.findall(r"^```py\n(.*?)^```", text, re.S | re.M)
    assert "SFTTrainer" in script
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(assets.TINY_LLAMA)
    lissom.prune(model, pattern="2:4", method="magnitude")
    tokenizer = AutoTokenizer.from_pretrained(assets.TINY_LLAMA)
    lissom.save(model, "lean", tokenizer=tokenizer, format="dense")
    script = script.replace(".cache/lissom/prose.train.txt", str(assets.CALIBRATION_TEXT))
    scope = {}
    exec(script, scope)
    assert_same_zeros(scope["model"], zeros_of(model))
