# SPDX-License-Identifier: Apache-2.0
"""The packed checkpoint format on disk: what a folder may contain, checked before anything is loaded from it.

Only headers are read here. The metadata bytes themselves are checked once, when they are loaded, by
``Sparse24Linear.pack_``, so that no kernel ever indexes with an unchecked nibble.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHOD = "lissom"
FORMAT_VERSION = 1
PATTERN = "2:4"
META_LAYOUT = "nibble-p0p1"
VALUE_DTYPES = ("F32", "BF16", "F16")
META_SUFFIX = ".weight_meta"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or of a kind that this version of lissom does not read."""


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


def read_config(folder: Path) -> dict[str, Any]:
    """Reads ``config.json`` of a model folder.

    Args:
        folder: the model folder.

    Returns:
        The parsed JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or does not hold an object.

    Example:
        >>> read_config(Path("/nowhere"))
        Traceback (most recent call last):
        lissom.hf.checkpoint.CheckpointError: /nowhere is not a model folder: it has no config.json
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG_NAME}")
    return _read_json_object(path)


def check_format(quantization: Mapping[str, Any]) -> list[str]:
    """Checks the ``quantization_config`` entry of config.json.

    Args:
        quantization: the entry, with ``quant_method``, ``format_version``, ``pattern``, ``meta_layout``,
            ``modules``.

    Returns:
        The names of the packed modules.

    Raises:
        CheckpointError: a key is unknown or missing, or a value is one that this version cannot read.

    Example:
        >>> check_format({"quant_method": "lissom", "format_version": 1, "pattern": "2:4",
        ...               "meta_layout": "nibble-p0p1", "modules": ["mlp.up"]})
        ['mlp.up']
    """
    known = {"quant_method", "format_version", "pattern", "meta_layout", "modules"}
    unknown = sorted(set(quantization) - known)
    if unknown:
        raise CheckpointError(
            f"quantization_config has the unknown key {unknown[0]!r}; known are {sorted(known)}"
        )
    version = quantization.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(
            f"quantization_config.format_version must be a positive integer, got {version!r}"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"format_version {version} is newer than this lissom, it reads {FORMAT_VERSION}: upgrade lissom"
        )
    for key, wanted in (("quant_method", METHOD), ("pattern", PATTERN), ("meta_layout", META_LAYOUT)):
        if quantization.get(key) != wanted:
            raise CheckpointError(
                f"quantization_config.{key} must be {wanted!r}, got {quantization.get(key)!r}"
            )
    modules = quantization.get("modules")
    if (
        not isinstance(modules, list)
        or not modules
        or not all(isinstance(name, str) and name for name in modules)
    ):
        raise CheckpointError("quantization_config.modules must be a non-empty list of module names")
    if len(set(modules)) != len(modules):
        twice = next(name for name in modules if modules.count(name) > 1)
        raise CheckpointError(f"quantization_config.modules names {twice!r} more than once")
    return modules


def packed_entry(modules: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json that `check_format` reads.

    Args:
        modules: the names of the packed modules.

    Returns:
        The entry.

    Example:
        >>> check_format(packed_entry(["mlp.up"]))
        ['mlp.up']
    """
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "pattern": PATTERN,
        "meta_layout": META_LAYOUT,
        "modules": list(modules),
    }


def find_weight_files(folder: Path) -> list[Path]:
    """Lists the safetensors files of a model folder, following the shard index where there is one.

    Args:
        folder: the model folder.

    Returns:
        Paths of existing regular files inside the folder, sorted.

    Raises:
        CheckpointError: no safetensors weights, a shard that is missing or lies outside the folder, or a
            broken index.
    """
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.exists():
        return [_regular_file(single)]
    if index.exists():
        return _indexed_files(folder, _read_json_object(index))
    if any(folder.glob("pytorch_model*.bin*")):
        raise CheckpointError(
            f"{folder} holds pickled weights only; lissom reads safetensors: convert the model first"
        )
    raise CheckpointError(f"{folder} has no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME} is there")


def read_tensors(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Reads the headers of safetensors files.

    Args:
        files: paths of the weight files.

    Returns:
        Type and shape of each tensor by name.

    Raises:
        CheckpointError: a file is missing, damaged or not safetensors, or two tensors have one name.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, TensorInfo] = {}
    for file in files:
        _regular_file(file)
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file} is not a safetensors file; lissom does not read pickled weights")
        try:
            with safe_open(file, framework="pt") as handle:
                names = list(handle.keys())
                slices = [handle.get_slice(name) for name in names]
                found = [TensorInfo(part.get_dtype(), tuple(part.get_shape()), file) for part in slices]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged or cut off ({error}): copy or write it again"
            ) from error
        _refuse_repeated_names(file)
        for name, info in zip(names, found, strict=True):
            if name in tensors:
                raise CheckpointError(f"tensor {name} is stored twice, in {tensors[name].file} and in {file}")
            tensors[name] = info
    return tensors


def check_packed(tensors: Mapping[str, TensorInfo], modules: Sequence[str]) -> None:
    """Checks types and shapes of the packed tensors against each other and against the list of modules.

    A model class may store tensors under other names than its modules have; such names are matched by
    number here and one by one after loading.

    Args:
        tensors: all tensors of the checkpoint, as :func:`read_tensors` gives them.
        modules: the names listed in ``quantization_config.modules``.

    Raises:
        CheckpointError: a packed tensor is missing, surplus, or of a wrong type or shape.
    """
    packed = {name.removesuffix(META_SUFFIX) for name in tensors if name.endswith(META_SUFFIX)}
    absent, surplus = [name for name in modules if name not in packed], packed - set(modules)
    for name in absent:
        if f"{name}.weight" in tensors:
            raise CheckpointError(
                f"{name} is listed as packed, but {name}{META_SUFFIX} is missing from the checkpoint"
            )
        if len(surplus) < len(absent):
            raise CheckpointError(f"{name} is listed as packed, but the checkpoint has no {name}.weight")
    if len(surplus) > len(absent):
        raise CheckpointError(
            f"{min(surplus)}{META_SUFFIX} is stored, but config.json does not list this module"
        )
    for name in sorted(packed):
        _check_packed_module(tensors, name)
    owners = tuple(f"{name}." for name in sorted(packed))
    for name in tensors:
        owner = name.rpartition(".")[0]
        if name.startswith(owners) and (owner not in packed or name.rpartition(".")[2] not in _MEMBERS):
            raise CheckpointError(
                f"unexpected tensor {name}: a packed module stores only {', '.join(_MEMBERS)}"
            )


_MEMBERS = ("weight", "weight_meta", "bias")


def check_folder(folder: Path) -> None:
    """Checks a model folder as far as its config and headers tell, packed or not.

    Args:
        folder: the model folder.

    Raises:
        CheckpointError: the first thing found wrong.
    """
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{folder / CONFIG_NAME}: quantization_config must be an object")
    modules = (
        check_format(quantization) if quantization and quantization.get("quant_method") == METHOD else None
    )
    tensors = read_tensors(find_weight_files(folder))
    if modules is not None:
        check_packed(tensors, modules)
    elif any(name.endswith(META_SUFFIX) for name in tensors):
        raise CheckpointError(
            f"{folder} holds packed weights, but its config.json has no lissom quantization_config"
        )


def _check_packed_module(tensors: Mapping[str, TensorInfo], name: str) -> None:
    meta, values, bias = (
        tensors[name + META_SUFFIX],
        tensors.get(f"{name}.weight"),
        tensors.get(f"{name}.bias"),
    )
    if values is None:
        raise CheckpointError(
            f"{name}.weight is missing from the checkpoint, though {name}{META_SUFFIX} is there"
        )
    if values.dtype not in VALUE_DTYPES:
        raise CheckpointError(f"{name}.weight must be one of {', '.join(VALUE_DTYPES)}, got {values.dtype}")
    if len(values.shape) != 2 or 0 in values.shape or values.shape[1] % 2:
        raise CheckpointError(
            f"{name}.weight must be [N, K/2] with K a multiple of 4, got {list(values.shape)}"
        )
    # Two values a quad of four columns, one nibble a quad, two nibbles a byte.
    rows, columns = values.shape[0], 2 * values.shape[1]
    wanted = (rows, (columns + 7) // 8)
    if meta.dtype != "U8" or meta.shape != wanted:
        raise CheckpointError(
            f"{name}{META_SUFFIX} must be U8 {list(wanted)} beside a weight of {list(values.shape)}, "
            f"got {meta.dtype} {list(meta.shape)}"
        )
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in VALUE_DTYPES):
        raise CheckpointError(
            f"{name}.bias must be a float tensor [{rows}], got {bias.dtype} {list(bias.shape)}"
        )


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_regular_file(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _regular_file(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} is missing, though the checkpoint names it")
    if not path.is_file():
        raise CheckpointError(f"{path} must be a regular file")
    return path


def _indexed_files(folder: Path, index: Mapping[str, Any]) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_NAME} must hold a non-empty object weight_map")
    names = {name for name in weight_map.values() if isinstance(name, str)}
    for name in weight_map.values():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(
                f"{folder / INDEX_NAME}: shard {name!r} is not a plain file name in the model folder"
            )
    files = [_regular_file(folder / name) for name in sorted(names)]
    tensors = read_tensors(files)
    for tensor, name in weight_map.items():
        if tensor not in tensors or tensors[tensor].file != folder / name:
            raise CheckpointError(f"{folder / INDEX_NAME} says that {tensor} is in {name}, where it is not")
    return files


def _refuse_repeated_names(file: Path) -> None:
    """Two entries of one name are legal JSON, but readers disagree on which of them counts."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{file} names {twice!r} more than once in its header")
        return dict(pairs)

    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        json.loads(stream.read(size), object_pairs_hook=unique)
