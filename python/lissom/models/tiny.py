# SPDX-License-Identifier: Apache-2.0
"""Random models of every supported family, built in milliseconds: to test with, and to try a command on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .walk import FAMILIES

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What each family needs beyond the Llama numbers: short windows, so that a short text meets both masks.
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def build_tiny(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> nn.Module:
    """A causal language model with three blocks of width 32 and random weights, in eval mode.

    Args:
        family: a key of `lissom.models.walk.FAMILIES`.
        seed: of the weights.
        dtype: of the weights.
        **config: entries of the transformers config to set differently.

    Returns:
        The model.

    Raises:
        ValueError: an unknown family.

    Example:
        >>> build_tiny("opt").config.model_type
        'opt'
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if family == "opt":
        numbers = {**_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.1}
    elif family == "gpt2":
        numbers = {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 48,
            "n_positions": 256,
            "vocab_size": 97,
        }
        numbers |= {"bos_token_id": 1, "eos_token_id": 2}
    else:
        numbers = {**_LLAMA, **_EXTRA[family]}
    devices: list[int] = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**numbers, **config}))
        # Weights this large make attention and gates far from uniform, unlike the default 0.02.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()
