# SPDX-License-Identifier: Apache-2.0
"""Lets ``AutoModelForCausalLM.from_pretrained`` read packed folders: the transformers side of the format."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lissom.hf import lora
from lissom.hf.arrival import ArrivingLinear, expect
from lissom.hf.checkpoint import (
    FORMAT_VERSION,
    META_LAYOUT,
    META_SUFFIX,
    METHOD,
    PATTERN,
    CheckpointError,
    TensorInfo,
    check_format,
    check_packed,
    read_tensors,
)
from lissom.nn import Sparse24Linear


class Sparse24Config(QuantizationConfigMixin):
    """The ``quantization_config`` entry of a packed checkpoint.

    Args:
        modules: names of the packed linears, as in ``model.named_modules()``.
        format_version, pattern, meta_layout: see ``docs/formats.md``; other values and keys are refused.

    Raises:
        CheckpointError: a key or value that this version does not read.

    Example:
        >>> Sparse24Config(modules=["model.layers.0.mlp.up_proj"]).to_dict()["pattern"]
        '2:4'
    """

    def __init__(
        self,
        modules: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        pattern: str = PATTERN,
        meta_layout: str = META_LAYOUT,
        **other: Any,
    ) -> None:
        entry = {"quant_method": METHOD, "format_version": format_version, "pattern": pattern}
        self.modules = check_format(entry | {"meta_layout": meta_layout, "modules": modules} | other)
        self.quant_method: Any = METHOD
        self.format_version = format_version
        self.pattern = pattern
        self.meta_layout = meta_layout

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        check_format(config_dict)  # every key must be in the file: the defaults above are for writing
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)


class Sparse24Quantizer(HfQuantizer):
    """Swaps the listed linears on the empty skeleton for layers that pack themselves while loading."""

    quantization_config: Sparse24Config
    requires_calibration = True  # packed folders only: from_pretrained never prunes a dense one on the fly

    def __init__(self, quantization_config: Sparse24Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._names: dict[str, bool] = {}  # module name -> it was a Conv1D
        self._arriving: dict[str, ArrivingLinear] = {}  # name of the values -> layer, while loading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        placed = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in placed:
            raise ValueError(
                "packed lissom weights cannot be offloaded to disk: leave 'disk' out of device_map"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Leaves the conversion of packed values to their layer: transformers would do it far in advance.

        Versions of transformers that do not ask (5.20) convert in advance, at the price of memory.
        """
        layer = self._arriving.get(converter.target_patterns[0])
        if layer is None:
            return super().get_new_dtype(converter, param, dtype)
        layer.dtype_when_packed = dtype
        return None

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called by ``save_pretrained``: the list of modules must be true even if the model was changed."""
        modules = list(packed_modules(model))
        if modules:
            model.config.quantization_config = Sparse24Config(modules=modules)
        else:
            del model.config.quantization_config
        return None, {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        listed = self.quantization_config.modules
        tensors: dict[str, TensorInfo] = {}
        if checkpoint_files is not None:
            _refuse_outside(model.config.name_or_path, checkpoint_files)
            tensors = read_tensors(Path(file) for file in checkpoint_files)
            check_packed(tensors, listed)
        for stored in listed:
            name = _find_module(model, stored)
            if name is None:
                continue
            layer = model.get_submodule(name)
            replacement = _empty_twin(layer, name)
            if f"{stored}.weight" in tensors:
                _check_against_model(replacement, stored, tensors)
            arriving = expect(replacement, name, own=checkpoint_files is not None)
            model.set_submodule(name, arriving)
            self._names[name], self._arriving[f"{name}.weight"] = isinstance(layer, Conv1D), arriving
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        swapped = {name: module for name, module in packed_modules(model).items() if name in self._names}
        _refuse_unfilled(model, swapped)
        for layer in self._arriving.values():
            layer.finish()
        self._arriving.clear()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in packed_modules(model).items():
            model.set_submodule(name, dense_twin(module, conv1d=self._names.get(name, False), dtype=dtype))
        return model


def packed_modules(model: nn.Module) -> dict[str, Sparse24Linear]:
    """Finds the ``Sparse24Linear`` modules of a model.

    Args:
        model: any module.

    Returns:
        They by name, in the order of ``named_modules``.

    Example:
        >>> list(packed_modules(nn.Sequential(nn.Linear(4, 4), Sparse24Linear(4, 4))))
        ['1']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Sparse24Linear)}


def dense_twin(
    module: Sparse24Linear, *, conv1d: bool = False, dtype: torch.dtype | None = None
) -> nn.Module:
    """Makes the ordinary layer that computes the same as a packed one.

    Args:
        module: the packed layer, weight ``[N, K]``.
        conv1d: make transformers' ``Conv1D`` (weight ``[K, N]``, as in GPT-2) instead of ``nn.Linear``.
        dtype: type of the result; that of the packed values if None.

    Returns:
        ``nn.Linear`` or ``Conv1D`` with the zeros written out.
    """
    linear = module.to_linear().to(dtype=dtype)
    if not conv1d:
        return linear
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    layer.bias = nn.Parameter(linear.bias.detach())
    return layer


def register() -> None:
    """Makes transformers read packed folders, whatever LISSOM_AUTOLOAD says, and peft merge into them."""
    lora.install()
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Sparse24Config
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = Sparse24Quantizer


def _find_module(model: PreTrainedModel, stored: str) -> str | None:
    """Maps a stored name to the name in this model class: ``AutoModel`` drops the prefix that a head's class
    has.
    """
    prefix = f"{model.base_model_prefix}."
    names = dict(model.named_modules())
    for name in (stored, stored.removeprefix(prefix), prefix + stored):
        if name in names:
            return name
    written_by = model.config.architectures or []
    if type(model).__name__ not in written_by and not stored.startswith(prefix):
        return None  # part of a head that this class does not have
    raise CheckpointError(
        f"config.json lists the packed module {stored}, which {type(model).__name__} does not have"
    )


def _empty_twin(layer: nn.Module, name: str) -> Sparse24Linear:
    if isinstance(layer, Conv1D):
        columns, rows = layer.weight.shape
    elif isinstance(layer, nn.Linear):
        rows, columns = layer.weight.shape
    else:
        raise CheckpointError(
            f"config.json lists {name} as packed, but it is a {type(layer).__name__}, not a linear"
        )
    if columns % 4:
        raise CheckpointError(
            f"{name} cannot be packed: its {columns} input features are not a multiple of 4"
        )
    with torch.device("meta"):
        return Sparse24Linear(columns, rows, bias=layer.bias is not None, dtype=layer.weight.dtype)


def _check_against_model(module: Sparse24Linear, stored: str, tensors: dict[str, TensorInfo]) -> None:
    values = tensors[f"{stored}.weight"]
    rows, half = values.shape
    if (rows, half * 2) != (module.out_features, module.in_features):
        raise CheckpointError(
            f"{stored}.weight stores a matrix [{rows}, {half * 2}], but config.json describes "
            f"[{module.out_features}, {module.in_features}]"
        )
    if (f"{stored}.bias" in tensors) != (module.bias is not None):
        state = "has" if module.bias is None else "lacks"
        raise CheckpointError(f"the checkpoint {state} {stored}.bias, against what config.json describes")


def _refuse_unfilled(model: PreTrainedModel, swapped: Mapping[str, Sparse24Linear]) -> None:
    """transformers fills what it did not find with fresh values and only logs it; a new head may be so."""
    tensors: dict[str, torch.Tensor | None] = dict(model.named_parameters())
    waiting = {name: module for name, module in swapped.items() if module.packed is None}
    tensors |= {f"{name}{META_SUFFIX}": module.weight_meta for name, module in waiting.items()}
    complete = type(model).__name__ in (model.config.architectures or [])
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or []]
    for name, tensor in tensors.items():
        if getattr(tensor, "_is_hf_initialized", False) or any(pattern.search(name) for pattern in optional):
            continue
        if complete or name.rpartition(".")[0] in swapped:
            raise CheckpointError(f"{name} is missing from the checkpoint, or has another shape there")


def _refuse_outside(root: str | None, files: Sequence[str]) -> None:
    if not root or not os.path.isdir(root):
        return
    inside = os.path.abspath(root)
    for file in files:
        if os.path.commonpath([inside, os.path.abspath(file)]) != inside:
            raise CheckpointError(f"the shard index of {root} names a file outside the folder: {file}")


register()
