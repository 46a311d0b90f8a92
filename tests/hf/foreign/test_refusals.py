# SPDX-License-Identifier: Apache-2.0
"""Damaged and foreign-in-another-way folders: each is refused with one sentence, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lissom.hf import convert_folder

S24, S, M = "sparse-24-bitmask", "sparse-bitmask", "marlin-24"
UP = "model.layers.0.mlp.up_proj"  # [384, 128]
DOWN = "model.layers.0.mlp.down_proj"  # [128, 384]: three groups of 128
KINDS: dict[str, tuple[str, Callable[[Any], Any], str]] = {}  # name -> format, damage, what the error says


def tensors_kind(
    name: str, form: str, message: str, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    KINDS[name] = form, lambda made: made.tensors(change), message


def config_kind(name: str, form: str, message: str, change: Callable[[dict[str, Any]], Any]) -> None:
    KINDS[name] = form, lambda made: made.edit(change), message


def put(state: dict[str, torch.Tensor], **changes: Any) -> None:
    """Replace parts of UP; the names of Python stand for the ends of theirs."""
    for part, change in changes.items():
        name = f"{UP}.{part}"
        state[name] = change(state[name]) if callable(change) else change


for part, form in {
    "shape": S24,
    "compressed": S24,
    "scale_packed": M,
    "meta": M,
}.items():
    tensors_kind(
        f"{part} missing",
        form,
        rf"{UP}\.\w+ in .*model\.safetensors has no {UP}\.{part} beside it: the checkpoint is incomplete",
        lambda state, part=part: state.pop(f"{UP}.{part}"),
    )
tensors_kind(
    "bitmask missing", S24, rf"{UP}\.compressed in .* is sparse values without their bitmask",
    lambda state: state.pop(f"{UP}.bitmask"),
)  # fmt: skip
tensors_kind(
    "words missing", M, rf"{UP}\.scale_packed in .* is marlin-24 scales without their weight",
    lambda state: state.pop(f"{UP}.weight_packed"),
)  # fmt: skip
tensors_kind(
    "weight missing", S24, rf"lacks 1 tensors of its model, the first is {UP}\.weight",
    lambda state: [state.pop(f"{UP}.{part}") for part in ("shape", "compressed", "bitmask")],
)  # fmt: skip
tensors_kind(
    "dense tensor missing", M, r"lacks 1 tensors of its model, the first is model\.norm\.weight",
    lambda state: state.pop("model.norm.weight"),
)  # fmt: skip
tensors_kind(
    "weight stored twice", S24, rf"{UP}\.weight is stored twice",
    lambda state: state.update({f"{UP}.weight": torch.ones(384, 128)}),
)  # fmt: skip
tensors_kind(
    "extra tensor in a module", M, rf"unexpected tensor {UP}\.perm in .*: {UP} is stored as marlin-24 int4",
    lambda state: state.update({f"{UP}.perm": torch.zeros(4)}),
)  # fmt: skip
tensors_kind(
    "weight that the model lacks", S24, r"layers\.7\.up\.shape in .* belongs to model\.layers\.7\.up\.weight, which",
    lambda s: s.update({f"model.layers.7.up.{p}": s[f"{UP}.{p}"] for p in ("shape", "compressed", "bitmask")}),
)  # fmt: skip

# Types and shapes.
tensors_kind(
    "shape of floats",
    S24,
    r"shape in .* must hold the sizes of a tensor as I64, got F32",
    lambda s: put(s, shape=torch.ones(2)),
)
tensors_kind(
    "shape too long",
    S24,
    r"shape in .* must hold the sizes .* got I64 \[9\]",
    lambda s: put(s, shape=torch.ones(9).long()),
)
tensors_kind(
    "shape negative",
    S24,
    r"must hold positive sizes, got \[-384, 128\]",
    lambda s: put(s, shape=torch.tensor([-384, 128])),
)
tensors_kind(
    "shape huge",
    S24,
    r"bitmask in .* must be U8 \[1099511627776, 16\] for a tensor",
    lambda s: put(s, shape=torch.tensor([1 << 40, 128])),
)
tensors_kind(
    "shape transposed",
    S24,
    r"must be U8 \[128, 48\] for a tensor of \[128, 384\], got U8 \[384, 16\]",
    lambda s: put(s, shape=torch.tensor([128, 384])),
)
tensors_kind(
    "shape of another weight",
    S24,
    rf"{UP}\.weight \[192, 128\], but config\.json describes \[384, 128\]",
    lambda s: put(
        s,
        shape=torch.tensor([192, 128]),
        bitmask=lambda b: b[:192].clone(),
        compressed=lambda c: c[:192].clone(),
    ),
)
tensors_kind(
    "bitmask signed",
    S24,
    r"bitmask in .* must be U8 \[384, 16\] .*, got I8 \[384, 16\]",
    lambda s: put(s, bitmask=lambda b: b.view(torch.int8)),
)
tensors_kind(
    "values of integers",
    S24,
    r"compressed in .* must be one of F32, BF16, F16, got I8: sparse weights that are quantised",
    lambda s: put(s, compressed=lambda c: c.to(torch.int8)),
)
tensors_kind(
    "values too few",
    S24,
    r"compressed in .* must be \[384, 64\], half of \[384, 128\], got \[384, 63\]",
    lambda s: put(s, compressed=lambda c: c[:, 1:]),
)
tensors_kind(
    "values in three dimensions",
    S24,
    r"compressed in .* holds \[384, 64, 1\] values",
    lambda s: put(s, compressed=lambda c: c.unsqueeze(2)),
)
tensors_kind(
    "values too many",
    S,
    r"compressed in .* holds \[50000\] values, more than \[384, 128\] has room for",
    lambda s: put(s, compressed=torch.ones(50000)),
)
tensors_kind(
    "bits do not count the values",
    S,
    r"bitmask in .* keeps \d+ values, .*compressed in .* has 100: the file is damaged",
    lambda s: put(s, compressed=lambda c: c[:100]),
)
tensors_kind(
    "offsets of another weight",
    S,
    r"row_offsets in .* must hold one offset for each of 384 rows, got \[3\]",
    lambda s: put(s, row_offsets=torch.zeros(3).long()),
)
tensors_kind(
    "offsets wrong",
    S,
    r"row_offsets in .* is corrupt: row 5 begins at \d+, not 7",
    lambda s: s[f"{UP}.row_offsets"].__setitem__(5, 7),
)
tensors_kind(
    "mask corrupt",
    S24,
    r"bitmask in .* is corrupt: row 2, quad 3 must keep two of four columns, its bits are 0111",
    lambda s: s[f"{UP}.bitmask"].__setitem__((2, 1), 0x73),
)
tensors_kind(
    "words of another type",
    M,
    r"weight_packed in .* must be a matrix of I32, got I64",
    lambda s: put(s, weight_packed=lambda w: w.long()),
)
tensors_kind(
    "words flat",
    M,
    r"weight_packed in .* must be a matrix of I32, got I32 \[3072\]",
    lambda s: put(s, weight_packed=lambda w: w.flatten()),
)
tensors_kind(
    "words empty",
    M,
    r"weight_packed in .* must be a matrix of I32, got I32 \[0, 768\]",
    lambda s: put(s, weight_packed=lambda w: w[:0]),
)
tensors_kind(
    "words of other columns",
    M,
    r"has a scale for each 96 of 96 inputs, config\.json declares groups of \[128\]",
    lambda s: put(s, weight_packed=lambda w: w[1:], meta=lambda m: m[1:]),
)
tensors_kind(
    "words of three bits",
    M,
    r"weight_packed in .* \[4, 576\] beside .*scale_packed in .*: N = 384 rows must be a multiple of 64 and the words",
    lambda s: put(s, weight_packed=lambda w: w[:, :576]),
)
tensors_kind(
    "metadata of another type",
    M,
    r"meta in .* must be a matrix of I16, got I32",
    lambda s: put(s, meta=lambda m: m.int()),
)
tensors_kind(
    "metadata of another shape",
    M,
    r"meta in .* must be \[4, 768\] or \[384, 8\] for a weight \[384, 128\], got \[3, 768\]",
    lambda s: put(s, meta=lambda m: m[1:]),
)
tensors_kind(
    "metadata corrupt",
    M,
    r"meta in .* is corrupt: row \d+, quad \d+ holds 0x0; wanted two positions",
    lambda s: s[f"{UP}.meta"].view(-1).__setitem__(100, 0),
)
tensors_kind(
    "scales of integers",
    M,
    r"scale_packed in .* must be a matrix of F32 or BF16 or F16, got I32",
    lambda s: put(s, scale_packed=lambda x: x.int()),
)
tensors_kind(
    "scales of other rows",
    M,
    r"N = 320 rows must be a multiple of 64 and the words",
    lambda s: put(s, scale_packed=lambda x: x[:, :320]),
)
tensors_kind(
    "scales not finite",
    M,
    r"scale_packed in .* is corrupt: place 3 of group 0 holds nan",
    lambda s: s[f"{UP}.scale_packed"].__setitem__((0, 3), torch.nan),
)
tensors_kind(
    "groups that cut quads",
    M,
    r"scale_packed in .* has 64 groups for 128 inputs: a group must be a whole number of quads",
    lambda s: put(s, scale_packed=torch.ones(64, 384).half()),
)
tensors_kind(
    "groups that do not divide",
    M,
    r"scale_packed in .* has 3 groups for 128 inputs",
    lambda s: put(s, scale_packed=torch.ones(3, 384).half()),
)
tensors_kind(
    "groups of another size than declared",
    M,
    r"has a scale for each 64 of 128 inputs, config\.json declares groups of \[128\]",
    lambda s: put(s, scale_packed=torch.ones(2, 384).half()),
)
config_kind(
    "bits of another number than declared",
    M,
    r"weight_packed in .* has 4-bit integers, config\.json declares \[8\]",
    lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8),
)

# What lissom does not read.
for end, told in {
    "weight_scale": "a scale of quantised weights",
    "weight_zero_point": "a zero point",
    "weight_g_idx": "a group order",
    "input_scale": "a scale of quantised activations",
    "weight_shape": "a shape of pack-quantized",
    "qweight": "integers of GPTQ",
    "weight_scale_inv": "a scale of fp8",
    "absmax": "scales of bitsandbytes",
}.items():
    tensors_kind(
        f"{end} beside it",
        S24,
        rf"self_attn\.{end} in .* is {told}.*; lissom convert reads .*, alone: convert or prune the model",
        lambda state, end=end: state.update({f"model.layers.0.self_attn.{end}": torch.ones(2)}),
    )
tensors_kind(
    "int8 weights beside it",
    S24,
    r"lm_head\.weight in .* is stored as I8, quantised without 2:4",
    lambda s: s.update({"lm_head.weight": s["lm_head.weight"].to(torch.int8)}),
)
tensors_kind(
    "fp8 weights beside it",
    S24,
    r"lm_head\.weight in .* is stored as F8_E4M3, a quantised type",
    lambda s: s.update({"lm_head.weight": s["lm_head.weight"].to(torch.float8_e4m3fn)}),
)
tensors_kind(
    "fp8 values",
    S24,
    r"compressed in .* is stored as F8_E4M3, a quantised type",
    lambda s: put(s, compressed=lambda c: c.to(torch.float8_e4m3fn)),
)
tensors_kind(
    "pack-quantized weights beside it",
    M,
    r"lm_head\.weight_packed in .* is pack-quantized integers",
    lambda s: s.update({"lm_head.weight_packed": torch.zeros(8, 8).int()}),
)
tensors_kind(
    "dense Marlin beside it",
    M,
    r"lm_head\.B in .* is a weight of dense Marlin, without 2:4",
    lambda s: s.update({"lm_head.B": torch.zeros(8, 8).int(), "lm_head.s": torch.ones(1, 8)}),
)
config_kind(
    "GPTQ",
    M,
    r"says 'gptq', integers without 2:4",
    lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}),
)
config_kind(
    "another format than the tensors",
    S24,
    r"config\.json declares sparse-bitmask, but .* belongs to sparse-24-bitmask",
    lambda c: c["quantization_config"]["sparsity_config"].update(format="sparse-bitmask"),
)
tensors_kind(
    "nothing in the format",
    S24,
    r"nothing to convert: config\.json declares sparse-24-bitmask but no tensor is stored so; .* take that entry out",
    lambda s: [s.pop(n) for n in list(s) if n.endswith(("shape", "compressed", "bitmask"))],
)


@pytest.mark.parametrize("name", KINDS)
def test_refused(name, refuse):
    refuse(*KINDS[name])


@pytest.mark.parametrize("form", [S24, S, M])
def test_the_undamaged_folder_is_converted(form, spoil, tmp_path):
    assert len(convert_folder(spoil(form).folder, tmp_path / "new").packed) == 14


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float16"),
        ({"scales": "upside down"}, "scales must be one of auto"),
    ],
)
def test_wrong_arguments(how, message, spoil, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_folder(spoil(M).folder, tmp_path / "new", **how)


def test_workspace_is_left_out_and_said(spoil, tmp_path):
    made = spoil(M)
    made.tensors(lambda state: state.update({f"{UP}.workspace": torch.zeros(16).int()}))
    report = convert_folder(made.folder, tmp_path / "new")
    assert report.notes == ("1 tensors named workspace were left out",)
    assert f"{UP}.workspace" not in load_file(tmp_path / "new" / "model.safetensors")
