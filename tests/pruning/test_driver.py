# SPDX-License-Identifier: Apache-2.0
import warnings

import pytest
import torch
from torch import nn

import lissom
from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import FAMILIES, UnsupportedModelError, describe
from lissom.pruning import Options, Reconstruction, plan_prune, prune, prune_model, prune_weight

EXACT = Options(refit="exact")  # conjugate gradients enlarge the last bits in which two runs differ
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt", "gpt2", "bloom")
IDS = torch.randint(3, 97, (10, 24), generator=torch.Generator().manual_seed(0))


def _reference(model, ids, mask=None, **arguments):
    """Block by block with nothing shared: a full forward of the model for every single linear layer."""
    for block in describe(model).blocks:
        grams = {}
        for linear in block.linears:
            seen = []
            handle = linear.module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask)
            handle.remove()
            tokens = seen[0].reshape(-1, seen[0].shape[-1])
            tokens = tokens if mask is None else tokens[mask.bool().flatten()]
            grams[linear.name] = tokens.t() @ tokens
        for linear in block.linears:
            linear.weight().copy_(prune_weight(linear.weight(), grams[linear.name], **arguments))
    return model


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_driver_equals_full_forwards_layer_by_layer(family, method):
    arguments = {"pattern": "2:4", "method": method, "damp": 0.01, "options": EXACT}
    expected = _reference(build_tiny(family, dtype=torch.float64), IDS, **arguments)
    model = build_tiny(family, dtype=torch.float64)
    report = prune_model(model, data=IDS, batch=3, blend=0, **arguments)
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values()):
        torch.testing.assert_close(
            tensor, other, rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )
    for layer, linear in zip(report.layers, describe(model).linears()):
        assert layer.name == linear.name
        assert layer.shape == linear.shape
        assert (linear.weight().reshape(-1, 4) == 0).sum(1).eq(2).all()
        assert layer.sparsity == 0.5
        assert 0 < layer.relative_error < 1


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_padding_does_not_enter(family):
    mask = torch.ones_like(IDS)
    for row in range(len(IDS)):
        mask[row, 24 - row :] = 0
    arguments = {"pattern": "50%", "method": "sparsegpt", "damp": 0.01, "options": EXACT}
    expected = _reference(build_tiny(family, dtype=torch.float64), IDS, mask, **arguments)
    results = []
    for filler in (0, 55):
        ids = torch.where(mask.bool(), IDS, filler)
        model = build_tiny(family, dtype=torch.float64)
        prune_model(model, data={"input_ids": ids, "attention_mask": mask}, batch=4, blend=0, **arguments)
        results.append(_weights(model))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(results[0][name], tensor, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_embeddings_norms_and_head_stay(method, pattern):
    model = build_tiny("gemma3_text", dtype=torch.bfloat16)
    before = _weights(model)
    report = prune_model(model, pattern=pattern, method=method, data=IDS)
    touched = {f"{layer.name}.weight" for layer in report.layers}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == touched
    assert report.touched_parameters == sum(before[name].numel() for name in touched)
    assert report.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.sparsity == pytest.approx(0.5)
    assert "lm_head" in report.left
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values())


def test_sequences_per_forward_do_not_matter():
    results = []
    for batch in (1, 3, 10, None):
        model = build_tiny("llama", dtype=torch.float64)
        prune_model(model, pattern="2:4", method="sparsegpt", data=IDS, batch=batch, options=EXACT)
        results.append(model.state_dict())
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-8, atol=1e-10)


def test_magnitude_needs_no_data():
    model = build_tiny("llama")
    report = prune_model(model, pattern="2:4", method="magnitude")
    assert report.calibration == {}
    assert all(layer.relative_error is None and layer.sparsity == 0.5 for layer in report.layers)
    other = build_tiny("llama")
    with_data = prune_model(other, pattern="2:4", method="magnitude", data=IDS, options=Options(refit=False))
    assert all(layer.relative_error > 0 for layer in with_data.layers)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_dropout_is_off_and_modes_come_back():
    expected = build_tiny("gpt2")
    prune_model(expected, pattern="2:4", method="sparsegpt", data=IDS)
    model = build_tiny("gpt2").train()
    model.transformer.ln_f.eval()
    prune_model(model, pattern="2:4", method="sparsegpt", data=IDS)
    assert model.transformer.h[0].mlp.dropout.training
    assert not model.transformer.ln_f.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values()))


def test_model_still_trains_afterwards():
    model = build_tiny("llama")
    prune_model(model, pattern="2:4", method="sparsegpt", data=IDS)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_include_and_exclude():
    model = build_tiny("llama")
    before = _weights(model)
    report = prune_model(
        model, pattern="2:4", method="sparsegpt", data=IDS, include=["re:.*mlp.*"], exclude=["re:.*down_proj"]
    )
    assert [layer.name.rpartition(".")[2] for layer in report.layers] == ["gate_proj", "up_proj"] * 3
    assert report.left["model.layers.0.mlp.down_proj"] == "excluded"
    assert report.left["model.layers.0.self_attn.q_proj"] == "not included"
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{layer.name}.weight" for layer in report.layers}


def test_blocks_without_work_are_passed_and_later_ones_not_visited():
    seen = []
    model = build_tiny("llama", dtype=torch.float64)
    report = prune_model(
        model,
        pattern="2:4",
        method="sparsegpt",
        data=IDS,
        include=["model.layers.1.mlp.up_proj"],
        on_progress=seen.append,
    )
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert [(p.block, p.blocks, p.name, len(p.layers)) for p in seen] == [
        (1, 2, "model.layers.0", 0),
        (2, 2, "model.layers.1", 1),
    ]
    assert seen[-1].remaining == 0
    assert seen[-1].elapsed > seen[-1].seconds > 0


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_head_is_pruned_when_named(family):
    untied = build_tiny(family, dtype=torch.float64, tie_word_embeddings=False)
    model = build_tiny(family, dtype=torch.float64, tie_word_embeddings=False)
    report = prune_model(
        model, pattern="2:4", method="sparsegpt", data=IDS, include=["lm_head"], damp=0.01, options=EXACT
    )
    assert [layer.name for layer in report.layers] == ["lm_head"]
    seen = []
    untied.lm_head.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        untied(IDS)
    expected = prune_weight(
        untied.lm_head.weight.detach(),
        seen[0].t() @ seen[0],
        pattern="2:4",
        method="sparsegpt",
        options=EXACT,
    )
    torch.testing.assert_close(model.lm_head.weight.detach(), expected, rtol=1e-7, atol=1e-9)


def test_shared_weights_are_refused_or_left():
    def shared():
        model = build_tiny("llama")
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model

    arguments = {"pattern": "2:4", "method": "sparsegpt", "data": IDS}
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj cannot be pruned: its weight is shared with"):
        prune_model(shared(), **arguments)
    report = prune_model(shared(), strict=False, **arguments)
    assert "shared with" in report.left["model.layers.1.mlp.up_proj"]
    assert len(report.layers) == 19
    tied = build_tiny("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head cannot be pruned: its weight is shared with model.embed"):
        prune_model(tied, include=["lm_head"], **arguments)


def test_groups_that_do_not_fit():
    arguments = {"pattern": "2:5", "method": "sparsegpt", "data": IDS}
    with pytest.raises(ValueError, match=r"32 inputs do not divide into groups of 5.*strict=False"):
        prune_model(build_tiny("llama"), **arguments)
    with pytest.raises(ValueError, match="nothing would be pruned"):
        prune_model(build_tiny("llama"), strict=False, **arguments)
    report = prune_model(build_tiny("llama", intermediate_size=50), strict=False, **arguments)
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"down_proj"}


def test_no_sparsity_changes_no_bit():
    model = build_tiny("llama", dtype=torch.bfloat16)
    before = _weights(model)
    for pattern in ("4:4", 0.0):
        report = prune_model(model, pattern=pattern, method="sparsegpt", data=IDS)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert report.sparsity == 0


def test_provenance_is_kept_in_the_config():
    model = build_tiny("llama")
    assert prune(model, pattern="2:4", method="wanda", data=IDS) is model
    kept = model.config.lissom
    assert kept["version"] == lissom.__version__
    assert (kept["pattern"], kept["method"], kept["sparsity"]) == ("2:4", "wanda", 0.5)
    assert kept["calibration"]["samples"] == 10
    assert len(kept["calibration"]["source_sha256"]) == 64
    assert len(kept["layers"]) == 21
    assert '"lissom"' in model.config.to_json_string()


def test_few_tokens_raise_the_damping_aloud():
    data = IDS[:2]  # 48 tokens for 32 and 48 inputs
    results = []
    for damp, sentence in (
        (None, "chosen on held-out ones: damp"),
        (0.1, "fewer than 2 per input"),
        (0.01, "damp=None, would"),
    ):
        model = build_tiny("llama")
        with pytest.warns(UserWarning, match=sentence):
            prune_model(model, pattern="2:4", method="sparsegpt", data=data, damp=damp)
        results.append(model.state_dict()["model.layers.0.self_attn.q_proj.weight"])
    assert not torch.equal(results[1], results[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_model(build_tiny("llama"), pattern="2:4", method="sparsegpt", data=IDS)


def test_overflow_names_the_layer():
    model = build_tiny("llama", dtype=torch.float16)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1e4)
    with pytest.raises(
        ValueError, match=r"model.layers.0.mlp.down_proj: calibration inputs are infinite or NaN"
    ):
        prune_model(model, pattern="2:4", method="sparsegpt", data=IDS)


def test_layer_that_sees_some_tokens_only_is_refused():
    model = build_tiny("llama")
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: whole(x[:, ::2]).repeat_interleave(2, dim=1)
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.gate_proj\S* .* 120 rows where the batch has 240"):
        prune_model(model, pattern="2:4", method="sparsegpt", data=IDS)


def test_model_packed_by_lissom_is_described_but_not_pruned():
    model = build_tiny("llama")
    prune_model(model, pattern="2:4", method="sparsegpt", data=IDS)
    dense = model(IDS).logits
    report = lissom.sparsify(model)
    assert len(report.touched) == 21
    torch.testing.assert_close(model(IDS).logits, dense, rtol=1e-4, atol=1e-4)
    assert [linear.shape for linear in describe(model).linears()][:2] == [(32, 32), (16, 32)]
    with pytest.raises(UnsupportedModelError, match=r"q_proj has no dense weight to read: Sparse24Linear"):
        prune_model(model, pattern="2:4", method="sparsegpt", data=IDS)


def _meta_model():
    with torch.device("meta"):
        return build_tiny("llama")


def _quantised_model():
    model = build_tiny("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def _packed_model():
    model = build_tiny("llama")
    module = model.model.layers[0].mlp.up_proj
    module.weight = nn.Parameter(torch.zeros(48, 16), requires_grad=False)
    return model


@pytest.mark.parametrize(
    "make, sentence",
    [
        (_meta_model, "q_proj is on the meta device"),
        (_quantised_model, "quantised or packed"),
        (_packed_model, "up_proj has no dense weight"),
    ],
)
def test_weights_that_cannot_be_pruned(make, sentence):
    with pytest.raises(UnsupportedModelError, match=sentence):
        prune_model(make(), pattern="2:4", method="sparsegpt", data=IDS)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"data": None}, "'sparsegpt' needs calibration data"),
        ({"data": IDS.float()}, r"LongTensor \[S, T\]"),
        ({"data": IDS[:0]}, r"LongTensor \[S, T\]"),
        ({"data": ["text"]}, "needs the model's tokenizer"),
        ({"data": {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}}, "everything is padding"),
        ({"data": {"input_ids": IDS, "attention_mask": IDS[:1]}}, "must be equally many"),
        ({"resume": True}, "resume=True needs state_dir"),
        ({"damp": -0.1}, r"damp must lie in \[0, 1\]"),
        ({"method": "obs"}, "method must be one of"),
        ({"pattern": "4:2"}, "keeps n of m"),
        ({"include": ["up_proj"]}, "include entry 'up_proj' means none"),
        ({"exclude": ["re:.*"]}, "nothing would be pruned"),
        ({"options": Options(variant="SM")}, "variant 'SM' is a choice within method 'mrp'"),
        ({"options": Options(act_order=True), "method": "wanda"}, "act_order is about .* got method 'wanda'"),
        ({"method": "magnitude", "data": None, "blend": 0.3}, "blend 0.3 .*data=None changes no kept weight"),
        (
            {"method": "wanda", "options": Options(refit=False), "blend": 0.3},
            "blend 0.3 .* method 'wanda' with refit=False changes no kept weight",
        ),
        (
            {"method": "magnitude", "data": None, "reconstruct": Reconstruction()},
            "reconstruct trains .*data=None",
        ),
    ],
)
def test_rejections(arguments, sentence):
    model = build_tiny("llama")
    before = _weights(model)
    with pytest.raises(ValueError, match=sentence):
        prune_model(model, **{"pattern": "2:4", "method": "sparsegpt", "data": IDS, **arguments})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "mrp", "options": Options(variant="SM")},
        {"method": "mrp", "pattern": "50%", "options": Options(variant="SS", act_order=True)},
        {"method": "magnitude", "blend": 0.2},
        {"method": "magnitude", "data": None, "blend": 0.0},
    ],
)
def test_options_that_have_an_effect_are_taken(arguments):
    arguments = {"pattern": "2:4", "data": IDS, **arguments}
    assert prune_model(build_tiny("llama"), **arguments).sparsity == 0.5
    assert plan_prune(build_tiny("llama"), **arguments).touched


def test_a_plan_refuses_what_the_run_refuses():
    with pytest.raises(ValueError, match="variant 'MM' is a choice within method 'mrp'"):
        plan_prune(build_tiny("llama"), pattern="2:4", options=Options(variant="MM"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_and_runs(family):
    model = build_tiny(family)
    inputs = tiny_inputs(family, sequences=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few tokens for an expert
        report = prune_model(model, pattern="2:4", method="alps", data=inputs, batch=3, strict=False)
    refs = {linear.name: linear for linear in describe(model).linears()}
    for layer in report.layers:
        groups = refs[layer.name].weight().reshape(-1, 4)
        assert (groups == 0).sum(1).ge(2).all()
        assert 0 < layer.relative_error < 0.5
    with torch.no_grad():
        out = model(**inputs)
    assert all(torch.isfinite(value).all() for value in out.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("family", PLAIN)
def test_plan_is_what_the_run_does(family):
    with torch.device("meta"):
        empty = build_tiny(family)
    plan = plan_prune(
        empty, pattern="2:4", method="sparsegpt", samples=10, seq_len=24, exclude=[r"re:.*\.1\..*"]
    )
    model = build_tiny(family)
    report = prune_model(model, pattern="2:4", method="sparsegpt", data=IDS, exclude=[r"re:.*\.1\..*"])
    assert plan.touched == [layer.name for layer in report.layers]
    assert plan.left == report.left
    assert plan.touched_parameters == report.touched_parameters
    assert plan.total_parameters == report.total_parameters
    held = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert plan.peak_bytes > held
    assert 0 < plan.estimated_seconds < 60
    assert plan.to_dict()["touched_share"] == plan.touched_share < 1
