# SPDX-License-Identifier: Apache-2.0
"""Finds the blocks and linear layers of a Hugging Face causal language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from .taps import Tap

if TYPE_CHECKING:
    import torch


class UnsupportedModelError(ValueError):
    """The model's structure is not one that lissom knows how to walk."""


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its parts; all paths are relative to the base model or the block.

    Attributes:
        blocks: path of the list of blocks.
        groups: linears of a block in the order they run; those in one tuple read the same input.
        embed: paths of the embeddings.
        tail: modules between the last block and the output layer, in order; absent ones are skipped.
    """

    blocks: str
    groups: tuple[tuple[str, ...], ...]
    embed: tuple[str, ...]
    tail: tuple[str, ...]


_LLAMA = Family(
    blocks="layers",
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    embed=("embed_tokens",),
    tail=("norm",),
)
_OPT = Family(
    blocks="decoder.layers",
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    embed=("decoder.embed_tokens", "decoder.embed_positions"),
    tail=("decoder.final_layer_norm", "decoder.project_out"),
)
_GPT2 = Family(
    blocks="h",
    groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    embed=("wte", "wpe"),
    tail=("ln_f",),
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "opt": _OPT,
    "gpt2": _GPT2,
}


@dataclass(frozen=True)
class LinearRef:
    """One linear layer of a model.

    Attributes:
        name: full module name.
        module: the `nn.Linear`, or transformers' Conv1D.
        group: name of its input; linears of one group read the same activations and share one Gram matrix.
        shared_with: name of another module that holds the same Parameter, if any.
        routed: it sees only the tokens that a router sends to it, perhaps none.
        pool: name shared by the groups whose statistics may be summed where one of them saw few tokens (the
            experts of one layer); None when the group stands alone.
    """

    name: str
    module: Any
    group: str
    shared_with: str | None = None
    routed: bool = False
    pool: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the layer, whatever form the weight is stored in."""
        if _is_conv1d(self.module):
            inputs, outputs = self.parameter.shape
            return outputs, inputs
        return int(self.module.out_features), int(self.module.in_features)

    @property
    def parameter(self) -> torch.Tensor:
        """The weight as it is stored, in whatever form."""
        return cast("torch.Tensor", self.module.weight)

    def weight(self) -> torch.Tensor:
        """The weight as a view `[out, in]` that shares memory with the model (Conv1D is transposed).

        Returns:
            Tensor [out, in] in the storage dtype.

        Raises:
            UnsupportedModelError: the module holds no plain floating-point weight (packed or quantised).
        """
        reason = self.obstacle()
        if reason is not None:
            raise UnsupportedModelError(f"{self.name} has no dense weight to read: {reason}")
        weight = self.parameter.detach()
        return weight.t() if _is_conv1d(self.module) else weight

    def obstacle(self) -> str | None:
        """Why the weight cannot be read or changed as a dense floating-point matrix, or None."""
        weight = self.parameter
        stored = tuple(weight.shape[::-1]) if _is_conv1d(self.module) else tuple(weight.shape)
        if stored != self.shape or not weight.is_floating_point():
            found = f"{type(self.module).__name__} stores {list(weight.shape)} {weight.dtype}"
            return f"{found} (packed or quantised); use the dense model"
        return None


@dataclass(frozen=True)
class Block:
    """One repeated block of the model.

    Attributes:
        name: full module name.
        module: the block.
        linears: its linear layers, in running order.
        taps: where the input of each group of them is seen, in running order.
    """

    name: str
    module: nn.Module
    linears: list[LinearRef]
    taps: tuple[Tap, ...]


@dataclass(frozen=True)
class ModelMap:
    """What `describe` finds.

    Attributes:
        family: the config's `model_type`.
        base: name of the base model inside the model ("" when the model is the base model).
        blocks: the blocks, in depth order.
        embed: names of the embeddings.
        tail: names of the modules between the last block and the output layer.
        head: the output layer, or None.
    """

    family: str
    base: str
    blocks: list[Block]
    embed: tuple[str, ...]
    tail: tuple[str, ...]
    head: LinearRef | None

    def linears(self) -> list[LinearRef]:
        """Every linear layer inside the blocks, in running order."""
        return [linear for block in self.blocks for linear in block.linears]


def describe(model: nn.Module) -> ModelMap:
    """Find the blocks, the linear layers and the layers that share an input.

    Args:
        model: a transformers model (with or without its output layer); may live on the meta device.

    Returns:
        The map of the model. Nothing is computed and nothing changed.

    Raises:
        UnsupportedModelError: an unknown architecture, or a known one with parts it should not have
            (fused experts, adapters); the sentence names what was found.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1, vocab_size=11))
        >>> [linear.name for linear in describe(tiny).linears()][:2]
        ['model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.k_proj']
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    family = FAMILIES.get(kind) if kind else None
    if kind is None or family is None:
        raise UnsupportedModelError(_refusal(model, kind))
    names = {id(module): name for name, module in model.named_modules()}
    base_model = getattr(model, "base_model", model)
    base = names[id(base_model)]
    holders = _parameter_holders(model)
    blocks = []
    stack: Any = base_model.get_submodule(family.blocks)
    for index, module in enumerate(stack):
        name = _join(base, f"{family.blocks}.{index}")
        linears = _block_linears(name, module, family, holders)
        blocks.append(Block(name, module, linears, _taps(linears)))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head_name = names.get(id(head), "")
    return ModelMap(
        family=kind,
        base=base,
        blocks=blocks,
        embed=tuple(_join(base, path) for path in family.embed),
        tail=tuple(_join(base, path) for path in family.tail if _child(base_model, path) is not None),
        head=_linear_ref(head_name, head, head_name, holders) if head_name else None,
    )


def _block_linears(
    name: str, block: nn.Module, family: Family, holders: dict[int, list[str]]
) -> list[LinearRef]:
    listed = {path: group for group in family.groups for path in group}
    found = {path: module for path, module in block.named_modules() if _is_linear(module)}
    fused = [path for path, parameter in block.named_parameters() if parameter.dim() == 3]
    if fused:
        raise UnsupportedModelError(
            f"{name}.{fused[0]} is a fused 3-D weight (mixture-of-experts layers are not supported)"
        )
    for path in found:
        if path not in listed:
            raise UnsupportedModelError(
                f"{name}.{path} is a linear layer that this architecture does not usually have "
                "(an adapter or a custom block): merge adapters into the model first"
            )
    refs = []
    for path, group in listed.items():
        if path not in found:
            module = _child(block, path)
            what = "missing" if module is None else f"a {type(module).__name__}, not a linear layer"
            raise UnsupportedModelError(f"{name}.{path} is {what}: a dense, unquantised model is needed")
        label = f"{name}.{'+'.join(group)}"
        refs.append(_linear_ref(f"{name}.{path}", found[path], label, holders))
    return refs


def _taps(linears: list[LinearRef]) -> tuple[Tap, ...]:
    first = {linear.group: linear.module for linear in reversed(linears)}
    return tuple(Tap(first[group], (group,)) for group in dict.fromkeys(linear.group for linear in linears))


def _linear_ref(name: str, module: Any, group: str, holders: dict[int, list[str]]) -> LinearRef:
    weight = getattr(module, "weight", None)
    others = [holder for holder in holders.get(id(weight), []) if holder != name]
    return LinearRef(name, module, group, others[0] if others else None)


def _parameter_holders(model: nn.Module) -> dict[int, list[str]]:
    # remove_duplicate=False lists a Parameter once for every name it is reached by: ties and shared modules
    # show.
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return holders


def _refusal(model: nn.Module, kind: str | None) -> str:
    known = ", ".join(FAMILIES)
    what = f"model_type {kind!r}" if kind else f"{type(model).__name__} (it has no config.model_type)"
    if any(parameter.dim() == 3 and "expert" in name for name, parameter in model.named_parameters()):
        return (
            f"{what} keeps its experts in fused 3-D weights, which lissom cannot prune yet (known: {known})"
        )
    if kind and ("mamba" in kind or "rwkv" in kind):
        return f"{what} is a state-space model, which lissom cannot prune yet (known: {known})"
    return f"{what} is not an architecture that lissom knows how to walk (known: {known})"


def _is_conv1d(module: nn.Module) -> bool:
    # transformers.pytorch_utils.Conv1D stores [in, out]; matched by name so that transformers stays
    # unimported.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _child(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _join(base: str, path: str) -> str:
    return f"{base}.{path}" if base else path
