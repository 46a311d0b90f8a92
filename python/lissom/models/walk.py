# SPDX-License-Identifier: Apache-2.0
"""Finds the blocks and linear layers of a Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from . import experts
from .families import COMPOSED, FAMILIES, Family
from .taps import ExpertsTap, SliceTap, Tap

if TYPE_CHECKING:
    import torch


class UnsupportedModelError(ValueError):
    """The model's structure is not one that lissom knows how to walk."""


@dataclass(frozen=True)
class LinearRef:
    """One linear layer of a model.

    Attributes:
        name: full module name; for an expert in a fused weight, the parameter's name and the expert's number.
        module: the `nn.Linear`, or transformers' Conv1D, or the module that holds the fused weight.
        group: name of its input; linears of one group read the same activations and share one Gram matrix.
        shared_with: name of another module that holds the same Parameter, if any.
        expert: number of the expert in a fused weight, or None.
        pool: name shared by the groups of one projection of the experts of one layer, each of which may see few
            tokens; None when the group is not routed.
        aside: why a run leaves it alone unless `include` names it, or None.
    """

    name: str
    module: Any
    group: str
    shared_with: str | None = None
    expert: int | None = None
    pool: str | None = None
    aside: str | None = None

    @property
    def routed(self) -> bool:
        """Whether it sees only the tokens that a router sends to it, perhaps none."""
        return self.expert is not None

    @property
    def stored(self) -> str:
        """Full name of the parameter that holds the weight, perhaps beside those of other experts."""
        return f"{self.name}.weight" if self.expert is None else self.name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the layer, whatever form the weight is stored in."""
        if self.expert is not None or _is_conv1d(self.module):
            outputs, inputs = self._view().shape
            return outputs, inputs
        return int(self.module.out_features), int(self.module.in_features)

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter `stored`, in whatever form."""
        return cast("torch.Tensor", getattr(self.module, self.stored.rpartition(".")[2]))

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
        return self._view()

    def obstacle(self) -> str | None:
        """Why the weight cannot be read or changed as a dense floating-point matrix, or None."""
        weight = self.parameter
        expected = weight.shape if self.expert is not None else self.shape
        stored = tuple(weight.shape[::-1]) if _is_conv1d(self.module) else tuple(weight.shape)
        if stored != expected or not weight.is_floating_point():
            found = f"{type(self.module).__name__} stores {list(weight.shape)} {weight.dtype}"
            return f"{found} (packed or quantised); use the dense model"
        return None

    def packing_obstacle(self) -> str | None:
        """Why no packed module can take the layer's place, or None."""
        if self.expert is not None:
            return f"it is expert {self.expert} of the fused weight {self.stored}, not a module of its own"
        return self.aside

    def _view(self) -> torch.Tensor:
        if self.expert is not None:
            return experts.matrix(self.module, self.stored.rpartition(".")[2], self.expert)
        weight = self.parameter.detach()
        return weight.t() if _is_conv1d(self.module) else weight


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
        blocks: the blocks, in depth order; their linears may differ.
        embed: names of the embeddings.
        tail: names of the modules between the last block and the output layer.
        head: the output layer, or None (encoders).
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
        model: a transformers model (with or without its output layer); may live on the meta device, and be
            compiled as a whole or in part.

    Returns:
        The map of the model. Nothing is computed and nothing changed.

    Raises:
        UnsupportedModelError: an unknown architecture, or a known one with parts it should not have
            (adapters, custom blocks); the sentence names what was found.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1, vocab_size=11))
        >>> [linear.name for linear in describe(tiny).linears()][:2]
        ['model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.k_proj']
    """
    model = uncompiled(model)
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    family = FAMILIES.get(kind) if kind else None
    if kind is None or family is None:
        raise UnsupportedModelError(_refusal(model, kind))
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    base_model = getattr(model, "base_model", model)
    base = names[id(base_model)]
    holders = _parameter_holders(model)
    stack: Any = _child(base_model, family.blocks)
    if not isinstance(stack, nn.ModuleList) or not len(stack):
        raise UnsupportedModelError(f"{type(model).__name__} has no blocks at {_join(base, family.blocks)}")
    head: Any = getattr(model, "get_output_embeddings", lambda: None)() if family.head else None
    head_name = names.get(id(head), "")
    return ModelMap(
        family=kind,
        base=base,
        blocks=[
            _BlockFinder(_join(base, f"{family.blocks}.{index}"), uncompiled(module), family, holders).block()
            for index, module in enumerate(stack)
        ],
        embed=tuple(_join(base, path) for path in family.embed),
        tail=tuple(_join(base, path) for path in family.tail if _child(base_model, path) is not None),
        head=LinearRef(head_name, head, head_name, _other_holder(head_name, head.weight, holders))
        if head_name
        else None,
    )


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, or the module itself; it has the names that its user knows.

    Example:
        >>> uncompiled(nn.Identity())
        Identity()
    """
    return cast("nn.Module", getattr(module, "_orig_mod", module))


def plain_name(name: str) -> str:
    """A name without the step that `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def packing_obstacles(model: nn.Module) -> dict[str, str]:
    """The linear modules of a model that must stay dense because their block reads the weight without them.

    Args:
        model: any module; one that `describe` does not know has none.

    Returns:
        Module name -> reason.

    Example:
        >>> packing_obstacles(nn.Linear(2, 2))
        {}
    """
    config = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", None) or "")
    paths = () if family is None else tuple(family.direct)
    return {
        name: _DIRECT
        for name, module in model.named_modules()
        if _is_linear(module) and name.endswith(tuple(f".{path}" for path in paths))
    }


_DIRECT = "its block multiplies by the weight without calling it, so no packed module could take its place"


@dataclass
class _BlockFinder:
    """Looks for the linears of one block."""

    name: str
    module: nn.Module
    family: Family
    holders: dict[int, list[str]]

    def block(self) -> Block:
        self._refuse_strangers()
        refs: list[LinearRef] = []
        taps: list[Tap] = []
        for paths in self.family.groups:
            present = self._present(paths)
            if present:
                label = f"{self.name}.{'+'.join(present)}"
                refs += [self._ref(path, module, label) for path, module in present.items()]
                taps.append(self._tap(label, *next(iter(present.items()))))
        fused = self._experts()
        if fused is not None:
            routed = self._expert_refs(fused)
            refs += routed
            taps.append(ExpertsTap(fused, tuple(ref.group for ref in routed)))
        if not refs:
            raise UnsupportedModelError(
                f"{self.name} ({type(self.module).__name__}) has none of the linear layers of its architecture"
            )
        return Block(self.name, self.module, refs, tuple(taps))

    def _present(self, paths: tuple[str, ...]) -> dict[str, nn.Module]:
        """The linears of a group that this block has: none of them, or all that it does not declare as None."""
        found = {path: _child(self.module, path) for path in paths}
        if all(module is None for module in found.values()):
            return {}
        for path, module in found.items():
            if module is None and not _is_declared(self.module, path):
                raise UnsupportedModelError(
                    f"{self.name}.{path} is missing: a dense, unquantised model is needed"
                )
            if module is not None and not _is_linear(module):
                raise UnsupportedModelError(
                    f"{self.name}.{path} is a {type(module).__name__}, not a linear layer: a dense, "
                    "unquantised model is needed"
                )
        return {path: module for path, module in found.items() if module is not None}

    def _ref(self, path: str, module: Any, label: str) -> LinearRef:
        name = f"{self.name}.{path}"
        return LinearRef(
            name,
            module,
            label,
            _other_holder(name, getattr(module, "weight", None), self.holders),
            aside=_DIRECT if path in self.family.direct else None,
        )

    def _tap(self, label: str, path: str, module: Any) -> Tap:
        where = self.family.direct.get(path)
        if where is None:
            return Tap(module, (label,))
        source = self.module.get_submodule(where.source)
        return SliceTap(source, (label,), module.in_features, _child(self.module, where.norm))

    def _experts(self) -> nn.Module | None:
        return _child(self.module, self.family.experts) if self.family.experts else None

    def _expert_refs(self, fused: nn.Module) -> list[LinearRef]:
        """One layer per expert and projection: gate_up_proj of every expert, then down_proj of every expert."""
        owner = f"{self.name}.{self.family.experts}"
        number = experts.count(fused)
        if number is None:
            raise UnsupportedModelError(
                f"{owner} ({type(fused).__name__}) does not hold gate_up_proj and down_proj as fused 3-D "
                "weights: use transformers' own, dense experts"
            )
        refs = []
        for projection in experts.PROJECTIONS:
            shared = _other_holder(owner, getattr(fused, projection), self.holders)
            pool = f"{owner}.{projection}"
            for expert in range(number):
                name = f"{pool}.{expert}"
                refs.append(LinearRef(name, fused, name, shared, expert=expert, pool=pool))
        return refs

    def _refuse_strangers(self) -> None:
        """Refuse a block with weights that its architecture does not have."""
        listed = {path for group in self.family.groups for path in group} | self.family.never
        for place, module in self.module.named_modules():
            path = plain_name(place)
            if _is_linear(module) and path not in listed:
                raise UnsupportedModelError(
                    f"{self.name}.{path} is a linear layer that this architecture does not usually have "
                    "(an adapter or a custom block): merge adapters into the model first"
                )
            if path == self.family.experts or isinstance(module, nn.Conv1d):
                continue
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    raise UnsupportedModelError(
                        f"{self.name}.{_join(path, own)} is a fused 3-D weight that this architecture does "
                        "not usually have: lissom does not know who reads it"
                    )


def _parameter_holders(model: nn.Module) -> dict[int, list[str]]:
    # remove_duplicate=False lists a Parameter once for every name it is reached by: ties and shared modules
    # show.
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(plain_name(name).rpartition(".")[0])
    return holders


def _other_holder(name: str, weight: Any, holders: dict[int, list[str]]) -> str | None:
    return next((holder for holder in holders.get(id(weight), []) if holder != name), None)


def _refusal(model: nn.Module, kind: str | None) -> str:
    if kind in COMPOSED:
        return f"model_type {kind!r} is {COMPOSED[kind]}"
    what = f"model_type {kind!r}" if kind else f"{type(model).__name__} (it has no config.model_type)"
    return f"{what} is not an architecture that lissom knows how to walk (known: {', '.join(FAMILIES)})"


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
    return None if found is None else uncompiled(found)


def _is_declared(module: nn.Module, path: str) -> bool:
    """Whether the block has the attribute, even if it is None."""
    parent, _, name = path.rpartition(".")
    return hasattr(_child(module, parent) if parent else module, name)


def _join(base: str, path: str) -> str:
    return f"{base}.{path}" if base else path
