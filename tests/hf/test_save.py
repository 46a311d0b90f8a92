# SPDX-License-Identifier: Apache-2.0
"""Saving, loading and saving again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

import lissom
from lissom.hf.quantizer import packed_modules
from lissom.hf.save import save
from lissom.nn import Sparse24Linear

VARIANTS = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "k-tail": {"intermediate_size": 68},  # 17 quads: the last metadata byte is half used
}


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def reload(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request, llama):
    return llama(**request.param)


def test_packed_round_trip(variant, logits, tmp_path):
    save(variant, tmp_path / "dense", format="dense")
    report = save(variant, tmp_path / "packed")
    loaded = reload(tmp_path / "packed")
    assert set(packed_modules(loaded)) == set(report.modules)
    assert loaded.dtype == variant.dtype
    assert not loaded.training
    for name, module in packed_modules(loaded).items():
        assert torch.equal(module.dense_weight(), variant.get_submodule(name).weight)
        assert not module.weight.requires_grad
        assert module.packed is not None, "the loaded weight must live in the layout of the kernels"
    tolerance = 1e-5 if variant.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        logits(loaded), logits(reload(tmp_path / "dense")), rtol=tolerance, atol=tolerance
    )


def test_dense_format_is_ordinary(variant, logits, tmp_path):
    save(variant, tmp_path / "packed")
    save(reload(tmp_path / "packed"), tmp_path / "dense", format="dense")
    config = read_config(tmp_path / "dense")
    assert "quantization_config" not in config
    assert config["lissom"]["format"] == "dense"
    state = load_file(tmp_path / "dense" / "model.safetensors")
    assert not [name for name in state if name.endswith("weight_meta")]
    loaded = reload(tmp_path / "dense")
    assert not packed_modules(loaded)
    for name, parameter in variant.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_packed_is_smaller_by_the_expected_share(llama, tmp_path):
    model = llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    dense = save(model, tmp_path / "dense", format="dense")
    packed = save(model, tmp_path / "packed")
    weights = sum(model.get_submodule(name).weight.nbytes for name in packed.modules)
    saved = (tmp_path / "dense/model.safetensors").stat().st_size
    saved -= (tmp_path / "packed/model.safetensors").stat().st_size
    headers = 14 * 200
    assert abs(saved - weights * 7 / 16) < headers
    assert packed.bytes < dense.bytes
    assert "14 linears 2:4, packed: loads with lissom" in str(packed)
    assert "none is faster for it" in str(dense)


def test_plain_save_pretrained_round_trips(variant, tmp_path):
    save(variant, tmp_path / "first")
    loaded = reload(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    entries = [read_config(tmp_path / name)["quantization_config"] for name in ("first", "second")]
    assert entries[0] == entries[1]
    assert packed_modules(reload(tmp_path / "second"))


def test_save_pretrained_follows_changes_made_after_loading(packed_folder, tmp_path):
    model = reload(packed_folder)
    model.set_submodule(
        "model.layers.0.mlp.up_proj", model.get_submodule("model.layers.0.mlp.up_proj").to_linear()
    )
    model.save_pretrained(tmp_path / "out")
    assert "model.layers.0.mlp.up_proj" not in read_config(tmp_path / "out")["quantization_config"]["modules"]
    assert len(packed_modules(reload(tmp_path / "out"))) == 13


def test_sharded(llama, logits, tmp_path):
    model = llama()
    report = save(model, tmp_path / "out", max_shard_size="20KB")
    shards = [name for name in report.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in report.files
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_override_converts_values_and_keeps_metadata(stored, wanted, llama, tmp_path):
    model = llama(dtype=stored)
    save(model, tmp_path / "out")
    loaded = reload(tmp_path / "out", dtype=wanted)
    for name, module in packed_modules(loaded).items():
        assert torch.equal(module.dense_weight(), model.get_submodule(name).weight.to(wanted))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(device_map, packed_folder, logits, tmp_path):
    loaded = reload(packed_folder, device_map=device_map)
    torch.testing.assert_close(logits(loaded), logits(reload(packed_folder)))
    save(loaded, tmp_path / "again")
    torch.testing.assert_close(logits(reload(tmp_path / "again")), logits(loaded))


def test_disk_offload_is_refused(packed_folder):
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        reload(packed_folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_generate(packed_folder, tokens):
    loaded = reload(packed_folder)
    dense = loaded.dequantize()
    assert not packed_modules(dense)
    wanted = dense.generate(tokens, max_new_tokens=8, do_sample=False)
    got = reload(packed_folder).generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, wanted)


@pytest.mark.slow
def test_compile(packed_folder, logits):
    loaded = reload(packed_folder)
    wanted = logits(loaded)
    loaded.forward = torch.compile(loaded.forward, fullgraph=True)
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4)


def test_base_model_loads_a_checkpoint_with_a_head(packed_folder, tokens):
    base = AutoModel.from_pretrained(packed_folder)
    assert len(packed_modules(base)) == 14
    wanted = reload(packed_folder).model(tokens).last_hidden_state
    torch.testing.assert_close(base(tokens).last_hidden_state, wanted)


def test_headless_folder_loads_below_a_head(packed_folder, tokens, tmp_path):
    base = AutoModel.from_pretrained(packed_folder)
    save(base, tmp_path / "base")
    model = reload(tmp_path / "base")
    assert len(packed_modules(model)) == 14
    torch.testing.assert_close(model.model(tokens).last_hidden_state, base(tokens).last_hidden_state)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of its model, the first is lm_head\.weight"):
        lissom.hf.load_model(tmp_path / "base")


def test_tensors_stored_under_other_names(packed_folder, logits, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.layers", "old.layers"): tensor for name, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = reload(folder, key_mapping={r"^old\.layers": "model.layers"})
    torch.testing.assert_close(logits(loaded), logits(reload(packed_folder)))
    with pytest.raises(ValueError, match=r"is missing from the checkpoint"):
        reload(folder)


def test_another_head_may_be_new(packed_folder):
    model = AutoModelForSequenceClassification.from_pretrained(packed_folder, num_labels=3)
    assert len(packed_modules(model)) == 14
    assert model.score.weight.shape == (3, 32)


def test_sparsified_model_saves_what_it_holds(llama, logits, tmp_path):
    model = llama()
    lissom.sparsify(model)
    wanted = logits(model)
    before = dict(model.config.to_dict())
    save(model, tmp_path / "out")
    assert model.config.to_dict() == before
    torch.testing.assert_close(logits(model), wanted)
    torch.testing.assert_close(logits(reload(tmp_path / "out")), wanted)


def test_packed_head_of_a_tied_config_is_saved_untied(llama, logits, tmp_path):
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head = Sparse24Linear.from_linear(model.lm_head, pattern="magnitude")
    save(model, tmp_path / "out")
    loaded = reload(tmp_path / "out")
    assert not loaded.config.tie_word_embeddings
    assert "lm_head" in packed_modules(loaded)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    save(loaded, tmp_path / "dense", format="dense")
    torch.testing.assert_close(logits(reload(tmp_path / "dense")), logits(model), rtol=1e-5, atol=1e-5)


def test_tied_weights_stay_dense_even_when_two_four(llama, tmp_path):
    model = llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight.view(-1, 4)[:, :2] = 0
    assert "lm_head" not in save(model, tmp_path / "out").modules
    loaded = reload(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_shared_config_does_not_leak(llama, tmp_path):
    model = llama()
    twin = LlamaForCausalLM(model.config)
    save(model, tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")
    twin.save_pretrained(tmp_path / "twin")
    assert "quantization_config" not in read_config(tmp_path / "twin")
    loaded = reload(tmp_path / "out")
    save(loaded, tmp_path / "dense", format="dense")
    assert loaded.config.quantization_config.modules
    assert loaded.hf_quantizer is not None


def test_gpt2_conv1d(logits, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    for module in model.modules():
        if isinstance(module, Conv1D):  # weight is [in, out]: quads run down the columns
            quads = module.weight.data.t().contiguous().view(-1, 4)
            quads.scatter_(1, quads.abs().topk(2, 1, largest=False).indices, 0)
            module.weight.data = quads.view(module.nf, -1).t().contiguous()
    assert len(save(model, tmp_path / "packed").modules) == 8
    loaded = reload(tmp_path / "packed")
    assert len(packed_modules(loaded)) == 8
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    save(loaded, tmp_path / "dense", format="dense")
    dense = reload(tmp_path / "dense")
    assert isinstance(dense.transformer.h[0].mlp.c_fc, Conv1D)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-5)
    assert isinstance(loaded.dequantize().transformer.h[0].mlp.c_fc, Conv1D)


def test_refusals(llama, tmp_path):
    model = llama()
    save(model, tmp_path / "taken")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(model, tmp_path / "taken")
    with pytest.raises(ValueError, match="'packed' or 'dense', got 'zip'"):
        save(model, tmp_path / "out", format="zip")
    with pytest.raises(TypeError, match="needs a transformers model, got Linear"):
        save(torch.nn.Linear(4, 4), tmp_path / "out")
    with pytest.raises(TypeError, match="perplexity"):
        save(model, tmp_path / "out", card={"perplexity": 3})
    dense = LlamaForCausalLM(LlamaConfig(**model.config.to_diff_dict()))
    with pytest.raises(ValueError, match="no linear of this model is 2:4"):
        save(dense, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["taken"]


def test_tokenizer_and_generation_config_are_saved(llama, tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    model = llama()
    model.generation_config.max_new_tokens = 7
    files = save(model, tmp_path / "out", tokenizer=tokenizer).files
    assert "tokenizer.json" in files
    assert reload(tmp_path / "out").generation_config.max_new_tokens == 7
    assert lissom.hf.load_tokenizer(tmp_path / "out").get_vocab() == {"a": 0, "b": 1}


def test_card_states_what_was_done(llama, tmp_path):
    model = llama()
    model.config.lissom = {
        "version": "0.1.0",
        "pattern": "2:4",
        "method": "sparsegpt",
        "calibration": {"samples": 64, "seq_len": 1024, "seed": 3, "source_sha256": "ab" * 32},
    }
    facts = {"base_model": "some/model", "perplexity_before": 21.7, "perplexity_after": 51.84}
    save(model, tmp_path / "out", card=facts)
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("2:4", "sparsegpt", "64 windows of 1024 tokens", "21.70 before, 51.84 after", "0.1.0"):
        assert part in text
    assert read_config(tmp_path / "out")["lissom"]["method"] == "sparsegpt"
    assert reload(tmp_path / "out").config.lissom["calibration"]["seed"] == 3
    edited = text.replace("# some/model, 2:4 sparse", "# My own words")
    (tmp_path / "out" / "README.md").write_text(edited)
    save(model, tmp_path / "out", overwrite=True, card={"perplexity_after": 50.0})
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# My own words" in text
    assert "50.00 after" in text
    assert "51.84" not in text
