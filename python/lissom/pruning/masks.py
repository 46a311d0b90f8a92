# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model are pruned, whatever the model is wrapped in, at one bit for each weight."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..models.walk import LinearRef, UnsupportedModelError, describe
from .pattern import Pattern
from .selection import PatternMap, read_pattern

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Place(NamedTuple):
    """Where a parameter is: the module that holds it, weakly, and under which name."""

    owner: weakref.ref[nn.Module]
    attribute: str

    def look(self) -> Any:
        """The parameter that is there now, or None."""
        owner = self.owner()
        return None if owner is None else owner._parameters.get(self.attribute)


@dataclass
class Mask:
    """What is pruned of one parameter.

    Attributes:
        name: of the layer or the parameter; `locate` finds it by that.
        place: where the parameter is.
        shape: of the parameter.
        bits: int8 [ceil(numel / 8)], as `pack` makes them.
    """

    name: str
    place: Place
    shape: torch.Size
    bits: Tensor

    def count_alive(self, weight: Tensor) -> int:
        """How many entries of a weight are not zero though they are marked."""
        marked = unpack(self.bits.to(weight.device), self.shape)
        return int((weight.detach() != 0).logical_and_(marked).sum())


def recorded_masks(model: nn.Module) -> tuple[list[Mask], list[str]]:
    """The masks of the layers that `config.lissom` lists: their zeros, once their patterns are found in them.

    Args:
        model: a pruned model, unwrapped.

    Returns:
        The masks, and the names of layers that are packed and need none.

    Raises:
        ValueError: no such list, a layer that the model lacks, or one that has lost its pattern.
    """
    record = getattr(getattr(model, "config", None), "lissom", None) or {}
    layers = record.get("layers")
    if not layers:
        raise ValueError(
            "model.config.lissom does not say which layers were pruned: pass masks='zeros', or a mapping of masks"
        )
    spec = record["pattern"]
    pattern = read_pattern(json.loads(spec) if spec.startswith("{") else spec)
    experts = _experts(model, layers)
    views: dict[str, list[Tensor]] = {}
    packed, lost = [], {}
    for layer in layers:
        name = experts[layer].stored if layer in experts else layer
        place = locate(model, name)
        if place is None:
            raise ValueError(
                f"config.lissom lists {layer}, which has no weight in this model: pass masks, by the names it uses"
            )
        if _is_packed(place.owner()):
            packed.append(layer)
            continue
        view = experts[layer].weight() if layer in experts else _as_linear(place)
        reason = _violation(view, pattern.of(layer) if isinstance(pattern, PatternMap) else pattern)
        if reason is not None:
            lost[layer] = reason
        views.setdefault(name, []).append(view)
    if lost:
        layer, reason = next(iter(lost.items()))
        raise ValueError(
            f"{layer} {reason}; {len(lost)} of {len(layers)} layers have lost the pattern that config.lissom "
            "records: go back to a checkpoint that has it, or pass masks='zeros' to keep the zeros that are left"
        )
    return _once([_join(model, name, parts) for name, parts in views.items()]), packed


def zero_masks(model: nn.Module) -> tuple[list[Mask], list[str]]:
    """The exact zeros of every linear layer, except all-zero ones and those tied to an embedding.

    Args:
        model: any module, unwrapped.

    Returns:
        The masks, and the names of layers that are packed and need none.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    masks, packed = [], []
    for path, module in model.named_modules():
        name = path.replace(".base_layer", "")  # what peft wrapped keeps its name
        if _is_packed(module):
            packed.append(name)
        elif isinstance(module, nn.Linear) or _is_conv1d(module):
            place = Place(weakref.ref(module), "weight")
            weight = place.look()
            if weight is None or id(weight) in embeddings:
                continue
            pruned = weight.detach() == 0
            if pruned.any() and not pruned.all():
                masks.append(_mask(name or "weight", place, pruned))
    return _once(masks), packed


def given_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> list[Mask]:
    """Masks that the caller made.

    Args:
        model: any module, unwrapped.
        masks: bool tensors of the weights' shapes, True where they are pruned, by layer or parameter name.

    Returns:
        The masks.

    Raises:
        TypeError: not a bool tensor.
        ValueError: a name without a weight, another shape, or a mark on a weight that is not zero.
    """
    found = []
    for name, pruned in masks.items():
        place = locate(model, name)
        if place is None:
            raise ValueError(f"masks names {name!r}, which is neither a layer with a weight nor a parameter")
        if _is_packed(place.owner()):
            raise ValueError(f"{name} is packed and keeps its mask by construction: leave it out of masks")
        weight = place.look()
        if not isinstance(pruned, Tensor) or pruned.dtype != torch.bool:
            kind = getattr(pruned, "dtype", type(pruned).__name__)
            raise TypeError(f"the mask of {name} must be a bool tensor, True where it is pruned, got {kind}")
        if pruned.shape != weight.shape:
            wanted = list(weight.shape)
            raise ValueError(f"the mask of {name} must be {wanted} as its weight, got {list(pruned.shape)}")
        found.append(_mask(name, place, pruned))
        alive = found[-1].count_alive(weight)
        if alive:
            raise ValueError(
                f"the mask of {name} marks {alive} weights that are not zero: True means pruned; set them to zero "
                "first, or pass ~mask if yours marks what stays"
            )
    return _once(found)


def _experts(model: nn.Module, layers: Iterable[str]) -> dict[str, LinearRef]:
    """The layers without a parameter of their own: experts in a fused weight, which the map of the model knows."""
    if all(locate(model, layer) is not None for layer in layers):
        return {}
    try:
        return {ref.name: ref for ref in describe(model).linears() if ref.expert is not None}
    except UnsupportedModelError:  # such as one with adapters in it
        return {}


def _join(model: nn.Module, name: str, views: Iterable[Tensor]) -> Mask:
    """The mask of a parameter that holds these layers, perhaps beside others."""
    place = cast("Place", locate(model, name))
    parameter = place.look()
    pruned = torch.zeros_like(parameter, dtype=torch.bool)
    for view in views:
        start = view.storage_offset() - parameter.storage_offset()
        pruned.as_strided(view.shape, view.stride(), start).copy_(view == 0)
    return _mask(name, place, pruned)


def _mask(name: str, place: Place, pruned: Tensor) -> Mask:
    parameter = place.look()
    if parameter.is_meta or not parameter.numel() or hasattr(parameter, "device_mesh"):
        raise ValueError(
            f"{name} is {describe_tensor(parameter)}: a mask is kept only where this process holds the whole "
            "weight, not on the meta device and not in shards"
        )
    return Mask(name, place, parameter.shape, pack(pruned.to(parameter.device)))


def _once(masks: Iterable[Mask]) -> list[Mask]:
    """One mask for each parameter: a shared weight goes by its first name."""
    unique: dict[int, Mask] = {}
    for mask in masks:
        first = unique.setdefault(id(mask.place.look()), mask)
        first.bits = first.bits | mask.bits
    return list(unique.values())


def _violation(weight: Tensor, pattern: Pattern | None) -> str | None:
    """Why a weight [out, in] does not have a pattern, or None."""
    if pattern is None:
        return None
    obstacle = pattern.obstacle(weight.shape[1], weight.shape[0])
    if obstacle is not None:
        return f"cannot be {pattern}: {obstacle}"
    zeros = weight == 0
    if pattern.group is not None:
        sides = (zeros, zeros.t()) if pattern.transposable else (zeros,)
        groups = torch.cat([side.reshape(-1, pattern.group).sum(-1) for side in sides])
        full = int((groups < pattern.pruned_per_group).sum())
        if full:
            return f"is not {pattern} in {full} of {len(groups)} groups"
    # A share is rounded down in each row or over the whole layer: at least this many go in either case.
    found, wanted = int(zeros.sum()), len(weight) * pattern.count(weight.shape[1])
    return f"has {found} zeros where {pattern} asks for {wanted}" if found < wanted else None


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP, a moving average, `torch.compile`, a peft model or one of its layers.

    Args:
        module: any module.

    Returns:
        What is inside, or the module itself.

    Example:
        >>> type(unwrap(AveragedModel(nn.Linear(2, 2)))).__name__
        'Linear'
    """
    inner: Any = None
    if isinstance(module, DataParallel | DistributedDataParallel | AveragedModel):
        inner = module.module
    elif hasattr(module, "get_base_model"):
        inner = cast("Any", module).get_base_model()
    else:
        inner = getattr(module, "_orig_mod", getattr(module, "base_layer", None))
    return unwrap(inner) if isinstance(inner, nn.Module) else module


def locate(model: nn.Module, name: str) -> Place | None:
    """The place of a parameter, named itself or by the layer whose `weight` it is.

    Args:
        model: an unwrapped module; its layers may be wrapped.
        name: full name of a module or parameter.

    Returns:
        The place, or None where there is none of that name.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> locate(model, "0").look().shape
        torch.Size([2, 3])
    """
    for path, attribute in ((name, "weight"), name.rpartition(".")[::2]):
        try:
            place = Place(weakref.ref(unwrap(model.get_submodule(path))), attribute)
        except AttributeError:
            continue
        if place.look() is not None:
            return place
    return None


def _as_linear(place: Place) -> Tensor:
    """The weight of a layer as a view [out, in]."""
    weight: Tensor = place.look().detach()
    return weight.t() if _is_conv1d(place.owner()) else weight


def _is_packed(module: nn.Module | None) -> bool:
    from ..nn import Sparse24Linear

    return isinstance(module, Sparse24Linear)


def _is_conv1d(module: nn.Module | None) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def describe_tensor(tensor: Tensor) -> str:
    """For messages: "Parameter [4, 3] on cpu"."""
    return f"{type(tensor).__name__} {list(tensor.shape)} on {tensor.device}"


def pack(pruned: Tensor) -> Tensor:
    """A mask at 8 entries in a byte: entry p * B + b of the flattened mask is bit p of byte b, with B bytes in all.

    Args:
        pruned: bool, any shape.

    Returns:
        int8 [ceil(numel / 8)].

    Example:
        >>> pack(torch.tensor([True, False, True])).tolist()
        [5]
    """
    size = -(-pruned.numel() // 8)
    runs = nn.functional.pad(pruned.reshape(-1), (0, 8 * size - pruned.numel())).view(8, size)
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=pruned.device)
    return (runs * places[:, None]).sum(0, dtype=torch.uint8).view(torch.int8)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """What `pack` packed.

    Args:
        bits: int8 [ceil(numel / 8)].
        shape: of the mask.

    Returns:
        Bool tensor of that shape.
    """
    runs = torch.stack([(bits >> place) & 1 for place in range(8)])
    return runs.bool().view(-1)[: shape.numel()].view(shape)


@torch.no_grad()
def clear_(tensor: Tensor, bits: Tensor) -> None:
    """Set what a mask marks to zero in place, whatever stands there: a product would leave NaN and -0.

    Args:
        tensor: floating, of the mask's shape.
        bits: int8 [ceil(numel / 8)] as `pack` makes them, on the same device.
    """
    words = tensor.detach().view(_INTEGERS[tensor.element_size()])
    if not words.is_contiguous():
        words.masked_fill_(unpack(bits, words.shape), 0)
        return
    # A kept number is ANDed with -1, a pruned one with 0, in a fraction of the time of masked_fill_.
    for place, run in enumerate(words.view(-1).split(len(bits))):
        run.bitwise_and_((((bits >> place) & 1) - 1)[: len(run)])
