# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lissom.models.tiny import build_tiny
from lissom.models.walk import describe
from lissom.pruning import Reconstruction, prune_model

IDS = torch.randint(3, 97, (16, 24), generator=torch.Generator().manual_seed(0))


def _outputs_error(model, dense):
    with torch.no_grad():
        wanted = dense.model(IDS).last_hidden_state
        return ((model.model(IDS).last_hidden_state - wanted).square().sum() / wanted.square().sum()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstruction_keeps_the_mask_and_lowers_the_error(dtype):
    dense = build_tiny("llama", dtype=dtype)
    errors, masks = [], []
    for reconstruct in (None, Reconstruction(passes=8, learning_rate=2e-2, sequences=4)):
        model = build_tiny("llama", dtype=dtype)
        report = prune_model(model, pattern="2:4", method="wanda", data=IDS, reconstruct=reconstruct)
        errors.append(_outputs_error(model, dense))
        # Later blocks see other inputs and choose other masks.
        masks.append([linear.weight() == 0 for linear in describe(model).blocks[0].linears])
    assert all(torch.equal(*pair) for pair in zip(*masks))
    assert errors[1] < 0.8 * errors[0]
    assert all(block.losses[1] < block.losses[0] for block in report.blocks)


@pytest.mark.parametrize("family", ["gpt2", "opt", "olmoe", "mamba"])
def test_other_kinds_of_weights(family):
    model = build_tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = prune_model(
        model, pattern="50%", method="wanda", data=IDS, strict=False, reconstruct=Reconstruction(passes=1)
    )
    touched = {linear.stored for linear in describe(model).linears() if linear.name in _names(report)}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == touched
    for linear in describe(model).linears():
        if linear.name in _names(report):
            assert (linear.weight() == 0).sum() >= linear.weight().numel() // 2 - linear.shape[0]


def test_experts_that_were_not_chosen_keep_their_bits():
    model = build_tiny("olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = "model.layers.0.mlp.experts.gate_up_proj.0"
    prune_model(
        model,
        pattern="50%",
        method="wanda",
        data=IDS,
        include=[chosen],
        reconstruct=Reconstruction(passes=1, learning_rate=1e-2),
    )
    changed = [name for name, each in model.state_dict().items() if not torch.equal(each, before[name])]
    assert changed == [chosen.rpartition(".")[0]]
    old, new = before[changed[0]], model.state_dict()[changed[0]]
    assert torch.equal(new[1:], old[1:])
    kept = new[0] != 0
    assert kept.sum() <= kept.numel() // 2
    assert (new[0][kept] != old[0][kept]).float().mean() > 0.9


def _names(report):
    return {layer.name for layer in report.layers}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"learning_rate must lie in \(0, 1\), got 0.0"),
        ({"sequences": 0}, "sequences must be at least 1, got 0"),
    ],
)
def test_rejections(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Reconstruction(**arguments)
