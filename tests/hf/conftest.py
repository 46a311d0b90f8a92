# SPDX-License-Identifier: Apache-2.0
"""Tiny random models whose linears are 2:4, and folders made from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from lissom.hf.save import save

logging.disable_progress_bar()


def prune_by_magnitude(model: nn.Module) -> None:
    """Zeroes the two smallest of every four weights in all linears but the head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            quads = module.weight.data.view(-1, 4)
            quads.scatter_(1, quads.abs().topk(2, 1, largest=False).indices, 0)


def make_llama(*, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object) -> LlamaForCausalLM:
    """A Llama of 2 layers with 2:4 linears; attention biases, where asked for, are not zero."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | settings), dtype=dtype)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    prune_by_magnitude(model)
    return model


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    return make_llama


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed fp32 model with attention biases; do not write into it."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    save(make_llama(attention_bias=True), folder)
    return folder


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(24).view(2, 12)


@pytest.fixture
def logits(tokens: torch.Tensor) -> Callable[[PreTrainedModel], torch.Tensor]:
    @torch.no_grad()
    def compute(model: PreTrainedModel) -> torch.Tensor:
        return model(tokens).logits.float()

    return compute
