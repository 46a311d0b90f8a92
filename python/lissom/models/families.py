# SPDX-License-Identifier: Apache-2.0
"""Where each supported architecture of transformers keeps its parts: the table behind `describe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class DirectInput:
    """The input of a linear that is never called, because its block multiplies by the weight itself.

    Attributes:
        source: path of the linear whose output begins with the input.
        norm: path of a module that is applied to it in between; absent ones are skipped.
    """

    source: str
    norm: str


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its parts; all paths are relative to the base model or the block.

    Blocks of one model may differ: a group is skipped in a block that has none of its linears, a single
    linear where the block says `None` in its place (DeepSeek without low-rank queries).

    Attributes:
        blocks: path of the list of blocks.
        groups: linears of a block in the order they run; those in one tuple read the same input.
        embed: paths of the embeddings.
        tail: modules between the last block and the output layer, in order; absent ones are skipped.
        experts: path of the module with the fused weights [E, .., ..] of routed experts, where a block has
            one.
        direct: linears whose weight the block reads without calling them.
        never: linears that are never pruned.
        head: the output layer reads the last block's output through `tail` alone.
        returns_tuple: the model expects a tuple from its blocks.
    """

    blocks: str
    groups: tuple[tuple[str, ...], ...]
    embed: tuple[str, ...]
    tail: tuple[str, ...] = ()
    experts: str | None = None
    direct: Mapping[str, DirectInput] = field(default_factory=dict)
    never: frozenset[str] = frozenset()
    head: bool = True
    returns_tuple: bool = False


def _qkv(attention: str, output: str) -> tuple[tuple[str, ...], ...]:
    return tuple(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj")), (f"{attention}.{output}",)


def _gated(mlp: str) -> tuple[tuple[str, ...], ...]:
    return (f"{mlp}.gate_proj", f"{mlp}.up_proj"), (f"{mlp}.down_proj",)


def _mamba(mixer: str) -> tuple[tuple[str, ...], ...]:
    return tuple((f"{mixer}.{name}",) for name in ("in_proj", "x_proj", "dt_proj", "out_proj"))


def _time_step(mixer: str) -> dict[str, DirectInput]:
    return {f"{mixer}.dt_proj": DirectInput(f"{mixer}.x_proj", f"{mixer}.dt_layernorm")}


_ATTENTION = _qkv("self_attn", "o_proj")
# Multi-head latent attention: queries and keys/values go through low-rank matrices; `q_proj` stands in
# models without low-rank queries.
_LATENT_ATTENTION = (
    ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.kv_b_proj",),
    ("self_attn.o_proj",),
)
_LLAMA = Family(blocks="layers", groups=_ATTENTION + _gated("mlp"), embed=("embed_tokens",), tail=("norm",))
_MOE = replace(_LLAMA, experts="mlp.experts")
_QWEN2_MOE = replace(
    _MOE,
    groups=_LLAMA.groups + _gated("mlp.shared_expert"),
    never=frozenset({"mlp.shared_expert_gate"}),  # one output: how much of the shared expert a token gets
)
_DEEPSEEK = replace(_MOE, groups=_LATENT_ATTENTION + _gated("mlp") + _gated("mlp.shared_experts"))
_JAMBA = replace(
    _LLAMA,
    groups=_mamba("mamba") + _ATTENTION + _gated("feed_forward"),
    tail=("final_layernorm",),
    experts="feed_forward.experts",
    direct=_time_step("mamba"),
)
_MAMBA = Family(
    blocks="layers",
    groups=_mamba("mixer"),
    embed=("embeddings",),
    tail=("norm_f",),
    direct=_time_step("mixer"),
)
_MAMBA2 = replace(_MAMBA, groups=(("mixer.in_proj",), ("mixer.out_proj",)), direct={})
_OPT = Family(
    blocks="decoder.layers",
    groups=(*_qkv("self_attn", "out_proj"), ("fc1",), ("fc2",)),
    embed=("decoder.embed_tokens", "decoder.embed_positions"),
    tail=("decoder.final_layer_norm", "decoder.project_out"),
)
_GPT2 = Family(
    blocks="h",
    groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    embed=("wte", "wpe"),
    tail=("ln_f",),
)
_BLOOM = Family(
    blocks="h",
    groups=(
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    embed=("word_embeddings", "word_embeddings_layernorm"),
    tail=("ln_f",),
    returns_tuple=True,
)
_BERT = Family(
    blocks="encoder.layer",
    groups=(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    embed=("embeddings",),
    head=False,
)
_VIT = Family(
    blocks="layers",
    groups=(*_qkv("attention", "o_proj"), ("mlp.fc1",), ("mlp.fc2",)),
    embed=("embeddings",),
    tail=("layernorm",),
    head=False,
)
_CLIP_TEXT = Family(
    blocks="encoder.layers",
    groups=(*_qkv("self_attn", "out_proj"), ("mlp.fc1",), ("mlp.fc2",)),
    embed=("embeddings",),
    tail=("final_layer_norm",),
    head=False,
)
_CLIP_VISION = replace(_CLIP_TEXT, embed=("embeddings", "pre_layrnorm"), tail=("post_layernorm",))
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "opt": _OPT,
    "gpt2": _GPT2,
    "bloom": _BLOOM,
    "mixtral": _MOE,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": _MOE,
    "olmoe": _MOE,
    "gpt_oss": _MOE,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": _MAMBA2,
    "jamba": _JAMBA,
    "bert": _BERT,
    "vit": _VIT,
    "clip_text_model": _CLIP_TEXT,
    "clip_vision_model": _CLIP_VISION,
}
# Models that consist of models in the table.
COMPOSED: dict[str, str] = {
    "clip": "two models with inputs of their own: pass model.vision_model or model.text_model",
}
