# SPDX-License-Identifier: Apache-2.0
"""What configs of every age declare, and what they are refused for."""

from __future__ import annotations

import copy
import re

import pytest

from lissom.hf.checkpoint import CheckpointError
from lissom.hf.foreign.declared import Declared, declared_format, without_declaration

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
GPTQ |= {"checkpoint_format": "marlin_24", "lm_head": False, "damp_percent": 0.1}


@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
def test_sparse_models_of_every_age(writers, form):
    entry = writers.sparsity_entry(form)
    sparsity = entry["sparsity_config"]
    for config in (
        {"quantization_config": entry},  # compressed-tensors 0.7 and later
        {
            "quantization_config": entry | {"config_groups": {}, "format": "dense", "kv_cache_scheme": None}
        },  # by transformers
        {"quantization_config": {"sparsity_config": sparsity}, "compression_config": None},
        {"compression_config": {"sparsity_config": sparsity}},  # up to 0.6
        {"sparsity_config": sparsity | {"format": form.replace("-", "_")}},  # sparseml
    ):
        assert declared_format(config).format == form, config
        assert without_declaration(config | {"model_type": "llama"}) == {"model_type": "llama"}
    assert declared_format({"quantization_config": entry}).writer == "compressed-tensors 0.9.4"


def test_integers_of_every_age(writers):
    found = declared_format({"quantization_config": writers.marlin_entry(version="0.14.0.1")})
    assert found == Declared(
        "marlin-24", frozenset([4]), frozenset([128]), True, "compressed-tensors 0.14.0.1"
    )
    found = declared_format({"quantization_config": writers.marlin_entry(8, None)})
    assert (found.bits, found.groups, found.writer) == (frozenset([8]), frozenset([-1]), None)
    assert declared_format({"quantization_config": GPTQ}) == Declared(
        "marlin-24", frozenset([4]), frozenset([128]), True, "gptq"
    )
    with_scheme = writers.marlin_entry()
    with_scheme["config_groups"]["group_0"]["format"] = "marlin-24"
    assert (
        declared_format({"quantization_config": with_scheme | {"format": "mixed-precision"}}).format
        == "marlin-24"
    )
    two = copy.deepcopy(with_scheme)
    two["config_groups"]["group_1"] = writers.marlin_entry(8)["config_groups"]["group_0"]
    assert declared_format({"quantization_config": two}).bits == {4, 8}


@pytest.mark.parametrize(
    ("key", "more", "ordered"),
    [
        ("compression_config", {}, False),  # up to 0.6
        ("compression_config", {"version": "0.6.0.20240926"}, False),
        ("quantization_config", {"version": "0.7.1"}, False),
        ("quantization_config", {"version": "0.7.1.20241107"}, False),
        ("quantization_config", {"version": "0.7.1.20241108"}, True),
        ("quantization_config", {"version": "0.8.0"}, True),
        ("quantization_config", {"version": "0.10.3a20250715"}, True),
        ("quantization_config", {"version": "0.14.0.1"}, True),
        ("quantization_config", {}, True),  # 0.9.4: without version, the ratio null
        ("quantization_config", {"global_compression_ratio": 1.77}, None),  # 0.7.1 as well as 0.9.0
        ("quantization_config", {"global_compression_ratio": 1.77, "version": "?"}, None),
    ],
)
def test_order_of_scales_is_told_by_the_writer(writers, key, more, ordered):
    assert declared_format({key: writers.marlin_entry() | more}).ordered_scales is ordered


def test_nothing_declared():
    for config in ({}, {"quantization_config": None}, {"quantization_config": {}}, {"sparsity_config": {}}):
        assert declared_format(config) == Declared()
    dense = {
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}
    }
    assert declared_format(dense).format is None


REFUSED = {
    "GPTQ": (GPTQ | {"checkpoint_format": "gptq"}, "says 'gptq', integers without 2:4; lissom convert reads"),
    "older GPTQ": ({"quant_method": "gptq", "bits": 4}, "says 'gptq', integers without 2:4"),
    "dense Marlin": ({"quant_method": "gptq", "is_marlin_format": True}, "says 'gptq', integers without 2:4"),
    "AWQ": ({"quant_method": "awq"}, "says 'awq'; lissom convert reads sparse-24-bitmask"),
    "fp8": ({"quant_method": "fp8"}, "says 'fp8'; .* convert or prune the model that this one was made of"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "says 'bitsandbytes'"),
    "ours": ({"quant_method": "lissom"}, "lissom packed this folder already: load it as it is"),
    "not an object": ([1], "quantization_config must be an object, got list"),
    "sparsity not an object": ({"sparsity_config": "dense"}, "sparsity_config must be an object, got str"),
    "unknown sparsity": ({"sparsity_config": {"format": "csr"}}, "sparsity_config.format is 'csr'"),
    "transforms": ({"transform_config": {"config_groups": {"R1": {}}}}, "has transforms"),
    "8 bits without sign": (GPTQ | {"sym": False}, "sym must be True in marlin-24, got False"),
    "activation order": (GPTQ | {"desc_act": True}, "desc_act must be False in marlin-24, got True"),
    "3 bits": (GPTQ | {"bits": 3}, "bits must be 4 or 8 in marlin-24, got 3"),
    "bits true": (GPTQ | {"bits": True}, "bits must be 4 or 8"),
    "group of 6": (GPTQ | {"group_size": 6}, "group_size must be -1 or a multiple of 4, got 6"),
    "group of text": (GPTQ | {"group_size": "128"}, "group_size must be -1 or a multiple of 4, got '128'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    entry, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        declared_format({"quantization_config": entry})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: quantization_config")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "pack-quantized", r"is stored as pack-quantized \(integers without 2:4\)"),
        ("format", "int-quantized", r"is stored as int-quantized \(8-bit weights and activations\)"),
        ("format", "float-quantized", r"is stored as float-quantized \(fp8\)"),
        ("format", "nvfp4-pack-quantized", "is stored as 'nvfp4-pack-quantized'"),
        ("format", None, "is stored as None"),
        ("kv_cache_scheme", {"num_bits": 8}, "quantises the cache"),
        ("config_groups", [1], "config_groups must be an object, got list"),
        ("config_groups.group_0", "W4A16", "group_0 must be an object, got str"),
        ("config_groups.group_0.weights", None, "weights.num_bits must be 4 or 8 in marlin-24, got None"),
        ("config_groups.group_0.input_activations", {"num_bits": 8}, "quantises activations"),
        ("config_groups.group_0.weights.type", "float", "type must be 'int' in marlin-24, got 'float'"),
        ("config_groups.group_0.weights.symmetric", False, "symmetric must be True"),
        ("config_groups.group_0.weights.dynamic", True, "dynamic must be False"),
        ("config_groups.group_0.weights.actorder", "group", "does not store which input has which scale"),
        ("config_groups.group_0.weights.strategy", "tensor", "strategy must be 'group' or 'channel'"),
        ("config_groups.group_0.weights.num_bits", 2, "num_bits must be 4 or 8"),
        (
            "config_groups.group_0.weights.group_size",
            None,
            "group_size must be -1 or a multiple of 4, got None",
        ),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "declares both sparse-24-bitmask and marlin-24"),
    ],
)
def test_refused_beside_integers(writers, path, value, message):
    entry = writers.marlin_entry()
    place, *keys = [entry, *path.split(".")]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        declared_format({"quantization_config": entry})


def test_two_declarations_must_agree(writers):
    both = {"quantization_config": writers.marlin_entry(), "sparsity_config": {"format": "sparse-bitmask"}}
    with pytest.raises(
        CheckpointError, match=re.escape("declares two formats (quantization_config: marlin-24, ")
    ):
        declared_format(both)
    with pytest.raises(CheckpointError, match="quantization_config lies inside text_config"):
        declared_format({"text_config": {"quantization_config": writers.marlin_entry()}})
