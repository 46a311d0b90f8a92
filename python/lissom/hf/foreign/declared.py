# SPDX-License-Identifier: Apache-2.0
"""What config.json says of the format of its weights, in all the places where writers have said it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lissom.hf.checkpoint import METHOD, CheckpointError
from lissom.hf.foreign.bitmask import PLAIN, STRUCTURED
from lissom.hf.foreign.marlin24 import BITS, FORMAT

# compressed-tensors up to 0.6 wrote "compression_config"; before it was a library, "sparsity_config" alone.
ENTRIES = ("quantization_config", "compression_config", "sparsity_config", "sparseml_quantization_config")
READS = f"lissom convert reads {STRUCTURED}, {PLAIN}, {FORMAT} and dense weights that are 2:4"
ADVICE = "convert or prune the model that this one was made of"
_GPTQ = ("gptq", "marlin", "gptq_marlin", "gptq_marlin_24")
_CALLED = {
    "pack-quantized": "pack-quantized (integers without 2:4)",
    "int-quantized": "int-quantized (8-bit weights and activations)",
    "float-quantized": "float-quantized (fp8)",
    "naive-quantized": "naive-quantized",
}
# The first compressed-tensors that put the scales of groups in the order of the kernel, and the day it learnt to.
_ORDERED_SINCE, _ORDERED_DAY = (0, 8, 0), 20241108


@dataclass(frozen=True)
class Declared:
    """The format that a config declares.

    Attributes:
        format: sparse-24-bitmask, sparse-bitmask or marlin-24; None when the config declares nothing.
        bits: of marlin-24 integers, as far as declared.
        groups: inputs to a scale, -1 for whole rows, as far as declared.
        ordered_scales: whether the writer put the scales of groups in the kernel's order; None: nobody knows.
        writer: library and version, as far as told.
    """

    format: str | None = None
    bits: frozenset[int] = field(default_factory=frozenset)
    groups: frozenset[int] = field(default_factory=frozenset)
    ordered_scales: bool | None = None
    writer: str | None = None


def declared_format(config: Mapping[str, Any], *, where: str = "config.json") -> Declared:
    """Find out what a config declares, and refuse what lissom does not read.

    Args:
        config: content of config.json.
        where: its name, for messages.

    Returns:
        The declaration.

    Raises:
        CheckpointError: another format, or one that holds more than 2:4 weights.

    Example:
        >>> declared_format({"quantization_config": {"quant_method": "compressed-tensors",
        ...     "sparsity_config": {"format": "sparse-24-bitmask"}}}).format
        'sparse-24-bitmask'
    """
    _refuse_nested(config, where)
    found: dict[str, Declared] = {}
    for key in ENTRIES:
        entry = config.get(key)
        if entry is None or entry == {}:
            continue
        if not isinstance(entry, dict):
            raise CheckpointError(f"{where}: {key} must be an object, got {type(entry).__name__}")
        if key == "sparsity_config":
            entry = {"sparsity_config": entry}
        found[key] = _read_entry(entry, f"{where}: {key}", old=key != "quantization_config")
    declared = [each for each in found.values() if each.format]
    if len({each.format for each in declared}) > 1:
        formats = ", ".join(f"{key}: {each.format}" for key, each in found.items() if each.format)
        raise CheckpointError(f"{where} declares two formats ({formats}): keep the one that the tensors have")
    return declared[0] if declared else Declared()


def without_declaration(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the dense model.

    Args:
        config: content of config.json.

    Returns:
        A copy without the entries that tell a foreign format.
    """
    return {key: value for key, value in config.items() if key not in ENTRIES}


def _read_entry(entry: Mapping[str, Any], where: str, *, old: bool) -> Declared:
    method = str(entry.get("quant_method") or "compressed-tensors").lower()
    if method in _GPTQ or "checkpoint_format" in entry or "is_marlin_format" in entry:
        return _read_gptq(entry, where, method)
    if method == METHOD:
        raise CheckpointError(f"{where} says that lissom packed this folder already: load it as it is")
    if method != "compressed-tensors":
        raise CheckpointError(f"{where} says {method!r}; {READS}: {ADVICE}")
    if entry.get("transform_config"):
        raise CheckpointError(f"{where} has transforms that must run with the model; {READS}: {ADVICE}")
    if entry.get("kv_cache_scheme"):
        raise CheckpointError(
            f"{where} quantises the cache (kv_cache_scheme); {READS} without it: remove the entry and the tensors "
            "k_scale and v_scale if the model may run with a cache in full precision"
        )
    sparsity = _object(entry, "sparsity_config", where)
    form = _spelled(sparsity.get("format"))
    if form not in (None, "dense", STRUCTURED, PLAIN):
        raise CheckpointError(f"{where}.sparsity_config.format is {form!r}; {READS}")
    groups = _object(entry, "config_groups", where)
    if not groups:
        return Declared(None if form == "dense" else form, writer=_writer(entry))
    declared = _read_quantised(entry, groups, where, old=old)
    if form not in (None, "dense"):
        raise CheckpointError(
            f"{where} declares both {form} and {FORMAT}: a weight can be stored in one of them; take the entry out "
            "that the tensors do not have"
        )
    return declared


def _read_quantised(
    entry: Mapping[str, Any], groups: Mapping[str, Any], where: str, *, old: bool
) -> Declared:
    bits, sizes = set(), set()
    for name, group in groups.items():
        place = f"{where}.config_groups.{name}"
        if not isinstance(group, dict):
            raise CheckpointError(f"{place} must be an object, got {type(group).__name__}")
        form = _spelled(group.get("format")) or _spelled(entry.get("format"))
        if form != FORMAT:
            called = _CALLED.get(form or "", repr(form))
            raise CheckpointError(f"{place} is stored as {called}; {READS}: {ADVICE}")
        if group.get("input_activations") or group.get("output_activations"):
            raise CheckpointError(f"{place} quantises activations; {FORMAT} has weights only: {ADVICE}")
        count, size = _read_weights(_object(group, "weights", place), f"{place}.weights")
        bits.add(count)
        sizes.add(size)
    return Declared(FORMAT, frozenset(bits), frozenset(sizes), _ordered(entry, old=old), _writer(entry))


def _read_weights(weights: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Bits and group size, -1 for whole rows."""
    for key, value in (("type", "int"), ("symmetric", True), ("dynamic", False)):
        if weights.get(key) not in (value, None):
            raise CheckpointError(f"{where}.{key} must be {value!r} in {FORMAT}, got {weights[key]!r}")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise CheckpointError(
            f"{where}.actorder is {weights['actorder']!r}: {FORMAT} does not store which input has which scale "
            f"then; {ADVICE}"
        )
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"{where}.strategy must be 'group' or 'channel' in {FORMAT}, got {strategy!r}")
    size = -1 if strategy == "channel" else weights.get("group_size")
    return _checked_bits(weights.get("num_bits"), f"{where}.num_bits"), _checked_group(
        size, f"{where}.group_size"
    )


def _read_gptq(entry: Mapping[str, Any], where: str, method: str) -> Declared:
    if _spelled(entry.get("checkpoint_format")) != FORMAT and method != "gptq_marlin_24":
        form = entry.get("checkpoint_format") or method
        raise CheckpointError(f"{where} says {form!r}, integers without 2:4; {READS}: {ADVICE}")
    for key, value in (("sym", True), ("desc_act", False)):
        if entry.get(key) not in (value, None):
            raise CheckpointError(f"{where}.{key} must be {value!r} in {FORMAT}, got {entry[key]!r}")
    bits = _checked_bits(entry.get("bits"), f"{where}.bits")
    size = _checked_group(entry.get("group_size", -1), f"{where}.group_size")
    return Declared(FORMAT, frozenset([bits]), frozenset([size]), True, method)


def _checked_bits(bits: Any, where: str) -> int:
    if bits not in BITS or isinstance(bits, bool):
        raise CheckpointError(f"{where} must be 4 or 8 in {FORMAT}, got {bits!r}")
    return int(bits)


def _checked_group(size: Any, where: str) -> int:
    if (
        isinstance(size, bool)
        or not isinstance(size, int)
        or not (size == -1 or (size > 0 and size % 4 == 0))
    ):
        raise CheckpointError(f"{where} must be -1 or a multiple of 4, got {size!r}")
    return size


def _ordered(entry: Mapping[str, Any], *, old: bool) -> bool | None:
    """Whether the writer ordered scales of groups; releases 0.7 to 0.10 lost their version beside integers."""
    if old:
        return False
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(?:\.(?:a|dev)?(\d{8}))?", str(entry.get("version") or ""))
    if match is None:  # up to 0.9.0 the ratio was a number, later null
        return True if entry.get("global_compression_ratio", 0) is None else None
    if match[4]:  # a nightly build bears the number of the release before it
        return int(match[4]) >= _ORDERED_DAY
    return tuple(int(part) for part in match.groups()[:3]) >= _ORDERED_SINCE


def _writer(entry: Mapping[str, Any]) -> str | None:
    version = entry.get("version")
    return f"compressed-tensors {version}" if isinstance(version, str) else None


def _object(entry: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = entry.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}.{key} must be an object, got {type(value).__name__}")
    return value


def _spelled(form: Any) -> str | None:
    """Formats were spelled with underscores once."""
    return str(form).replace("_", "-") if form else None


def _refuse_nested(config: Mapping[str, Any], where: str) -> None:
    for key, part in _parts(config):
        for entry in ENTRIES:
            if part.get(entry):
                raise CheckpointError(
                    f"{where}: {entry} lies inside {key}; lissom convert reads it at the top level only"
                )


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((key, part) for key, part in config.items() if isinstance(part, dict) and key not in ENTRIES)
