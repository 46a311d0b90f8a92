# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint belong to one foreign weight, and which it must not have beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lissom.hf.checkpoint import VALUE_DTYPES, CheckpointError
from lissom.hf.foreign.bitmask import BitmaskWeight
from lissom.hf.foreign.canonical import Foreign, Source, told
from lissom.hf.foreign.declared import ADVICE, READS, Declared
from lissom.hf.foreign.dense import DenseWeight
from lissom.hf.foreign.marlin24 import FORMAT, Marlin24Weight

# Words, metadata and scales: as compressed-tensors, vLLM's GPTQ loader and Sparse-Marlin itself name them.
_MARLIN_NAMES = (
    ("weight_packed", "meta", "scale_packed"),
    ("B_24", "B_meta", "s"),
    ("B", "meta", "s"),
)
_BITMASK_NAMES = ("shape", "compressed", "bitmask", "row_offsets")
_LIBRARY_NAMES = _MARLIN_NAMES[0]
_SCRATCH = "workspace"  # locks of the kernel, zeros
# Ends of names that only quantised checkpoints have; what is left of them behind the formats above is refused.
_QUANTISED = {
    "weight_packed": "pack-quantized integers",
    "scale_packed": "marlin-24 scales without their weight",
    "B_24": "marlin-24 integers without their scales",
    "B_meta": "marlin-24 metadata without its weight",
    "compressed": "sparse values without their bitmask",
    "row_offsets": "sparse offsets without their bitmask",
    "weight_scale": "a scale of quantised weights",
    "weight_scale_inv": "a scale of fp8 weights",
    "weight_global_scale": "a scale of fp4 weights",
    "weight_zero_point": "a zero point of quantised weights",
    "weight_g_idx": "a group order of GPTQ",
    "weight_shape": "a shape of pack-quantized weights",
    "input_scale": "a scale of quantised activations",
    "input_zero_point": "a zero point of quantised activations",
    "output_scale": "a scale of quantised activations",
    "q_scale": "a scale of quantised attention",
    "k_scale": "a scale of a quantised cache",
    "v_scale": "a scale of a quantised cache",
    "qweight": "integers of GPTQ or AWQ",
    "qzeros": "zero points of GPTQ or AWQ",
    "g_idx": "a group order of GPTQ",
    "absmax": "scales of bitsandbytes",
    "quant_map": "a code book of bitsandbytes",
    "SCB": "scales of bitsandbytes",
}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Found:
    """What a checkpoint consists of.

    Attributes:
        weights: foreign weights by the name of the dense tensor; of a checkpoint that has none, all matrices.
        others: names of the tensors that stay as they are.
        dropped: names of tensors that mean nothing outside the kernel.
    """

    weights: dict[str, Foreign]
    others: list[str]
    dropped: list[str]


def find_weights(
    tensors: Mapping[str, Source],
    declared: Declared,
    *,
    dtype: str = "F16",
    ordered_scales: bool = True,
    names: Collection[str] = (),
) -> Found:
    """Sort the tensors of a checkpoint.

    Args:
        tensors: all of them, by name.
        declared: what the config says.
        dtype: type of weights that are stored as integers, as safetensors headers spell it.
        ordered_scales: where compressed-tensors wrote the scales of groups in the kernel's order.
        names: of the model's parameters, where they are known.

    Returns:
        Foreign weights and the rest.

    Raises:
        CheckpointError: a part is missing or does not fit, the tensors have another format than is declared,
            or there are quantised tensors of other formats.
    """
    weights: dict[str, Foreign] = {}
    used: set[str] = set()
    for name in tensors:
        for weight in (
            _bitmask(name, tensors, names),
            _marlin(name, tensors, dtype=dtype, ordered=ordered_scales),
        ):
            if weight is None:
                continue
            if weight.name in weights or weight.name in tensors:
                raise CheckpointError(f"{weight.name} is stored twice, once as {name}: keep one")
            weights[weight.name] = weight
            used |= {part.name for part in weight.sources}
    dropped = _scratch(tensors, weights)
    others = [name for name in tensors if name not in used and name not in dropped]
    _check_declared(weights, declared)
    modules = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    for name in others:
        _refuse_quantised(tensors[name], modules)
    if not weights:
        weights |= {name: DenseWeight(tensors[name]) for name in others if _is_matrix(tensors[name])}
        others = [name for name in others if name not in weights]
    return Found(weights, others, dropped)


def _is_matrix(tensor: Source) -> bool:
    return len(tensor.shape) == 2 and min(tensor.shape) > 0 and tensor.dtype in VALUE_DTYPES


def _bitmask(name: str, tensors: Mapping[str, Source], names: Collection[str]) -> BitmaskWeight | None:
    owner, _, end = name.rpartition(".")
    if end != "bitmask":
        return None
    for part in ("shape", "compressed"):
        if f"{owner}.{part}" not in tensors:
            raise CheckpointError(
                f"{told(tensors[name])} has no {owner}.{part} beside it: the checkpoint is incomplete, copy it again"
            )
    size, compressed, bitmask = (tensors[f"{owner}.{part}"] for part in _BITMASK_NAMES[:3])
    offsets = tensors.get(f"{owner}.{_BITMASK_NAMES[3]}")
    return BitmaskWeight(_dense_name(owner, names), size, compressed, bitmask, offsets)


def _dense_name(owner: str, names: Collection[str]) -> str:
    """compressed-tensors filed the parts under the tensor's name at first, later under the module's."""
    own = owner in names or (owner.endswith((".weight", ".bias")) and f"{owner}.weight" not in names)
    return owner if own else f"{owner}.weight"


def _marlin(name: str, tensors: Mapping[str, Source], *, dtype: str, ordered: bool) -> Marlin24Weight | None:
    owner, _, end = name.rpartition(".")
    for ends in _MARLIN_NAMES:
        if end != ends[0] or (end == "B" and tensors[name].dtype != "I32"):
            continue
        words, meta, scales = (tensors.get(f"{owner}.{part}") for part in ends)
        if words is None or meta is None or scales is None:
            _refuse_incomplete(name, owner, ends, tensors)
            continue
        library = ends == _LIBRARY_NAMES
        weight = Marlin24Weight(f"{owner}.weight", words, meta, scales, dtype)
        # compressed-tensors compares a group with half of the inputs, and orders nothing where it is not smaller.
        plain = library and (not ordered or weight.group >= weight.shape[1] // 2)
        return Marlin24Weight(f"{owner}.weight", words, meta, scales, dtype, plain)
    return None


def _refuse_incomplete(
    name: str, owner: str, ends: tuple[str, str, str], tensors: Mapping[str, Source]
) -> None:
    """A set with metadata or its own kind of scales was meant to be 2:4; others are refused by name later."""
    absent = [end for end in ends[1:] if f"{owner}.{end}" not in tensors]
    if ends[0] == "B" and absent == ["meta"]:
        raise CheckpointError(f"{told(tensors[name])} is a weight of dense Marlin, without 2:4: {READS}")
    if len(absent) == 1:
        raise CheckpointError(
            f"{told(tensors[name])} has no {owner}.{absent[0]} beside it: the checkpoint is incomplete, copy it again"
        )


def _scratch(tensors: Mapping[str, Source], weights: Mapping[str, Foreign]) -> list[str]:
    owners = {name.removesuffix(".weight") for name, weight in weights.items() if FORMAT in weight.format}
    return [f"{owner}.{_SCRATCH}" for owner in owners if f"{owner}.{_SCRATCH}" in tensors]


def _check_declared(weights: Mapping[str, Foreign], declared: Declared) -> None:
    if not weights and declared.format:
        raise CheckpointError(
            f"nothing to convert: config.json declares {declared.format} but no tensor is stored so; where its "
            "weights are dense, take that entry out"
        )
    for weight in weights.values():
        form = weight.format.partition(" ")[0]
        if declared.format is not None and form != declared.format:
            raise CheckpointError(
                f"config.json declares {declared.format}, but {told(weight.sources[0])} belongs to {form}: the folder "
                "mixes two checkpoints"
            )
        if isinstance(weight, Marlin24Weight):
            _check_integers(weight, declared)


def _check_integers(weight: Marlin24Weight, declared: Declared) -> None:
    if declared.bits and weight.bits not in declared.bits:
        raise CheckpointError(
            f"{told(weight.words)} has {weight.bits}-bit integers, config.json declares {sorted(declared.bits)}"
        )
    sizes = {weight.shape[1] if size == -1 else size for size in declared.groups}
    if sizes and weight.group not in sizes:
        raise CheckpointError(
            f"{told(weight.scales)} has a scale for each {weight.group} of {weight.shape[1]} inputs, config.json "
            f"declares groups of {sorted(sizes)}"
        )


def _refuse_quantised(tensor: Source, modules: Mapping[str, Foreign]) -> None:
    owner, _, end = tensor.name.rpartition(".")
    if end in _QUANTISED:
        raise CheckpointError(f"{told(tensor)} is {_QUANTISED[end]}; {READS}, alone: {ADVICE}")
    if owner in modules and end != "bias":
        raise CheckpointError(
            f"unexpected tensor {told(tensor)}: {owner} is stored as {modules[owner].format}"
        )
    if end == "weight" and tensor.dtype not in _FLOATS:
        raise CheckpointError(
            f"{told(tensor)} is stored as {tensor.dtype}, quantised without 2:4; {READS}, alone: {ADVICE}"
        )
