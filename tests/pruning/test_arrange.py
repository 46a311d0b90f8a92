# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import UnsupportedModelError, describe
from lissom.pruning import Options, prune_folder, prune_model

IDS = torch.randint(3, 97, (16, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "mixtral", "mamba"])
def test_permuted_model_is_pruned_with_less_error(family):
    errors = []
    for permute in (False, True):
        model = build_tiny(family)
        inputs = tiny_inputs(family, sequences=16)
        report = prune_model(model, pattern="2:4", data=inputs, permute=permute, strict=False)
        errors.append(sum(layer.relative_error for layer in report.layers) / len(report.layers))
        assert report.permuted == model.config.lissom["permuted"] == permute
        for linear in describe(model).linears():
            if linear.name in {layer.name for layer in report.layers}:
                assert (linear.weight().reshape(-1, 4) == 0).sum(1).ge(2).all()
    assert errors[1] < errors[0]


def test_order_alone_changes_nothing_but_the_order():
    """With n = m nothing is pruned: what is left is the permutation, and the model computes the same."""
    dense, model = build_tiny("llama", dtype=torch.float64), build_tiny("llama", dtype=torch.float64)
    with torch.no_grad():
        before = dense(IDS).logits
    calls = []

    def stop(progress):
        calls.append(progress.name)
        raise KeyboardInterrupt

    options = Options(refit=False)
    with pytest.raises(KeyboardInterrupt):
        prune_model(
            model, pattern="2:4", method="wanda", data=IDS, permute=True, options=options, on_progress=stop,
            include=["model.layers.0.mlp.down_proj"],
        )  # fmt: skip
    # Only down_proj of the first block was pruned; put it back and compare.
    changed = [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, dense.state_dict()[name])
    ]
    assert "model.layers.0.mlp.up_proj.weight" in changed
    kept = model.model.layers[0].mlp
    order = (
        (kept.up_proj.weight[:, None] == dense.model.layers[0].mlp.up_proj.weight[None])
        .all(-1)
        .int()
        .argmax(1)
    )
    with torch.no_grad():
        kept.down_proj.weight.copy_(dense.model.layers[0].mlp.down_proj.weight[:, order])
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-10, atol=1e-12)


def test_resumed_run_keeps_its_order(tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.block == 2:
            raise Stop

    arguments = {"pattern": "2:4", "data": IDS, "permute": True}
    whole = build_tiny("llama")
    prune_model(whole, **arguments)
    with pytest.raises(Stop):
        prune_model(build_tiny("llama"), state_dir=tmp_path, on_progress=stop, **arguments)
    model = build_tiny("llama")
    prune_model(model, state_dir=tmp_path, resume=True, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values()))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"pattern": "50%"}, "permute=True needs one n:m pattern for all layers, got 50%"),
        ({"pattern": {"re:.*mlp.*": "2:4", "re:.*": "4:8"}}, "needs one n:m pattern for all layers"),
        ({"method": "magnitude", "data": None}, "permute=True needs calibration data"),
    ],
)
def test_rejections(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        prune_model(build_tiny("llama"), **{"pattern": "2:4", "data": IDS, "permute": True, **arguments})


def test_models_that_cannot_be_permuted(tmp_path):
    build_tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="needs the whole model in memory"):
        prune_folder(tmp_path / "dense", tmp_path / "out", data=IDS, permute=True)
    assert not (tmp_path / "out").exists()
    model = build_tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    with pytest.raises(UnsupportedModelError, match="prune without permuting"):
        prune_model(model, data=IDS, permute=True, strict=False)
