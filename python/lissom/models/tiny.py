# SPDX-License-Identifier: Apache-2.0
"""Random models of every supported family, built in milliseconds: to test with, and to try a command on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .families import FAMILIES

_VOCABULARY = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_LLAMA: dict[str, Any] = {
    **_VOCABULARY,
    **_WIDTHS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_ROUTED: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_GEMMA: dict[str, Any] = {**_LLAMA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
_DEEPSEEK: dict[str, Any] = {
    **_LLAMA,
    **_ROUTED,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_MAMBA: dict[str, Any] = {
    **_VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "state_size": 8,
    "expand": 2,
}
_IMAGE: dict[str, Any] = {"image_size": 12, "patch_size": 4}
# Short windows, so that a short text meets both masks; blocks that differ where a family has such blocks.
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": {
        **_GEMMA,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "opt": {**_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.1},
    "gpt2": {**_VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 256},
    "bloom": {**_VOCABULARY, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    "mixtral": {**_LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_LLAMA,
        **_ROUTED,
        "num_experts": 6,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {**_LLAMA, **_ROUTED, "head_dim": 8, "num_experts": 6, "decoder_sparse_step": 2},
    "olmoe": {**_LLAMA, "num_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_LLAMA,
        "head_dim": 8,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_DEEPSEEK, "q_lora_rank": 12},
    "mamba": {**_MAMBA, "time_step_rank": 4},
    "falcon_mamba": {**_MAMBA, "time_step_rank": 4},
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "jamba": {
        **_LLAMA,
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "bert": {**_VOCABULARY, **_WIDTHS, "max_position_embeddings": 256},
    "vit": {**_WIDTHS, **_IMAGE},
    "clip_text_model": {**_VOCABULARY, **_WIDTHS, "max_position_embeddings": 256},
    "clip_vision_model": {**_WIDTHS, **_IMAGE},
}
_VISION = ("vit", "clip_vision_model")


def build_tiny(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> nn.Module:
    """A model of a few blocks of width 32 with random weights, in eval mode.

    Args:
        family: a key of `lissom.models.families.FAMILIES`.
        seed: of the weights.
        dtype: of the weights.
        **config: entries of the transformers config to set differently.

    Returns:
        A causal language model, or the bare encoder.

    Raises:
        ValueError: an unknown family.

    Example:
        >>> build_tiny("opt").config.model_type
        'opt'
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    auto: Any = AutoModelForCausalLM if FAMILIES[family].head else AutoModel
    devices: list[int] = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = auto.from_config(AutoConfig.for_model(family, **{**_CONFIGS[family], **config}))
        # Weights this large make attention and gates far from uniform, unlike the default 0.02.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith(("A_log", "conv1d.weight")):
                nn.init.normal_(parameter, std=0.2)
    if dtype == torch.float64:  # torch's grouped products, the default for experts, have no float64
        model.config._experts_implementation = "eager"
    return model.to(dtype).eval()  # type: ignore[no-any-return]


def tiny_inputs(
    family: str = "llama", *, sequences: int = 5, length: int = 24, seed: int = 0
) -> dict[str, Any]:
    """Random inputs of a tiny model of a family.

    Args:
        family: a key of `lissom.models.families.FAMILIES`.
        sequences: texts or images.
        length: tokens per text; images have 10 with their class token.
        seed: of the draw.

    Returns:
        `input_ids` [S, T], or `pixel_values` [S, 3, 12, 12].

    Example:
        >>> tiny_inputs("vit")["pixel_values"].shape
        torch.Size([5, 3, 12, 12])
    """
    generator = torch.Generator().manual_seed(seed)
    if family in _VISION:
        return {"pixel_values": torch.randn(sequences, 3, 12, 12, generator=generator)}
    return {"input_ids": torch.randint(3, 97, (sequences, length), generator=generator)}
