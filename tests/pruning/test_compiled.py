# SPDX-License-Identifier: Apache-2.0
"""A model given to `torch.compile`, as a whole or block by block, is pruned as if it were not."""

import pytest
import torch

import lissom
from lissom.models.tiny import build_tiny
from lissom.models.walk import describe
from lissom.pruning import Reconstruction, keep_masks, plan_prune, prune_model

IDS = torch.randint(3, 97, (10, 24), generator=torch.Generator().manual_seed(0))


def _whole(model):
    return torch.compile(model, backend="eager")


def _in_place(model):
    model.compile(backend="eager")
    return model


def _blocks(model):
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return model


def _mlps(model):
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    return model


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [_whole, _in_place, _blocks, _mlps])
@pytest.mark.parametrize("options", [{}, {"reconstruct": Reconstruction(passes=1)}])
def test_a_compiled_model_is_pruned_as_it_is_without(compiled, options):
    arguments = {"pattern": "2:4", "data": IDS, **options}
    plain, model = build_tiny("llama"), compiled(build_tiny("llama"))
    assert not torch.equal(model(IDS[:2]).logits, torch.zeros(()))  # it ran compiled before
    prune_model(plain, **arguments)
    report = prune_model(model, **arguments)
    assert model.config.lissom == plain.config.lissom
    assert [layer.name for layer in report.layers] == plain.config.lissom["layers"]
    for expected, found in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(model(IDS[:2]).logits, plain(IDS[:2]).logits)
    assert keep_masks(model).names == keep_masks(plain).names


@pytest.mark.parametrize("compiled", [_whole, _in_place, _blocks, _mlps])
def test_names_are_those_of_the_model_itself(compiled):
    names = [linear.name for linear in describe(build_tiny("llama")).linears()]
    model = compiled(build_tiny("llama"))
    assert [linear.name for linear in describe(model).linears()] == names
    assert plan_prune(model, pattern="2:4").touched == names
    assert all(linear.shared_with is None for linear in describe(model).linears())


@pytest.mark.parametrize("compiled", [_whole, _blocks])
def test_channels_of_a_compiled_model_are_permuted(compiled):
    arguments = {"pattern": "2:4", "data": IDS, "permute": True}
    plain, model = build_tiny("llama"), compiled(build_tiny("llama"))
    prune_model(plain, **arguments)
    prune_model(model, **arguments)
    for expected, found in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(found, expected)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    from transformers import AutoModelForCausalLM

    model = _whole(build_tiny("llama"))
    prune_model(model, pattern="2:4", method="magnitude")
    lissom.save(model, tmp_path / "out", format="dense")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in model._orig_mod.state_dict().items():
        assert torch.equal(written[name], tensor)
    with pytest.raises(ValueError, match=r"compiled parts, .* put the modules .* back first"):
        lissom.save(_blocks(build_tiny("llama")), tmp_path / "other", format="dense")
