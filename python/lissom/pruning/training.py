# SPDX-License-Identifier: Apache-2.0
"""Keeps the zeros of a pruned model while it is trained.

Masked gradients alone do not do it: momentum from before the pruning, optimisers that mix the entries of a matrix
(Muon) or add noise, and stochastic rounding all move weights whose gradient is zero. So the mask is imposed on
the gradients, which also keeps norms for clipping and optimiser statistics right, and again on the weights behind
every step of an optimiser.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .masks import (
    Mask,
    clear_,
    describe_tensor,
    given_masks,
    locate,
    recorded_masks,
    unpack,
    unwrap,
    zero_masks,
)

Masks = Mapping[str, Tensor] | Literal["zeros"] | None


class SparsityKeeper:
    """Keeps pruned weights at zero from its making until `remove`; `keep_masks` makes it.

    As a context manager it checks the weights and removes itself at the end. It lives as long as the model does:
    the handle need not be kept.

    Attributes:
        names: the masked weights, by module name or, for what is not a linear's `weight`, by parameter name.
        packed: names of packed 2:4 linears, which keep their masks by construction.
    """

    def __init__(self, model: nn.Module, masks: Sequence[Mask], packed: Sequence[str]) -> None:
        self.names = tuple(mask.name for mask in masks)
        self.packed = tuple(packed)
        # The model lives as long as its user wants, the keeper as long as the model.
        self._model = weakref.ref(model)
        _keepers.setdefault(model, set()).add(self)
        self._guarded = [_Guarded(mask) for mask in masks]
        after_step = weakref.WeakMethod(self._after_step)
        self._handle = register_optimizer_step_post_hook(functools.partial(_call_if_alive, after_step))
        for one in self._guarded:
            one.watch()

    def masks(self) -> dict[str, Tensor]:
        """The masks, to be kept elsewhere or given to `keep_masks` again.

        Returns:
            Name -> bool tensor of the weight's shape, True where it is pruned.
        """
        return {one.mask.name: unpack(one.mask.bits, one.mask.shape) for one in self._guarded}

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
        alive = {one.mask.name: one.mask.count_alive(one.parameter(model)) for one in self._guarded}
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
    base = unwrap(model)
    packed: list[str] = []
    if masks is None:
        found, packed = recorded_masks(base)
    elif isinstance(masks, str):
        if masks != "zeros":
            raise ValueError(f"masks must be None, 'zeros' or a mapping from names to masks, got {masks!r}")
        found, packed = zero_masks(base)
    else:
        found = given_masks(base, masks)
    if not found and not packed:
        raise ValueError("there is no mask to keep: no linear layer of the model has zeros; prune it first")
    return SparsityKeeper(base, found, packed)


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
    """A mask at work.

    Attributes:
        mask: what is pruned, and where.
        watched, hook: the parameter whose gradient is masked, and how to stop that.
    """

    mask: Mask
    watched: weakref.ref[Tensor] | None = None
    hook: RemovableHandle | None = None

    def parameter(self, model: nn.Module | None = None) -> Tensor:
        """The parameter as it now is, in this model or in another one with the same names.

        It is looked up at every use: loading with assign=True puts another one in the old one's place.
        """
        place = self.mask.place if model is None else locate(unwrap(model), self.mask.name)
        parameter: Tensor | None = None if place is None else place.look()
        if parameter is None or parameter.shape != self.mask.shape or hasattr(parameter, "device_mesh"):
            now = "is no longer a parameter" if parameter is None else f"is now {describe_tensor(parameter)}"
            raise RuntimeError(
                f"{self.mask.name} {now}, and its mask is for a whole weight {list(self.mask.shape)}: call keep_masks "
                "behind what replaced the weight; weights sharded over processes are not supported"
            )
        return parameter

    def watch(self) -> None:
        """Mask the gradient as soon as it is accumulated: before DDP's reduction and before clipping."""
        parameter = self.parameter()
        if not parameter.requires_grad or (self.watched is not None and self.watched() is parameter):
            return
        self.unwatch()
        self.watched = weakref.ref(parameter)
        self.hook = parameter.register_post_accumulate_grad_hook(functools.partial(_mask_gradient, self.mask))

    def unwatch(self) -> None:
        """Leave the gradient alone."""
        if self.hook is not None:
            self.hook.remove()
        self.watched = self.hook = None


def _mask_gradient(mask: Mask, parameter: Tensor) -> None:
    if parameter.grad is not None:
        clear_(parameter.grad, mask.bits.to(parameter.device))


def _impose(guarded: Iterable[_Guarded], model: nn.Module | None = None) -> None:
    for one in guarded:
        parameter = one.parameter(model)
        if model is None:
            one.mask.bits = one.mask.bits.to(parameter.device)  # it may have moved
        clear_(parameter, one.mask.bits.to(parameter.device))
