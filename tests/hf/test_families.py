# SPDX-License-Identifier: Apache-2.0
"""Round trips through every family that lissom prunes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lissom.hf.loading import load_model
from lissom.hf.quantizer import packed_modules
from lissom.hf.save import save

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
GATED = SIZES | {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (GATED, 14),
    "mistral": (GATED, 14),
    "qwen2": (GATED, 14),
    "qwen3": (GATED, 14),
    "gemma2": (GATED, 14),
    "gemma3_text": (GATED, 14),
    "opt": (SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, 12),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, logits, tmp_path):
    torch.manual_seed(0)
    settings, linears = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            quads = module.weight.data.view(-1, 4)
            quads.scatter_(1, quads.abs().topk(2, 1, largest=False).indices, 0)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    save(model, tmp_path / "packed")
    loaded = load_model(tmp_path / "packed")
    assert len(packed_modules(loaded)) == linears
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load_model(tmp_path / "again")), logits(loaded))
    save(loaded, tmp_path / "dense", format="dense")
    for name, tensor in load_model(tmp_path / "dense").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
