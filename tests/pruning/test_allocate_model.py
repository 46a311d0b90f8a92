# SPDX-License-Identifier: Apache-2.0
"""Patterns of a whole model, against statistics that hooks collect in one forward pass."""

import pytest
import torch

from lissom.models.stream import BlockStream
from lissom.models.tiny import build_tiny
from lissom.models.walk import describe
from lissom.pruning import Pattern, prune_model, prune_weight
from lissom.pruning.allocate_model import Allocation, _sums, allocate_model
from lissom.pruning.allocation import Budget, LossCurve, allocate, outlier_ratio
from lissom.pruning.costs import kept_weights, layer_bytes, price
from lissom.pruning.selection import select_linears

IDS = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return build_tiny("llama")


def inputs_of(model):
    """What each linear reads in the dense model, [tokens, C] by name."""
    seen = {}
    handles = [
        linear.module.register_forward_pre_hook(
            lambda _, args, name=linear.name: seen.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
        for linear in describe(model).linears()
    ]
    with torch.no_grad():
        model.eval()(IDS)
    for handle in handles:
        handle.remove()
    return seen


def curves_of(model, options):
    seen, curves = inputs_of(model), []
    for linear in describe(model).linears():
        weight, inputs = linear.weight(), seen[linear.name]
        losses = {}
        for option in options:
            pruned = prune_weight(weight, inputs.t() @ inputs, pattern=option, method="wanda")
            losses[option] = (
                (inputs @ (pruned - weight).t()).norm() / (inputs @ weight.t()).norm()
            ).item() ** 2
        curves.append(LossCurve(linear.name, losses))
    return curves


def test_a_share_of_the_weights_goes_where_it_loses_least(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = ["dense", "2:4", "1:4"]
    found = allocate_model(model, Allocation(share=0.45, options=options), data=IDS)
    shapes = {linear.name: linear.shape for linear in describe(model).linears()}
    weights = sum(rows * columns for rows, columns in shapes.values())
    expected = allocate(
        curves_of(model, options[1:]), price(shapes, options, kept_weights), Budget(0.45 * weights)
    )
    assert found.to_dict() == expected.to_dict()
    assert {"2:4", "1:4"} <= set(found.to_dict().values())
    kept = sum(kept_weights(shapes[name], pattern) for name, pattern in found.items())
    assert 0.4 * weights < kept <= 0.45 * weights
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = prune_model(model, pattern=found, method="wanda", data=IDS)
    assert {layer.name: layer.pattern for layer in report.layers} == {
        name: str(pattern) for name, pattern in found.items() if pattern is not None
    }


def test_a_budget_in_bytes_is_kept_and_used(model):
    shapes = {linear.name: linear.shape for linear in describe(model).linears()}
    dense = sum(layer_bytes(shape, None, itemsize=4) for shape in shapes.values())
    found = allocate_model(model, Allocation(budget_bytes=0.8 * dense), data=IDS)
    used = sum(layer_bytes(shapes[name], pattern, itemsize=4) for name, pattern in found.items())
    assert 0.75 * dense < used <= 0.8 * dense
    with pytest.raises(ValueError, match="the least that the layers can cost"):
        allocate_model(model, Allocation(budget_bytes=0.4 * dense), data=IDS)


def test_a_pattern_that_fits_no_layer_is_no_option(model):
    found = allocate_model(model, Allocation(share=0.9, options=["dense", "2:5", "2:4"]), data=IDS)
    assert set(found.to_dict().values()) == {"dense", "2:4"}


def test_excluded_layers_are_left_out_of_account(model):
    found = allocate_model(model, Allocation(share=0.75), data=IDS, exclude=["re:.*mlp.*"])
    assert len(found) == 12
    assert not any("mlp" in name for name in found)


def test_blocks_with_more_outliers_keep_more(model):
    with torch.no_grad():
        # One input of the second block is far larger than the others.
        model.model.layers[1].input_layernorm.weight[3] *= 40
    found = allocate_model(model, Allocation(method="owl", share=0.4, bound=0.05), data=IDS)
    seen, parts = inputs_of(model), describe(model)
    ratios = [
        outlier_ratio([ref.weight().abs() * seen[ref.name].norm(dim=0) for ref in block.linears])
        for block in parts.blocks
    ]
    shares = [float(found.of(f"{block.name}.mlp.up_proj").sparsity) for block in parts.blocks]
    assert sorted(range(3), key=lambda block: ratios[block]) == sorted(
        range(3), key=lambda block: -shares[block]
    )
    assert sum(shares) / 3 == pytest.approx(0.6, abs=1e-5)
    assert max(abs(share - 0.6) for share in shares) == pytest.approx(0.05, abs=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "mamba"])
def test_every_kind_of_linear_takes_part(family):
    found = allocate_model(build_tiny(family), Allocation(share=0.75), data=IDS[:1, :8])
    assert Pattern.parse("2:4") in found.values()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "needs one of share, budget_bytes, budget_seconds, got none"),
        ({"share": 0.5, "budget_bytes": 10}, "got share and budget_bytes"),
        ({"method": "owl", "budget_bytes": 10}, "'owl' needs 'share'"),
        ({"method": "best", "share": 0.5}, "must be 'budget' or 'owl'"),
        ({"share": 1.0}, "a share below 1"),
        ({"budget_seconds": 0.0}, "must be positive"),
        ({"share": 0.5, "options": ["dense"]}, "must hold a pattern"),
        ({"share": 0.5, "options": ["2:4", "half"]}, "'half' is not understood"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Allocation(**given)


def test_experts_are_judged_by_mean_inputs_and_by_their_share_of_the_tokens():
    model = build_tiny("olmoe").eval()
    parts = describe(model)
    selection = select_linears(parts, Pattern.parse("50%"), strict=False)
    tokens = torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(0))
    _, layers = next(_sums(selection, BlockStream(model, parts, {"input_ids": tokens})))
    dense = [layer for layer in layers if layer.linear.expert is None]
    gates = [layer for layer in layers if layer.linear.name.rpartition(".")[0].endswith("gate_up_proj")]
    assert all(layer.share == 1 for layer in dense)
    assert sum(layer.share for layer in gates) == pytest.approx(model.config.num_experts_per_tok, abs=0.05)
    # The norm in front of the experts makes every token's mean square about 1, however few reach an expert.
    assert all(layer.gram.diagonal().mean().item() == pytest.approx(1, rel=0.5) for layer in gates)
