# SPDX-License-Identifier: Apache-2.0
"""Finds the channels of a model that may change places without changing its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .walk import Block, ModelMap, UnsupportedModelError, plain_name


@dataclass(frozen=True)
class Slice:
    """Where the channels of some sets lie in one parameter.

    Channel c of set s is entry `start + (s * repeat + k) * step + c * spacing` of dimension `dim`, for every
    k < repeat (query heads that share a KV head).

    Attributes:
        parameter: full name.
        dim: dimension of the parameter, or of the part of one expert.
        start, step, spacing, repeat: as above.
        expert: entry of a leading dimension of experts, or None.
    """

    parameter: str
    dim: int
    start: int = 0
    step: int = 0
    spacing: int = 1
    repeat: int = 1
    expert: int | None = None


@dataclass(frozen=True)
class Channels:
    """Channels that may change places inside each of some sets, the same in every slice.

    Attributes:
        name: "residual", or the (first) linear that reads them, such as "model.layers.0.self_attn.o_proj".
        sets: independent orders: 1, or one for each head.
        size: channels in a set.
        slices: everything that moves.
        readers: names of the linears whose columns they are.
    """

    name: str
    sets: int
    size: int
    slices: tuple[Slice, ...]
    readers: tuple[str, ...]


RESIDUAL = "residual"


def find_channels(model: nn.Module, parts: ModelMap) -> tuple[Channels, ...]:
    """The sets of channels of a model that may change places exactly.

    * the residual stream, one order for the whole model. It is left out where it is the output of the model (a
      base model or an encoder, without an output layer).
    * inside each head, from the value projection to the output projection; with grouped queries one order for each
      KV head. Mamba-2: inside each head of the mixer.
    * the hidden channels of each MLP and of each expert, the inner channels of a Mamba mixer, and the latents of
      multi-head latent attention.

    Args:
        model: what `describe` was given.
        parts: its result.

    Returns:
        The sets, the residual stream first; nothing is changed.

    Raises:
        UnsupportedModelError: an architecture for which this is not known, or parts that the known one does not have;
            the sentence names them.

    Example:
        >>> from .tiny import build_tiny
        >>> from .walk import describe
        >>> tiny = build_tiny("llama")
        >>> [channels.name for channels in find_channels(tiny, describe(tiny))][:3]
        ['residual', 'model.layers.0.self_attn.o_proj', 'model.layers.0.mlp.down_proj']
    """
    layout = _LAYOUTS.get(parts.family)
    if layout is None:
        raise UnsupportedModelError(
            f"model_type {parts.family!r}: it is not known which channels may change places "
            f"(known: {', '.join(_LAYOUTS)}); prune without permuting"
        )
    stream = _Stream(model)
    inner: list[Channels] = []
    for block in parts.blocks:
        found = _ChannelFinder(model.config, block, stream)
        layout(found)
        inner += found.channels
    if parts.head is None:
        residual = []
    else:
        _find_ends(model, parts, stream)
        stream.refuse_strangers()
        residual = [stream.channels()]
    every = (*residual, *inner)
    _check_shared(model, every)
    return every


def _check_shared(model: nn.Module, channels: tuple[Channels, ...]) -> None:
    """A Parameter that goes by several names must move in the same way under each of them."""
    moves: dict[str, set[tuple[str, Slice]]] = {}
    for entry in channels:
        for piece in entry.slices:
            moves.setdefault(piece.parameter, set()).add((entry.name, replace(piece, parameter="")))
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if moves.get(plain_name(name), set()) != moves.get(plain_name(other), set()):
            raise UnsupportedModelError(
                f"{name} and {other} are one Parameter but lie along different channels: untie them first, "
                "or prune without permuting"
            )


@dataclass
class _Stream:
    """What lies along the residual stream, and every parameter whose place is known."""

    model: nn.Module
    slices: list[Slice] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    def add(self, name: str, dim: int) -> None:
        self.slices.append(Slice(name, dim))
        self.known.add(name)

    def know(self, name: str, module: Any) -> None:
        """No channel that moves lies along the parameters of a module, except where something else says so."""
        if isinstance(module, nn.Parameter):
            self.known.add(name)
        elif module is not None:
            self.known |= {plain_name(f"{name}.{own}") for own, _ in module.named_parameters()}

    def refuse_strangers(self) -> None:
        names = [plain_name(name) for name, _ in self.model.named_parameters(remove_duplicate=False)]
        unknown = [name for name in names if name not in self.known]
        if unknown:
            raise UnsupportedModelError(
                f"{unknown[0]} is a parameter that this architecture does not usually have: it is not known "
                "whether it lies along the residual stream; prune without permuting"
            )

    def channels(self) -> Channels:
        width = {self.model.get_parameter(piece.parameter).shape[piece.dim] for piece in self.slices}
        if len(width) != 1:
            raise UnsupportedModelError(
                f"the residual stream of {type(self.model).__name__} is {sorted(width)} channels wide in "
                "different places; prune without permuting"
            )
        return Channels(RESIDUAL, 1, width.pop(), tuple(self.slices), tuple(self.readers))


def _find_ends(model: nn.Module, parts: ModelMap, stream: _Stream) -> None:
    """What lies along the residual stream outside the blocks."""
    assert parts.head is not None
    names = [*parts.embed, *parts.tail, parts.head.name]
    project_in = f"{parts.embed[0].rpartition('.')[0]}.project_in"
    if _child(model, project_in) is not None:
        # OPT 350m: embeddings and output layer have a width of their own, behind two projections.
        for name in (parts.embed[0], parts.head.name):
            names.remove(name)
            stream.know(name, model.get_submodule(name))
        stream.add(f"{project_in}.weight", 0)
    for name in names:
        module = model.get_submodule(name)
        stream.know(name, module)
        for own, parameter in module.named_parameters():
            if own == "weight" and parameter.dim() == 2:
                stream.add(f"{name}.weight", 1)
            elif not isinstance(module, nn.Linear):
                stream.add(f"{name}.{own}", 0)


@dataclass
class _ChannelFinder:
    """Notes what lies along which channels of one block; paths that the block lacks are skipped."""

    config: Any
    block: Block
    stream: _Stream
    channels: list[Channels] = field(default_factory=list)

    def reads(self, *paths: str) -> None:
        """Linears and routers whose columns are the residual stream."""
        linears = {linear.name for linear in self.block.linears}
        for name, module in self._present(paths):
            self.stream.know(name, module)
            self.stream.add(f"{name}.weight", 1 - _rows_dim(module))
            if name in linears:
                self.stream.readers.append(name)

    def writes(self, *paths: str) -> None:
        """Linears whose rows are the residual stream."""
        for name, module in self._present(paths):
            self.stream.know(name, module)
            self.stream.add(f"{name}.weight", _rows_dim(module))
            if module.bias is not None:
                self.stream.add(f"{name}.bias", 0)

    def norms(self, *paths: str) -> None:
        """Norms of the residual stream, which do not mind its order."""
        for name, module in self._present(paths):
            for own, _ in module.named_parameters():
                self.stream.add(f"{name}.{own}", 0)

    def others(self, *paths: str) -> None:
        """Modules and parameters along which no channel lies that may move."""
        for name, module in self._present(paths):
            self.stream.know(name, module)

    def heads(self, value: str, output: str, *, fused: str | None = None) -> None:
        """Channels inside each head, between a value projection and the output projection.

        Args:
            value: path of the linear whose rows are the values, KV head by KV head.
            output: path of the linear whose columns they are, head by head.
            fused: the value projection makes more, and ends with the values "head" by head, or as a "whole".
        """
        for (value_name, makes), (name, module) in zip(self._present((value,)), self._present((output,))):
            heads = int(self.config.num_attention_heads)
            size = _columns(module) // heads
            rows = int(makes.weight.shape[_rows_dim(makes)])
            sets = heads if fused else rows // size
            step = rows // sets if fused == "head" else size
            start = rows - sets * size if fused == "whole" else step - size
            columns = Slice(f"{name}.weight", 1 - _rows_dim(module), step=size, repeat=heads // sets)
            pieces = (*self._rows(value_name, makes, start=start, step=step), columns)
            self.channels.append(Channels(name, sets, size, pieces, (name,)))

    def inner(self, rows: Mapping[str, int], columns: tuple[str, ...], *, sets: int = 1) -> None:
        """Channels that no other part of the block sees.

        Args:
            rows: path of what makes them, or works on each channel alone -> how many times they stand there, one
                behind the other.
            columns: linears that read them.
            sets: of neighbouring channels; exchanges stay inside a set.
        """
        readers = list(self._present(columns))
        if not readers:
            return
        width = _columns(readers[0][1])
        pieces: list[Slice] = []
        for path, times in rows.items():
            for name, module in self._present((path,)):
                for time in range(times):
                    pieces += self._rows(name, module, start=time * width, step=width // sets)
        for name, module in readers:
            pieces.append(Slice(f"{name}.weight", 1 - _rows_dim(module), step=width // sets))
            self.stream.know(name, module)
        names = tuple(name for name, _ in readers)
        self.channels.append(Channels(names[0], sets, width // sets, tuple(pieces), names))

    def experts(self, path: str) -> None:
        """Fused experts: the residual stream on both sides, and hidden channels of each expert's own."""
        for name, module in self._present((path,)):
            self.stream.know(name, module)
            rows = 1 if module.is_transposed else 0
            self.stream.add(f"{name}.gate_up_proj", 2 - rows)
            self.stream.add(f"{name}.down_proj", 1 + rows)
            if module.has_bias:
                self.stream.add(f"{name}.down_proj_bias", 1)
            width = module.down_proj.shape[2 - rows]
            # Gates and ups stand one behind the other, or by turns.
            halves = [(0, 1), (width, 1)] if module.is_concatenated else [(0, 2), (1, 2)]
            for expert in range(len(module.down_proj)):
                self.stream.readers.append(f"{name}.gate_up_proj.{expert}")
                pieces = [Slice(f"{name}.down_proj", 1 - rows, expert=expert)]
                for start, spacing in halves:
                    where = {"start": start, "spacing": spacing, "expert": expert}
                    pieces.append(Slice(f"{name}.gate_up_proj", rows, **where))
                    if module.has_bias:
                        pieces.append(Slice(f"{name}.gate_up_proj_bias", 0, **where))
                reader = f"{name}.down_proj.{expert}"
                self.channels.append(Channels(reader, 1, width, tuple(pieces), (reader,)))

    def _rows(self, name: str, module: Any, *, start: int, step: int) -> list[Slice]:
        self.stream.know(name, module)
        if isinstance(module, nn.Parameter):
            return [Slice(name, 0, start, step)]
        dims = {own: 0 for own, _ in module.named_parameters()} | {"weight": _rows_dim(module)}
        return [Slice(f"{name}.{own}", dim, start, step) for own, dim in dims.items()]

    def _present(self, paths: tuple[str, ...]) -> list[tuple[str, Any]]:
        found = [(f"{self.block.name}.{path}", _child(self.block.module, path)) for path in paths]
        return [(name, module) for name, module in found if module is not None]


def _attention(found: _ChannelFinder, path: str = "self_attn", output: str = "o_proj") -> None:
    found.reads(*(f"{path}.{name}" for name in ("q_proj", "k_proj", "v_proj")))
    found.heads(f"{path}.v_proj", f"{path}.{output}")
    found.writes(f"{path}.{output}")
    found.others(*(f"{path}.{name}" for name in ("q_norm", "k_norm", "sinks")))


def _mlp(found: _ChannelFinder, path: str) -> None:
    found.reads(f"{path}.gate_proj", f"{path}.up_proj")
    found.inner({f"{path}.gate_proj": 1, f"{path}.up_proj": 1}, (f"{path}.down_proj",))
    found.writes(f"{path}.down_proj")


def _llama(found: _ChannelFinder) -> None:
    found.norms("input_layernorm", "post_attention_layernorm")
    _attention(found)
    _mlp(found, "mlp")


def _gemma(found: _ChannelFinder) -> None:
    _llama(found)
    found.norms("pre_feedforward_layernorm", "post_feedforward_layernorm")


def _moe(found: _ChannelFinder) -> None:
    _llama(found)
    found.reads("mlp.gate", "mlp.router", "mlp.shared_expert_gate")
    _mlp(found, "mlp.shared_expert")
    _mlp(found, "mlp.shared_experts")
    found.experts("mlp.experts")


def _deepseek(found: _ChannelFinder) -> None:
    _moe(found)
    path = "self_attn"
    found.reads(f"{path}.q_a_proj", f"{path}.kv_a_proj_with_mqa")
    for latent, reader in (("q_a", "q_b_proj"), ("kv_a", "kv_b_proj")):
        names = (f"{latent}_proj", f"{latent}_proj_with_mqa", f"{latent}_layernorm")
        found.inner({f"{path}.{name}": 1 for name in names}, (f"{path}.{reader}",))
    found.heads(f"{path}.kv_b_proj", f"{path}.o_proj", fused="head")


def _mamba_mixer(found: _ChannelFinder, path: str) -> None:
    rows = {"in_proj": 2, "conv1d": 1, "dt_proj": 1, "A_log": 1, "D": 1}
    found.reads(f"{path}.in_proj")
    found.inner(
        {f"{path}.{name}": times for name, times in rows.items()}, (f"{path}.out_proj", f"{path}.x_proj")
    )
    found.writes(f"{path}.out_proj")
    found.others(*(f"{path}.{name}_layernorm" for name in ("dt", "b", "c")))


def _mamba(found: _ChannelFinder) -> None:
    found.norms("norm")
    _mamba_mixer(found, "mixer")


def _mamba2(found: _ChannelFinder) -> None:
    found.norms("norm")
    found.reads("mixer.in_proj")
    rows = {"mixer.in_proj": 2, "mixer.conv1d": 1, "mixer.norm": 1}
    found.inner(rows, ("mixer.out_proj",), sets=int(found.config.num_heads))
    found.writes("mixer.out_proj")
    found.others("mixer.A_log", "mixer.D", "mixer.dt_bias")


def _jamba(found: _ChannelFinder) -> None:
    found.norms("input_layernorm", "pre_ff_layernorm")
    _attention(found)
    _mamba_mixer(found, "mamba")
    _mlp(found, "feed_forward")
    found.reads("feed_forward.router")
    found.experts("feed_forward.experts")


def _opt(found: _ChannelFinder) -> None:
    found.norms("self_attn_layer_norm", "final_layer_norm")
    _attention(found, output="out_proj")
    found.reads("fc1")
    found.inner({"fc1": 1}, ("fc2",))
    found.writes("fc2")


def _gpt2(found: _ChannelFinder) -> None:
    found.norms("ln_1", "ln_2")
    found.reads("attn.c_attn", "mlp.c_fc")
    found.heads("attn.c_attn", "attn.c_proj", fused="whole")
    found.inner({"mlp.c_fc": 1}, ("mlp.c_proj",))
    found.writes("attn.c_proj", "mlp.c_proj")


def _bloom(found: _ChannelFinder) -> None:
    found.norms("input_layernorm", "post_attention_layernorm")
    found.reads("self_attention.query_key_value", "mlp.dense_h_to_4h")
    found.heads("self_attention.query_key_value", "self_attention.dense", fused="head")
    found.inner({"mlp.dense_h_to_4h": 1}, ("mlp.dense_4h_to_h",))
    found.writes("self_attention.dense", "mlp.dense_4h_to_h")


def _bert(found: _ChannelFinder) -> None:
    found.heads("attention.self.value", "attention.output.dense")
    found.inner({"intermediate.dense": 1}, ("output.dense",))


def _vit(found: _ChannelFinder) -> None:
    found.heads("attention.v_proj", "attention.o_proj")
    found.inner({"mlp.fc1": 1}, ("mlp.fc2",))


def _clip(found: _ChannelFinder) -> None:
    found.heads("self_attn.v_proj", "self_attn.out_proj")
    found.inner({"mlp.fc1": 1}, ("mlp.fc2",))


_LAYOUTS: dict[str, Callable[[_ChannelFinder], None]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "opt": _opt,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "mixtral": _moe,
    "qwen2_moe": _moe,
    "qwen3_moe": _moe,
    "olmoe": _moe,
    "gpt_oss": _moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "mamba": _mamba,
    "falcon_mamba": _mamba,
    "mamba2": _mamba2,
    "jamba": _jamba,
    "bert": _bert,
    "vit": _vit,
    "clip_text_model": _clip,
    "clip_vision_model": _clip,
}


def _rows_dim(module: Any) -> int:
    """Dimension of a weight's outputs: transformers' Conv1D stores [in, out]."""
    return int(type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _columns(module: Any) -> int:
    return int(module.weight.shape[1 - _rows_dim(module)])


def _child(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found
