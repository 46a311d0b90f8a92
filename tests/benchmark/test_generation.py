# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import lissom
from lissom.assets import TINY_LLAMA as TINY
from lissom.benchmark import generation
from lissom.benchmark.generation import GenerationOptions, PrepackedLinear, attribute
from lissom.nn import Sparse24Linear

QUICK = GenerationOptions(prompt=8, new_tokens=3, rounds=2, threads=1)


@pytest.fixture(scope="module")
def measured():
    return generation.run(TINY, options=QUICK)


def test_all_contenders_are_timed_in_every_round(measured):
    assert [row["name"] for row in measured["variants"]] == ["dense", "onednn", "packed"]
    for row in measured["variants"]:
        assert len(row["samples"]["prefill_seconds"]) == 2
        assert len(row["samples"]["decode_seconds"]) == 4
        assert row["prefill_tokens_per_s"] == pytest.approx(8 / row["prefill_seconds"])
        assert sum(row["decode_shares"].values()) == pytest.approx(1)
        assert all(0 < share < 1 for share in row["decode_shares"].values())


def test_bytes_that_a_step_reads_shrink_as_the_format_says(measured):
    read = {row["name"]: row["weight_bytes"] for row in measured["variants"]}
    assert read["packed"]["linears"] / read["dense"]["linears"] == pytest.approx(9 / 16)
    assert all(read["onednn"][part] == read["dense"][part] for part in ("linears", "lm_head"))
    assert read["dense"]["lm_head"] == 2048 * 192 * 2  # tied with the embedding, counted once


def test_ratios_are_those_of_the_medians(measured):
    rows = {row["name"]: row for row in measured["variants"]}
    for phase in ("prefill", "decode"):
        ratio = rows["onednn"][f"{phase}_seconds"] / rows["packed"][f"{phase}_seconds"]
        assert measured["ratios"][phase]["over_onednn"] == pytest.approx(ratio)
        parts = measured["attribution"][phase]
        assert parts["total"] == pytest.approx(parts["peer_weakness"] * parts["sparsity"])


def test_attribution_takes_the_strongest_dense_peer():
    rows = {
        name: {"decode_seconds": s}
        for name, s in {"dense": 6.0, "onednn": 3.0, "compiled": 4.0, "packed": 2.0}.items()
    }
    assert attribute(rows, "decode") == {
        "total": 3.0, "peer_weakness": 2.0, "sparsity": 1.5, "best_dense": "onednn"
    }  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_prepacked_peer_computes_the_same(bias, dtype, rows):
    linear = nn.Linear(64, 48, bias=bias, dtype=dtype)
    x = torch.randn(2, rows, 64, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(PrepackedLinear(linear)(x), linear(x))


def test_model_given_is_not_changed():
    model = lissom.hf.load_model(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generation.run(model, options=QUICK)
    assert not any(isinstance(m, (Sparse24Linear, PrepackedLinear)) for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_packed_model_gets_its_own_dense_peer():
    model = lissom.hf.load_model(TINY)
    lissom.prune(model, pattern="2:4", method="magnitude")
    lissom.sparsify(model)
    found = generation.run(model, options=QUICK)
    assert [row["name"] for row in found["variants"]] == ["dense", "onednn", "packed"]
    with pytest.raises(ValueError, match="packed already"):
        generation.run(model, packed=TINY, options=QUICK)


def test_a_dense_model_named_packed_is_refused():
    with pytest.raises(ValueError, match="no layer of the packed model is 2:4"):
        generation.run(TINY, packed=TINY, options=QUICK)


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own():
    options = GenerationOptions(prompt=4, new_tokens=2, rounds=1, threads=1, memory=True)
    found = generation.run(TINY, options=options)
    rows = {row["name"]: row["memory"] for row in found["variants"]}
    assert rows["onednn"] is None
    assert rows["dense"]["file_bytes"] == (TINY / "model.safetensors").stat().st_size
    assert found["memory_ratios"]["file_bytes"] == pytest.approx(0.65, abs=0.02)
    for memory in (rows["dense"], rows["packed"]):
        assert memory["loading_peak_bytes"] >= memory["imports_bytes"] > 50e6


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be <= 1024"):
        generation.run(TINY, options=GenerationOptions(prompt=1020, new_tokens=5))
    with pytest.raises(ValueError, match="shape must be one of llama-1b"):
        generation.random_model("llama-2b")


def test_contenders_differ_in_the_packed_layers_only(monkeypatch):
    models = {}
    summary = generation._summary
    monkeypatch.setattr(
        generation,
        "_summary",
        lambda model, variants, options: (
            models.update((v.name, v.model) for v in variants) or summary(model, variants, options)
        ),
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(generation.SHAPES, "small", small)
    generation.run("small", options=QUICK)
    swapped = {
        "onednn": [n for n, m in models["onednn"].named_modules() if isinstance(m, PrepackedLinear)],
        "packed": [n for n, m in models["packed"].named_modules() if isinstance(m, Sparse24Linear)],
    }
    assert swapped["onednn"] == swapped["packed"] != []
    heads = [m.get_output_embeddings() for m in models.values()]
    assert all(type(head) is nn.Linear and head.weight is heads[0].weight for head in heads)
    # F.linear copies the transpose of a weight that requires no gradient, or was made in inference mode.
    assert heads[0].weight.requires_grad
    assert not heads[0].weight.is_inference()
