# SPDX-License-Identifier: Apache-2.0
"""What becomes of each tensor of a foreign folder, decided from headers and the model class before anything is
written.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lissom.hf.checkpoint import CONFIG_NAME, INDEX_NAME, META_SUFFIX, CheckpointError, read_config
from lissom.hf.foreign.canonical import BLOCK_ELEMENTS, Foreign, told
from lissom.hf.foreign.declared import ADVICE, READS, Declared, declared_format, without_declaration
from lissom.hf.foreign.dense import DenseWeight
from lissom.hf.foreign.find import Found, find_weights
from lissom.hf.foreign.marlin24 import Marlin24Weight
from lissom.hf.side import CARD_NAME, check_links, side_files
from lissom.models import packing_obstacles
from lissom.models.origin import Origin, find_origins, skeleton
from lissom.models.shards import DTYPES, Stored, stored_tensors

Scales = Literal["auto", "kernel", "plain"]
_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_GPTQ_CONFIG = "quantize_config.json"
# Bytes a dense element of a block needs while it is decoded: integers, float32 values, positions, the packed block.
_BLOCK_BYTES = 24
_BUFFERS = 64 << 20  # copies of other tensors, the allocator's slack
_BUILD_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
    ImportError,
    RuntimeError,
    IndexError,
)


@dataclass(frozen=True)
class Layer:
    """What becomes of one foreign weight.

    Attributes:
        name: of the dense tensor.
        format: how it was stored.
        shape: of the dense tensor.
        dtype: of its values now.
        packed: whether it is packed; else it is written out with its zeros.
        reason: why it is not packed, or None.
        source_bytes: before.
        output_bytes: after.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    dtype: str
    packed: bool
    reason: str | None
    source_bytes: int
    output_bytes: int


@dataclass
class Plan:
    """What a conversion does.

    Attributes:
        folder: the source.
        config: its config.json.
        layers: foreign weights.
        others: tensors that are copied.
        order: both, in the order of the source's files.
        dtype: the type that the user asked for, for the new config.
        writer: who wrote the source, as far as known.
        notes: what the user should know.
    """

    folder: Path
    config: dict[str, Any]
    layers: list[Layer]
    others: list[Stored]
    order: list[Stored | tuple[Layer, Foreign]]
    dtype: str | None = None
    writer: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors now."""
        return sum(layer.source_bytes for layer in self.layers) + sum(each.size for each in self.others)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors afterwards."""
        return sum(layer.output_bytes for layer in self.layers) + sum(each.size for each in self.others)

    def names(self) -> list[str]:
        """The tensors that are written."""
        packed = [
            f"{layer.name.removesuffix('.weight')}{META_SUFFIX}" for layer in self.layers if layer.packed
        ]
        return [each.name for each in self.others] + [layer.name for layer in self.layers] + packed

    @property
    def peak_bytes(self) -> int:
        """Memory beside the program, at most: the largest weight in both forms, and a block of it."""
        largest = max(layer.source_bytes + layer.output_bytes for layer in self.layers)
        return largest + _BLOCK_BYTES * BLOCK_ELEMENTS + _BUFFERS


def make_plan(folder: Path, *, dtype: torch.dtype | str | None = None, scales: Scales = "auto") -> Plan:
    """Decide what becomes of each tensor.

    Args:
        folder: a model folder in a foreign format.
        dtype: type of weights that are stored as integers; None: as the config says, else float16.
        scales: order of marlin-24 scales; "auto" by their writer.

    Returns:
        The plan.

    Raises:
        CheckpointError: the folder is damaged, incomplete, or of a format that lissom does not read.
        ValueError: unknown dtype or scales.
    """
    asked = _checked_type(dtype)
    if scales not in get_args(Scales):
        raise ValueError(f"scales must be one of {', '.join(get_args(Scales))}, got {scales!r}")
    if not folder.is_dir():
        absent = "there is no such folder; lissom convert reads local folders: download the model first"
        state = "it is a file" if folder.exists() else absent
        raise CheckpointError(f"{folder} is not a model folder: {state}")
    check_links(folder, [folder / name for name in (CONFIG_NAME, INDEX_NAME, _GPTQ_CONFIG)])
    config = read_config(folder)
    declared = _declaration(folder, config)
    check_links(folder, [*folder.glob("*.safetensors"), *side_files(folder)[0], folder / CARD_NAME])
    stored = stored_tensors(folder)
    _refuse_other_types(stored)
    model = _skeleton(folder, config, stored)
    found = find_weights(
        stored,
        declared,
        dtype=_TYPES[asked or _config_type(config) or "float16"],
        ordered_scales=scales == "kernel" or (scales == "auto" and declared.ordered_scales is not False),
        names=model.state_dict().keys(),
    )
    plan = _decide(folder, config, stored, found, model)
    plan.dtype, plan.writer = asked, declared.writer
    if scales == "auto":
        plan.notes += _scale_notes(found, declared)
    _check_memory(plan)
    return plan


def _checked_type(dtype: torch.dtype | str | None) -> str | None:
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _TYPES:
        raise ValueError(f"dtype must be one of {', '.join(_TYPES)}, got {dtype!r}")
    return name


def _config_type(config: Mapping[str, Any]) -> str | None:
    found = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return found if found in _TYPES else None


def _declaration(folder: Path, config: Mapping[str, Any]) -> Declared:
    """From config.json, or from the file that GPTQ's tools put beside it."""
    declared = declared_format(config)
    beside = folder / _GPTQ_CONFIG
    if declared.format is None and beside.is_file():
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{beside} is not valid JSON: {error}") from error
        return declared_format({"quantization_config": content}, where=str(beside))
    return declared


def _refuse_other_types(stored: Mapping[str, Stored]) -> None:
    for each in stored.values():
        if each.dtype not in DTYPES:
            raise CheckpointError(
                f"{each.name} in {each.file} is stored as {each.dtype}, a quantised type; {READS}, alone: {ADVICE}"
            )


def _skeleton(folder: Path, config: dict[str, Any], stored: Mapping[str, Stored]) -> Any:
    """The model on the meta device, from the config without its foreign entries."""
    for key in _DEPTHS:
        depth = config.get(key)
        if isinstance(depth, int) and depth > len(stored):
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: {key} is {depth}, the checkpoint has {len(stored)} tensors: they do not "
                "belong together"
            )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / CONFIG_NAME).write_text(json.dumps(without_declaration(config)), encoding="utf-8")
        try:
            return skeleton(Path(scratch), {}, torch.float32)
        except _BUILD_ERRORS as error:
            line = next(iter(str(error).splitlines()), "")
            raise CheckpointError(
                f"transformers cannot build the model that {folder / CONFIG_NAME} describes "
                f"({type(error).__name__}: {line}): this version does not know it, or the config is damaged"
            ) from error


def _decide(
    folder: Path, config: dict[str, Any], stored: Mapping[str, Stored], found: Found, model: Any
) -> Plan:
    others = [stored[name] for name in found.others]
    origins = _match(folder, model, found, others)
    layers = {
        name: _layer(weight, _reason(weight, origins.get(name), model))
        for name, weight in found.weights.items()
    }
    if not any(layer.packed for layer in layers.values()):
        raise CheckpointError(
            f"nothing to convert: no linear of {folder} could be packed{_told_obstacle(layers)}. lissom packs weights "
            "of which every aligned four keep at most two; lissom prune makes a dense model 2:4"
        )
    notes = [f"{len(found.dropped)} tensors named workspace were left out"] if found.dropped else []
    order = sorted(
        _parts(layers, found, others),
        key=lambda part: (
            min((each.file, each.start) for each in _stored_of(part)) if _stored_of(part) else (folder, 0)
        ),
    )
    return Plan(folder, config, list(layers.values()), others, order, notes=notes)


def _told_obstacle(layers: Mapping[str, Layer]) -> str:
    """The reason of one layer: of one that would be packed if it were 2:4, where there is one."""
    told_ones = sorted(layers.values(), key=lambda layer: "not 2:4" not in (layer.reason or ""))
    return f"; {told_ones[0].name} stays dense because {told_ones[0].reason}" if told_ones else ""


def _parts(
    layers: Mapping[str, Layer], found: Found, others: list[Stored]
) -> Iterator[Stored | tuple[Layer, Foreign]]:
    yield from others
    for name, layer in layers.items():
        yield layer, found.weights[name]


def _stored_of(part: Stored | tuple[Layer, Foreign]) -> list[Stored]:
    sources = [part] if isinstance(part, Stored) else part[1].sources
    return [each for each in sources if isinstance(each, Stored)]


def _match(folder: Path, model: Any, found: Found, others: list[Stored]) -> dict[str, tuple[str, Origin]]:
    """Parameter and origin of each tensor of the dense checkpoint, by the tensor's name."""
    dense = {each.name: each for each in others}
    for name, weight in found.weights.items():
        dense[name] = Stored(name, weight.dtype, weight.shape, folder / CONFIG_NAME, 0, 0)
    origins = find_origins(model, dense)
    missing = set(model.state_dict()) - set(origins)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of its model, the first is {min(missing)}: copy the folder again, "
            "or correct its config.json"
        )
    return {
        stored.name: (target, origin) for target, origin in origins.items() for stored, _ in origin.stored
    }


def _reason(weight: Foreign, place: tuple[str, Origin] | None, model: Any) -> str | None:
    """Why a weight is written out instead of packed."""
    if place is None:
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        if isinstance(weight, DenseWeight) or any(re.search(pattern, weight.name) for pattern in ignored):
            return f"{type(model).__name__} does not use it"
        raise CheckpointError(
            f"{told(weight.sources[0])} belongs to {weight.name}, which {type(model).__name__} does not have: "
            "config.json describes another model"
        )
    target, origin = place
    taken = origin.obstacle(model, target)
    if taken:
        return taken
    owner, _, attribute = target.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, nn.Linear) or attribute != "weight":
        return f"its place, {type(module).__name__}, is no linear"
    return packing_obstacles(model).get(owner) or weight.obstacle()


def _layer(weight: Foreign, reason: str | None) -> Layer:
    size = DTYPES[weight.dtype].itemsize
    output = math.prod(weight.shape) * size
    if reason is None:
        rows, columns = weight.shape
        output = rows * (columns // 2 * size + (columns + 7) // 8)
    before = sum(math.prod(part.shape) * DTYPES[part.dtype].itemsize for part in weight.sources)
    return Layer(
        weight.name, weight.format, weight.shape, weight.dtype, reason is None, reason, before, output
    )


def _scale_notes(found: Found, declared: Declared) -> Iterator[str]:
    unsure = [
        weight
        for weight in found.weights.values()
        if isinstance(weight, Marlin24Weight) and weight.groups > 1 and weight.words.name.endswith("_packed")
    ]
    if not unsure or declared.ordered_scales:
        return
    if declared.ordered_scales is None:
        yield (
            "config.json does not say which compressed-tensors wrote it; 0.8 or newer is assumed. If the model talks "
            "nonsense, convert again with scales in plain order (--scales plain)"
        )
    else:
        yield (
            "its compressed-tensors, before 0.8, left scales of groups in plain order; read so (--scales kernel would "
            "read them as the kernel did)"
        )


def _check_memory(plan: Plan) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if plan.peak_bytes > total:
        largest = max(plan.layers, key=lambda layer: layer.source_bytes + layer.output_bytes)
        raise CheckpointError(
            f"{largest.name} needs {plan.peak_bytes / 1e9:.1f} GB of memory to convert, this machine has "
            f"{total / 1e9:.1f} GB"
        )
