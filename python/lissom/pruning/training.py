# SPDX-License-Identifier: Apache-2.0
"""Keeps the zeros of a pruned model while it is trained.

Masked gradients alone do not do it: momentum from before the pruning, optimisers that mix the entries of a matrix
(Muon) or add noise, and stochastic rounding all move weights whose gradient is zero. So the mask is imposed on
the gradients, which also keeps norms for clipping and optimiser statistics right, and again on the weights behind
every step of an optimiser.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from ..models.walk import describe
from .pattern import Pattern

Masks = Mapping[str, Tensor] | Literal["zeros"] | None

_log = logging.getLogger("lissom")


class SparsityKeeper:
    """Keeps pruned weights at zero from its making until `remove`; `keep_masks` makes it.

    As a context manager it checks the weights and removes itself at the end. It lives as long as the model does:
    the handle need not be kept.

    Attributes:
        names: the masked weights, by module name or, for what is not a linear's `weight`, by parameter name.
        packed: names of packed 2:4 linears, which keep their masks by construction.
    """

    def __init__(self, model: nn.Module, guarded: list[_Guarded], packed: tuple[str, ...]) -> None:
        self.names = tuple(one.name for one in guarded)
        self.packed = packed
        # The model lives as long as its user wants, the keeper as long as the model.
        self._model = weakref.ref(model)
        _keepers.setdefault(model, set()).add(self)
        self._guarded = guarded
        after_step = weakref.WeakMethod(self._after_step)
        self._handle = register_optimizer_step_post_hook(functools.partial(_call_if_alive, after_step))
        for one in guarded:
            one.watch()

    def masks(self) -> dict[str, Tensor]:
        """The masks, to be kept elsewhere or given to `keep_masks` again.

        Returns:
            Name -> bool tensor of the weight's shape, True where it is pruned.
        """
        return {one.name: _unpack(one.bits, one.shape) for one in self._guarded}

    def apply(self, model: nn.Module | None = None) -> None:
        """Set every pruned entry to zero now.

        For what writes weights elsewhere than in `optimizer.step`: an exponential moving average swapped in, an
        adapter merged into a dense weight, an optimiser that copies weights back behind its step.

        Args:
            model: another model with the same layers, such as a moving average; None means this one.

        Raises:
            RuntimeError: a weight is gone, replaced by something else, or of another shape.
        """
        _impose(self._guarded, model)

    @torch.no_grad()
    def check(self, model: nn.Module | None = None) -> None:
        """Verify that every pruned entry is zero.

        Args:
            model: as for `apply`.

        Raises:
            RuntimeError: some are not; the sentence names the first such layer.
        """
        alive = {one.name: one.count_alive(one.parameter(model)) for one in self._guarded}
        broken = [name for name, count in alive.items() if count]
        if broken:
            raise RuntimeError(
                f"{broken[0]}: {alive[broken[0]]} pruned weights are not zero ({len(broken)} of {len(alive)} layers "
                "are so): something wrote them outside optimizer.step; call the keeper's apply() behind it"
            )

    def remove(self) -> None:
        """Stop keeping: remove every hook. The weights stay as they are."""
        self._handle.remove()
        for one in self._guarded:
            one.unwatch()
        model = self._model()
        if model is not None:
            _keepers[model].discard(self)

    def __enter__(self) -> SparsityKeeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.remove()

    def __repr__(self) -> str:
        return f"SparsityKeeper({len(self.names)} masks, {len(self.packed)} packed linears)"

    def _after_step(self, optimizer: Optimizer) -> None:
        model = self._model()
        if model is None:
            return
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        touched = [one for one in self._guarded if id(one.parameter()) in held]
        if not held <= {id(weight) for weight in model.parameters()}:
            # It steps tensors that are not the model's: perhaps copies of ours in another precision.
            touched = [one for one in self._guarded if one.parameter().requires_grad]
        _impose(touched)
        for one in self._guarded:
            one.watch()  # what was unfrozen or replaced meanwhile


_keepers: weakref.WeakKeyDictionary[nn.Module, set[SparsityKeeper]] = weakref.WeakKeyDictionary()


def keep_masks(model: nn.Module, masks: Masks = None) -> SparsityKeeper:
    """Keep the pruned weights of a model at zero, whatever trains it.

    Args:
        model: a pruned model, dense with zeros or packed; also wrapped (DistributedDataParallel, `torch.compile`,
            peft). Not one whose weights are sharded over processes.
        masks: None takes the layers that `model.config.lissom` lists and wants each to satisfy its pattern;
            "zeros" takes the exact zeros of every linear layer (not of one that is all zero, such as a fresh
            adapter, nor of one tied to an embedding); a mapping gives module or parameter names (2-D, or 3-D
            for fused experts) and bool tensors of the weight's shape, True where it is pruned.

    Returns:
        The keeper: a context manager, or call its `remove` when training is over.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: nothing to keep; a name that means no weight; a mask of another shape, or one that marks a
            weight that is not zero; a layer that has lost its pattern; weights without values.

    Example:
        >>> layer = nn.Linear(4, 2); layer.weight.data[:, :2] = 0
        >>> adam = torch.optim.Adam(layer.parameters(), weight_decay=0.1)
        >>> with keep_masks(layer, {"weight": layer.weight == 0}):
        ...     layer(torch.ones(1, 4)).sum().backward(); adam.step()
        >>> layer.weight[:, :2].count_nonzero().item()
        0
    """
    base = _unwrap(model)
    if masks is None:
        guarded, packed = _recorded(base)
    elif isinstance(masks, str):
        if masks != "zeros":
            raise ValueError(f"masks must be None, 'zeros' or a mapping from names to masks, got {masks!r}")
        guarded, packed = _zeros(base)
    else:
        guarded, packed = _given(base, masks), ()
    if not guarded and not packed:
        raise ValueError("there is no mask to keep: no linear layer of the model has zeros; prune it first")
    keeper = SparsityKeeper(base, _one_for_each_parameter(guarded), packed)
    _log.info("%r", keeper)
    return keeper


class KeepMasksCallback:
    """Keeps masks in transformers' Trainer and what derives from it, such as trl's SFTTrainer.

    The masks are taken when training begins, behind the weights of a checkpoint that is resumed, and checked
    before each save and at the end. (It derives from nothing: transformers takes seconds to import, and a
    callback is known by its methods.)

    Args:
        masks: as for `keep_masks`.

    Example:
        >>> trainer = Trainer(model, arguments, callbacks=[KeepMasksCallback()])  # doctest: +SKIP
    """

    def __init__(self, masks: Masks = None) -> None:
        self.masks = masks
        self.keeper: SparsityKeeper | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Takes the masks; a keeper that an interrupted training left is removed."""
        if self.keeper is not None:
            self.keeper.remove()
        self.keeper = keep_masks(model, self.masks)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Once more behind the step: DeepSpeed and its like copy their own weights back after it."""
        if self.keeper is not None:
            self.keeper.apply()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Checks what is about to be saved."""
        if self.keeper is not None and control.should_save:
            self.keeper.check()

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Checks the result, perhaps that of the best step loaded again, and lets go."""
        if self.keeper is not None:
            keeper, self.keeper = self.keeper, None
            with keeper:
                pass

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(f"KeepMasksCallback has no attribute {event!r}")
        return lambda args, state, control, **_: None  # an event that does not matter here


def _call_if_alive(method: weakref.WeakMethod[Any], optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    call = method()
    if call is not None:
        call(optimizer)


@dataclass
class _Guarded:
    """One weight and its mask.

    Attributes:
        name: for the user; `_locate` finds the parameter by it.
        place: where the parameter is. It is looked up at every use: loading with assign=True puts another one there.
        shape: of the parameter.
        bits: int8 [ceil(numel / 8)], the mask with 8 entries in a byte: a sixteenth of a 16-bit weight.
        watched, hook: the parameter whose gradient is masked, and how to stop that.
    """

    name: str
    place: _Place
    shape: torch.Size
    bits: Tensor
    watched: weakref.ref[Tensor] | None = None
    hook: RemovableHandle | None = None

    def parameter(self, model: nn.Module | None = None) -> Tensor:
        """The parameter as it now is, in this model or in another one with the same names."""
        place = self.place if model is None else _locate(_unwrap(model), self.name)
        parameter = None if place is None else place.look()
        if parameter is None or parameter.shape != self.shape or hasattr(parameter, "device_mesh"):
            now = "is no longer a parameter" if parameter is None else f"is now {_describe(parameter)}"
            raise RuntimeError(
                f"{self.name} {now}, and its mask is for a whole weight {list(self.shape)}: call keep_masks behind "
                "what replaced the weight; weights sharded over processes are not supported"
            )
        return parameter

    def count_alive(self, parameter: Tensor) -> int:
        """How many entries of a weight are not zero though the mask marks them."""
        return int((parameter != 0).logical_and_(_unpack(self.bits.to(parameter.device), self.shape)).sum())

    def watch(self) -> None:
        """Mask the gradient as soon as it is accumulated: before DDP's reduction and before clipping."""
        parameter = self.parameter()
        if not parameter.requires_grad or (self.watched is not None and self.watched() is parameter):
            return
        self.unwatch()
        self.watched = weakref.ref(parameter)
        self.hook = parameter.register_post_accumulate_grad_hook(functools.partial(_mask_gradient, self))

    def unwatch(self) -> None:
        """Leave the gradient alone."""
        if self.hook is not None:
            self.hook.remove()
        self.watched = self.hook = None


@torch.no_grad()
def _mask_gradient(one: _Guarded, parameter: Tensor) -> None:
    if parameter.grad is not None:
        _clear(parameter.grad, one.bits.to(parameter.device))


@torch.no_grad()
def _impose(guarded: Iterable[_Guarded], model: nn.Module | None = None) -> None:
    for one in guarded:
        parameter = one.parameter(model)
        if model is None:
            one.bits = one.bits.to(parameter.device)  # it may have moved
        _clear(parameter, one.bits.to(parameter.device))


def _recorded(model: nn.Module) -> tuple[list[_Guarded], tuple[str, ...]]:
    """Masks of the layers that `config.lissom` lists: their zeros, once the pattern has been found in them."""
    record = getattr(getattr(model, "config", None), "lissom", None) or {}
    layers = record.get("layers")
    if not layers:
        raise ValueError(
            "model.config.lissom does not say which layers were pruned: pass masks='zeros', or a mapping of masks"
        )
    patterns = layers if isinstance(layers, Mapping) else dict.fromkeys(layers, record["pattern"])
    guarded, packed, lost = [], [], {}
    for layer, spec in patterns.items():
        name, place, view = _layer(model, layer)
        if _is_packed(place.owner()):
            packed.append(layer)
            continue
        reason = _violation(view, Pattern.parse(spec))
        if reason is not None:
            lost[layer] = reason
            continue
        # The layer may be a part of its parameter: one expert of many.
        pruned = torch.zeros_like(place.look(), dtype=torch.bool)
        start = view.storage_offset() - place.look().storage_offset()
        pruned.as_strided(view.shape, view.stride(), start).copy_(view == 0)
        guarded.append(_guard(name, place, pruned))
    if lost:
        layer, reason = next(iter(lost.items()))
        raise ValueError(
            f"{layer} {reason}; {len(lost)} of {len(patterns)} layers have lost the pattern that config.lissom "
            "records: go back to a checkpoint that has it, or pass masks='zeros' to keep the zeros that are left"
        )
    return guarded, tuple(packed)


def _zeros(model: nn.Module) -> tuple[list[_Guarded], tuple[str, ...]]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    guarded, packed = [], []
    for path, module in model.named_modules():
        name = path.replace(".base_layer", "")  # what peft wrapped keeps its name
        if _is_packed(module):
            packed.append(name)
        elif isinstance(module, nn.Linear) or _is_conv1d(module):
            place = _Place(weakref.ref(module), "weight")
            weight = place.look()
            if (
                weight is not None
                and id(weight) not in embeddings
                and 0 < (weight == 0).sum() < weight.numel()
            ):
                guarded.append(_guard(name or "weight", place, weight.detach() == 0))
    return guarded, tuple(packed)


def _given(model: nn.Module, masks: Mapping[str, Tensor]) -> list[_Guarded]:
    guarded = []
    for name, mask in masks.items():
        place = _locate(model, name)
        if place is None:
            raise ValueError(f"masks names {name!r}, which is neither a layer with a weight nor a parameter")
        if _is_packed(place.owner()):
            raise ValueError(f"{name} is packed and keeps its mask by construction: leave it out of masks")
        parameter = place.look().detach()
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"the mask of {name} must be a bool tensor, True where it is pruned, got {kind}")
        if mask.shape != parameter.shape:
            wanted = list(parameter.shape)
            raise ValueError(f"the mask of {name} must be {wanted} as its weight, got {list(mask.shape)}")
        guarded.append(_guard(name, place, mask))
        alive = guarded[-1].count_alive(parameter)
        if alive:
            raise ValueError(
                f"the mask of {name} marks {alive} weights that are not zero: True means pruned; set them to zero "
                "first, or pass ~mask if yours marks what stays"
            )
    return guarded


def _guard(name: str, place: _Place, pruned: Tensor) -> _Guarded:
    parameter = place.look()
    if parameter.is_meta or not parameter.numel() or hasattr(parameter, "device_mesh"):
        raise ValueError(
            f"{name} is {_describe(parameter)}: a mask is kept only where this process holds the whole weight, not "
            "on the meta device and not in shards"
        )
    return _Guarded(name, place, parameter.shape, _pack(pruned.to(parameter.device)))


def _one_for_each_parameter(guarded: list[_Guarded]) -> list[_Guarded]:
    """Shared weights once, and the parts of one weight (experts) together."""
    unique: dict[int, _Guarded] = {}
    for one in guarded:
        known = unique.setdefault(id(one.parameter()), one)
        known.bits = known.bits | one.bits
    return list(unique.values())


def _violation(view: Tensor, pattern: Pattern) -> str | None:
    """Why a weight [out, in] does not have a pattern, or None."""
    zeros = view == 0
    if pattern.group is None:
        found, wanted = int(zeros.sum()), pattern.count(view.numel())
        return f"has {found} zeros where {pattern} asks for {wanted}" if found < wanted else None
    obstacle = pattern.obstacle(view.shape[1])
    if obstacle is not None:
        return f"cannot be {pattern}: {obstacle}"
    groups = zeros.reshape(view.shape[0], -1, pattern.group).sum(-1)
    full = int((groups < pattern.pruned_per_group).sum())
    return f"is not {pattern} in {full} of {groups.numel()} groups" if full else None


def _unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP, a moving average, `torch.compile`, a peft model or one of its layers."""
    inner: Any = None
    if isinstance(module, DataParallel | DistributedDataParallel | AveragedModel):
        inner = module.module
    elif hasattr(module, "get_base_model"):
        inner = cast("Any", module).get_base_model()
    else:
        inner = getattr(module, "_orig_mod", getattr(module, "base_layer", None))
    return _unwrap(inner) if isinstance(inner, nn.Module) else module


class _Place(NamedTuple):
    """Where a parameter is: the module that holds it, weakly, and under which name."""

    owner: weakref.ref[nn.Module]
    attribute: str

    def look(self) -> Any:
        """The parameter that is there now, or None."""
        owner = self.owner()
        return None if owner is None else owner._parameters.get(self.attribute)


def _locate(model: nn.Module, name: str) -> _Place | None:
    """The place of a parameter, named itself or by the layer whose `weight` it is."""
    for path, attribute in ((name, "weight"), name.rpartition(".")[::2]):
        try:
            place = _Place(weakref.ref(_unwrap(model.get_submodule(path))), attribute)
        except AttributeError:
            continue
        if place.look() is not None:
            return place
    return None


def _layer(model: nn.Module, layer: str) -> tuple[str, _Place, Tensor]:
    """Name and place of a pruned layer's parameter, and the layer's weight in it as a view [out, in]."""
    place = _locate(model, layer)
    if place is not None:
        weight = place.look().detach()
        return layer, place, weight.t() if _is_conv1d(place.owner()) else weight
    # No module or parameter of its own: an expert in a fused weight, which the map of the model knows.
    for view in (ref.weight() for ref in describe(model).linears() if ref.name == layer):
        for name, parameter in model.named_parameters():
            if parameter.untyped_storage().data_ptr() == view.untyped_storage().data_ptr():
                return name, cast("_Place", _locate(model, name)), view
    raise ValueError(f"config.lissom lists {layer}, which the model lacks: pass masks by parameter name")


def _is_packed(module: nn.Module | None) -> bool:
    from ..nn import Sparse24Linear

    return isinstance(module, Sparse24Linear)


def _is_conv1d(module: nn.Module | None) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _describe(parameter: Tensor) -> str:
    return f"{type(parameter).__name__} {list(parameter.shape)} on {parameter.device}"


# Entry p * B + b of a flattened mask is bit p of byte b, with B bytes in all: eight runs without gaps.


def _pack(pruned: Tensor) -> Tensor:
    size = -(-pruned.numel() // 8)
    runs = nn.functional.pad(pruned.reshape(-1), (0, 8 * size - pruned.numel())).view(8, size)
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=pruned.device)
    return (runs * places[:, None]).sum(0, dtype=torch.uint8).view(torch.int8)


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    runs = torch.stack([(bits >> place) & 1 for place in range(8)])
    return runs.bool().view(-1)[: shape.numel()].view(shape)


def _clear(tensor: Tensor, bits: Tensor) -> None:
    """Set what the mask marks to zero in place, whatever stands there: a product would leave NaN and -0."""
    words = tensor.detach().view(_INTEGERS[tensor.element_size()])
    if not words.is_contiguous():
        words.masked_fill_(_unpack(bits, words.shape), 0)
        return
    # A kept number is ANDed with -1, a pruned one with 0, in a fraction of the time of masked_fill_.
    for place, run in enumerate(words.view(-1).split(len(bits))):
        run.bitwise_and_((((bits >> place) & 1) - 1)[: len(run)])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
