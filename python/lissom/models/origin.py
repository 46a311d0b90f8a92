# SPDX-License-Identifier: Apache-2.0
"""From which stored tensors each parameter of a transformers model comes, and the way back.

transformers renames and rearranges tensors while it loads a checkpoint (one matrix of each expert into one fused
weight, say) and undoes that when it saves. Both directions are done here by its own transforms, for as many tensors
at a time as one parameter needs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..hf.checkpoint import CheckpointError
from .shards import DTYPES, Stored
from .walk import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Origin:
    """Stored tensors and the parameters that they become together; mostly one of each.

    Attributes:
        label: the parameter that transformers files them under.
        stored: the tensors, each with the pattern of the transform that its name matched.
        transform: what makes parameters of them; None for a tensor that is at most renamed.
        dtype: type of the parameters.
        targets: names of the parameters.
    """

    label: str
    stored: tuple[tuple[Stored, str | None], ...]
    transform: Any
    dtype: torch.dtype
    targets: tuple[str, ...] = ()

    def tensors(self, model: Any, read: Callable[[Stored], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the parameters.

        Args:
            model: the transformers model.
            read: gives a stored tensor, with values or without.

        Returns:
            Tensors by parameter name.
        """
        if self.transform is None:
            ((stored, _),) = self.stored
            return {self.label: read(stored).to(self.dtype)}
        transform = copy.deepcopy(self.transform)
        for stored, pattern in self.stored:
            # Called one after the other by the transform, when it needs them.
            transform.add_tensor(
                self.label, stored.name, pattern, partial(_read_as, read, stored, self.dtype)
            )
        made = transform.convert(self.label, model=model, config=model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}

    def returned(self, model: Any, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the stored tensors from the parameters.

        Args:
            model: the transformers model.
            targets: all of `targets`.

        Returns:
            Tensors by stored name, in their stored types.

        Raises:
            UnsupportedModelError: transformers gives back other names or shapes.
        """
        if self.transform is None:
            ((stored, _),) = self.stored
            return {stored.name: targets[self.label].to(DTYPES[stored.dtype])}
        from transformers.core_model_loading import revert_weight_conversion

        try:
            made = revert_weight_conversion(model, dict(targets))
        except _CONVERSION_ERRORS as error:
            raise UnsupportedModelError(f"{self.label} cannot be written: {_short(error)}") from error
        wanted = {stored.name: stored for stored, _ in self.stored}
        if {name: tuple(tensor.shape) for name, tensor in made.items()} != {
            name: stored.shape for name, stored in wanted.items()
        }:
            raise UnsupportedModelError(
                f"{self.label} cannot be written: transformers turns it into {', '.join(sorted(made))}, "
                f"the folder has {', '.join(sorted(wanted))}"
            )
        return {name: tensor.to(DTYPES[wanted[name].dtype]) for name, tensor in made.items()}

    def obstacle(self, model: Any, target: str) -> str | None:
        """Why the stored tensor of a linear cannot be replaced by a packed one under its own name.

        Args:
            model: the transformers model.
            target: the parameter.

        Returns:
            A reason; None if it can, as far as names tell.
        """
        if self.transform is not None:
            return "transformers merges it with others while loading"
        name, prefix = self.stored[0][0].name, f"{model.base_model_prefix}."
        if target not in (name, name.removeprefix(prefix), prefix + name):
            return "transformers renames it while loading"
        tied = model.all_tied_weights_keys or {}
        if target in tied or target in tied.values():
            return "it is shared with another module"
        return None

    def check_return(self, model: Any) -> None:
        """Try the way back without values.

        Raises:
            UnsupportedModelError: as for `returned`.
        """
        if self.transform is not None:
            self.returned(model, self.tensors(model, Stored.meta))


def skeleton(folder: Path, stored: Mapping[str, Stored], dtype: torch.dtype | None) -> Any:
    """The model that a config describes, in eval mode, all on the meta device and with nothing tied.

    Args:
        folder: the model folder.
        stored: its tensors; the first floating one decides the type when the config does not.
        dtype: type of the weights, or None.

    Returns:
        A transformers model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, initialization

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found = (
        dtype
        or config.dtype
        or next(
            (DTYPES[each.dtype] for each in stored.values() if each.dtype in ("F64", "F32", "F16", "BF16")),
            None,
        )
    )
    with (
        torch.device("meta"),
        initialization.no_tie_weights(),
        initialization.meta_device_safe_creation_ops(),
    ):
        model = AutoModelForCausalLM.from_config(config, dtype=found, trust_remote_code=False)
    return model.eval()


def find_origins(model: Any, stored: Mapping[str, Stored]) -> dict[str, Origin]:
    """Match stored tensors and parameters as `from_pretrained` does; what matches nothing is left out.

    Args:
        model: a skeleton. Its `_weight_conversions` afterwards holds the transforms that were used.
        stored: the tensors of its folder.

    Returns:
        The origin of every stored parameter and buffer.

    Raises:
        CheckpointError: a tensor's shape does not fit the config, a name is taken twice, or a transform of
            transformers fails.
    """
    from transformers import conversion_mapping as mapping
    from transformers import core_model_loading as loading

    transforms = mapping.get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    parts: dict[str, list[tuple[Stored, str | None]]] = {}
    for name in sorted(stored, key=loading.dot_natural_key):
        label, pattern = loading.rename_source_key(name, renamings, converters, prefix, wanted)
        if label not in wanted and name in wanted:
            label, pattern = loading.rename_source_key(name, [], [], prefix, wanted)
        if label in wanted:
            parts.setdefault(label, []).append((stored[name], pattern))
    model._weight_conversions = [each for each in transforms if each.was_used()]
    origins: dict[str, Origin] = {}
    dtypes = _Dtypes(model)
    for label, sources in parts.items():
        pattern = sources[0][1]
        if pattern is None and len(sources) > 1:
            raise CheckpointError(
                f"{label} is stored twice, as {sources[0][0].name} and {sources[1][0].name}"
            )
        transform = None if pattern is None else by_pattern[pattern]
        origin = _checked(Origin(label, tuple(sources), transform, dtypes(label)), model, wanted)
        for target in origin.targets:
            if target in origins:
                raise CheckpointError(f"{target} is stored twice, also as {sources[0][0].name}")
            origins[target] = origin
    return origins


def tie(model: Any, origins: Mapping[str, Origin]) -> None:
    """Tie what the config ties, where the folder does not hold two different weights, and miss nothing.

    Args:
        model: a skeleton.
        origins: of its parameters.

    Raises:
        CheckpointError: a parameter is neither stored nor tied to one that is.
    """
    missing = set(model.state_dict()) - set(origins)
    # Two stored weights are left apart by this call as long as they are on the meta device.
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for target, source in model.all_tied_weights_keys.items():
        if target not in origins or source not in origins:
            continue
        if _same_values(origins[target], origins[source]):
            owner, _, attribute = target.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(source))
        else:
            warnings.warn(
                f"config.json ties {target} to {source}, but the checkpoint holds two different weights: they "
                "stay apart",
                stacklevel=3,
            )
    if missing:
        first = min(missing)
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors of its model, the first is {first}"
        )


def load_buffers(model: Any, origins: Mapping[str, Origin]) -> None:
    """Make every buffer real: stored ones from the files, the others as the model class computes them.

    Args:
        model: a skeleton.
        origins: of its parameters and stored buffers.
    """
    for name, _ in list(model.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if name in origins:
            made = origins[name].tensors(model, Stored.read)[name]
        else:
            made = torch.empty_like(module.get_buffer(attribute), device="cpu")
        setattr(module, attribute, made)
    # What carries this mark, transformers leaves alone when it computes initial values.
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()


_CONVERSION_ERRORS = (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError)


class _Dtypes:
    """The type of each parameter, with those that a model class keeps in float32 whatever the others are."""

    def __init__(self, model: Any) -> None:
        from transformers.core_model_loading import build_glob_alternation

        self._types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        plan = model._get_dtype_plan(model.dtype)
        self._plan, self._kept = plan, None
        if plan:
            self._kept, self._globs, _ = build_glob_alternation(list(plan))

    def __call__(self, name: str) -> torch.dtype:
        found = self._kept.search(name) if self._kept else None
        if found is None or found.lastgroup is None:
            return self._types[name]
        dtype: torch.dtype = self._plan[self._globs[found.lastgroup]]
        return dtype


def _checked(origin: Origin, model: Any, wanted: Mapping[str, torch.Tensor]) -> Origin:
    """The origin with its targets, found by making them without values."""
    first = origin.stored[0][0]
    try:
        made = origin.tensors(model, Stored.meta)
    except CheckpointError:
        raise
    except _CONVERSION_ERRORS as error:
        raise CheckpointError(
            f"{origin.label} cannot be made from {first.name} and others: {_short(error)}"
        ) from error
    for name, tensor in made.items():
        if name not in wanted:
            raise CheckpointError(f"{first.name} becomes {name}, which {type(model).__name__} does not have")
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{first.name} gives {name} {list(tensor.shape)}, but config.json describes "
                f"{list(wanted[name].shape)}"
            )
    return Origin(origin.label, origin.stored, origin.transform, origin.dtype, tuple(made))


def _read_as(read: Callable[[Stored], torch.Tensor], stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    return read(stored).to(dtype)


def _same_values(one: Origin, other: Origin) -> bool:
    if one.transform is not None or other.transform is not None:
        return False
    (first, _), (second, _) = one.stored[0], other.stored[0]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(left == right for left, right in zip(first.chunks(), second.chunks(), strict=True))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
