# SPDX-License-Identifier: Apache-2.0
"""Merges LoRA adapters into packed linears.

peft merges by ``base_layer.weight.data += update``, which no packed weight can follow. torch tells whoever
asks when a module becomes part of another (``register_module_module_registration_hook``); so we learn when
peft wraps a packed linear, and give that one wrapper methods ``merge`` and ``unmerge`` of its own. peft
itself is left as it is.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lissom.nn import Sparse24Linear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_log = logging.getLogger("lissom")
_BEFORE = "_lissom_before_merge"
_merges = itertools.count()  # the first is told as a warning, the others at level INFO


def merge_lora(model: PeftModel, *, adapter_names: Sequence[str] | None = None) -> PreTrainedModel:
    """Merges LoRA adapters and unloads peft, as ``merge_and_unload`` does; packed linears stay packed and
    2:4.

    The update is added where a packed linear has a weight, and **dropped where it has none**: half of its
    entries or more. The share of its norm that was dropped is logged. To lose nothing, keep the adapter
    unmerged.

    Args:
        model: what ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returned.
        adapter_names: the adapters to merge; the active ones if None.

    Returns:
        The base model, without adapters.

    Raises:
        TypeError: ``model`` is not a peft model.
        ValueError: an adapter on a packed linear is not plain LoRA (DoRA and other variants); nothing was
            merged.

    Example:
        >>> merge_lora(nn.Linear(4, 4))
        Traceback (most recent call last):
        TypeError: merge_lora needs a peft.PeftModel, got Linear
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(f"merge_lora needs a peft.PeftModel, got {type(model).__name__}")
    names = None if adapter_names is None else list(adapter_names)
    layer: Any
    for layer in list(model.modules()):
        if isinstance(getattr(layer, "base_layer", None), Sparse24Linear):
            _give_methods(layer, "base_layer", layer.base_layer)  # wrapped before this file was imported
            _check_plain(layer, names or layer.active_adapters)
    return model.merge_and_unload(adapter_names=names)


@functools.cache
def install() -> None:
    """Makes peft's ``merge_adapter``, ``unmerge_adapter``, ``merge_and_unload`` right for packed linears."""
    register_module_module_registration_hook(_give_methods)


def _give_methods(module: nn.Module, name: str, child: nn.Module) -> None:
    wraps = name == "base_layer" and isinstance(child, Sparse24Linear)
    if wraps and type(module).__module__.split(".")[0] == "peft":
        # partial, not a bound method: it survives pickling.
        module.merge = functools.partial(_merge, module)  # type: ignore[assignment]
        module.unmerge = functools.partial(_unmerge, module)  # type: ignore[assignment]


def _check_plain(layer: Any, adapters: Sequence[str]) -> None:
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear):
        kind = f"{type(layer).__module__.split('.')[-2]}.{type(layer).__name__}"
        raise ValueError(f"a {kind} adapter cannot be merged into a packed 2:4 linear: keep it unmerged")
    for adapter in adapters:
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__
            raise ValueError(
                f"adapter {adapter!r} is a {kind}, only plain LoRA merges into a packed 2:4 linear"
            )


@torch.no_grad()
def _merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Takes the place of the wrapper's ``merge``: adds the updates where the weight is not zero."""
    from peft.tuners.tuners_utils import check_adapters_to_merge

    adapters = check_adapters_to_merge(layer, adapter_names)
    _check_plain(layer, adapters)
    adapters = [adapter for adapter in adapters if adapter in layer.lora_A]
    if not adapters:
        return
    base = layer.get_base_layer()
    dense = base.to_linear()
    update = torch.stack([layer.get_delta_weight(adapter).float() for adapter in adapters]).sum(0)
    # What is zero counts as pruned: a kept zero has no place that a second save and load would know of.
    kept = update.masked_fill(dense.weight == 0, 0)
    dense.weight = nn.Parameter((dense.weight.float() + kept).to(dense.weight.dtype), requires_grad=False)
    shifts = [layer.lora_B[name].bias * layer.scaling[name] for name in adapters if layer.lora_bias[name]]
    if shifts:
        dense.bias = nn.Parameter(dense.bias + torch.stack(shifts).sum(0).to(dense.bias.dtype))
    if safe_merge and not dense.weight.isfinite().all():
        raise ValueError(f"the merged weight is not finite: the adapters {adapters} seem to be broken")
    layer.__dict__.setdefault(_BEFORE, base)  # not as a submodule: it must not show in the state dict
    layer.base_layer = Sparse24Linear.from_linear(dense)
    layer.merged_adapters.extend(adapters)
    share = (update - kept).norm().item() / max(update.norm().item(), 1e-30)
    level = logging.INFO if next(_merges) else logging.WARNING
    _log.log(level, "merging LoRA into a 2:4 weight dropped %.0f %% of the update's norm", 100 * share)


def _unmerge(layer: Any) -> None:
    """Takes the place of the wrapper's ``unmerge``: puts the very layer back that was there before."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        return
    layer.base_layer = layer.__dict__.pop(_BEFORE)
    layer.merged_adapters.clear()
