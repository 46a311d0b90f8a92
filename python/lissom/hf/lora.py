# SPDX-License-Identifier: Apache-2.0
"""Merges LoRA adapters into packed linears."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lissom.nn import Sparse24Linear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_log = logging.getLogger("lissom")


def merge_lora(model: PeftModel, *, adapter_names: Sequence[str] | None = None) -> PreTrainedModel:
    """Merges LoRA adapters and unloads peft; packed linears stay packed and 2:4.

    peft's own ``merge_and_unload`` cannot add a dense update to packed values. Here the update is added
    where a packed linear keeps a weight, and **dropped where it has none**: about half of it in number.
    The share of its norm that was dropped is logged once. To lose nothing, keep the adapter unmerged. All
    other layers are merged by peft.

    Args:
        model: what ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returned.
        adapter_names: the adapters to merge; the active ones if None.

    Returns:
        The base model, without adapters.

    Raises:
        TypeError: ``model`` is not a peft model.
        ValueError: an adapter on a packed linear is not plain LoRA (DoRA and other variants), or is merged
            already.

    Example:
        >>> merge_lora(nn.Linear(4, 4))
        Traceback (most recent call last):
        TypeError: merge_lora needs a peft.PeftModel, got Linear
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(f"merge_lora needs a peft.PeftModel, got {type(model).__name__}")
    layers = _packed_layers(model)
    names = {name: _adapters_of(layer, name, adapter_names) for name, layer in layers.items()}
    added = dropped = 0.0
    for name, layer in layers.items():
        for adapter in names[name]:
            whole, lost = _merge_layer(layer, adapter)
            added, dropped = added + whole, dropped + lost
            layer.merged_adapters.append(adapter)  # peft then leaves this layer as it is
    if added:
        share = (dropped / added) ** 0.5
        _log.warning(
            "merge_lora dropped %.0f %% of the update's norm: it fell on pruned weights", 100 * share
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(All adapters|Already following adapters).* merged")
        return model.merge_and_unload(adapter_names=None if adapter_names is None else list(adapter_names))


def _packed_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {
        name: layer for name, layer in tuned.items() if isinstance(layer.get_base_layer(), Sparse24Linear)
    }


def _adapters_of(layer: Any, name: str, wanted: Sequence[str] | None) -> list[str]:
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear) or isinstance(layer.base_layer, Linear):
        raise ValueError(f"merge_lora merges LoRA linears only, {name} is a {type(layer).__name__}")
    if layer.merged_adapters:
        raise ValueError(f"{name} has merged adapters already: {layer.merged_adapters}")
    adapters = [adapter for adapter in (wanted or layer.active_adapters) if adapter in layer.lora_A]
    for adapter in adapters:
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__
            raise ValueError(f"adapter {adapter!r} of {name} is a {kind}; merge_lora merges plain LoRA only")
    return adapters


@torch.no_grad()
def _merge_layer(layer: Any, adapter: str) -> tuple[float, float]:
    """Adds one adapter to one packed linear; returns the squared norms of all and of what was dropped."""
    base = layer.get_base_layer()
    dense = base.to_linear()
    delta = layer.get_delta_weight(adapter).float()
    # The support is what is non-zero: a kept zero has no place that a second save and load would know of.
    lost = delta.masked_fill(dense.weight != 0, 0)
    dense.weight.copy_((dense.weight.float() + delta - lost).to(dense.weight.dtype))
    if layer.lora_bias[adapter]:
        dense.bias += layer.lora_B[adapter].bias * layer.scaling[adapter]
    layer.base_layer = Sparse24Linear.from_linear(dense)
    return delta.square().sum().item(), lost.square().sum().item()
