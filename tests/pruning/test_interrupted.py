# SPDX-License-Identifier: Apache-2.0
"""A run that ends early says what became of the model, and names the weight that is to blame."""

import warnings

import pytest
import torch

from lissom.models.tiny import build_tiny
from lissom.pruning import Reconstruction, prune_folder, prune_model

IDS = torch.randint(3, 97, (10, 24), generator=torch.Generator().manual_seed(0))
ARGUMENTS = {"pattern": "2:4", "method": "sparsegpt", "data": IDS}
NAN, INF = float("nan"), float("inf")


def _interrupt(progress):
    raise KeyboardInterrupt


def test_a_model_that_is_partly_pruned_is_told(tmp_path):
    model = build_tiny("llama")
    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match=r"ended early: 7 of 21 layers .* are changed already.*it$"),
    ):
        prune_model(model, **ARGUMENTS, on_progress=_interrupt)
    assert getattr(model.config, "lissom", None) is None
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="with resume=True"):
        prune_model(build_tiny("llama"), **ARGUMENTS, state_dir=tmp_path, on_progress=_interrupt)


def test_experts_count_as_changed():
    model = build_tiny("olmoe")
    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match="layers of the model in memory are"),
    ):
        prune_model(model, **ARGUMENTS, strict=False, on_progress=_interrupt)


def test_a_model_that_is_as_it_was_is_not_told_of(tmp_path):
    build_tiny("llama").save_pretrained(tmp_path / "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt):
            prune_folder(tmp_path / "dense", tmp_path / "out", **ARGUMENTS, on_progress=_interrupt)
        with pytest.raises(ValueError, match="everything is padding"):
            prune_model(
                build_tiny("llama"),
                **{**ARGUMENTS, "data": {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}},
            )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_weight_that_is_not_finite_is_named_instead_of_an_activation(tmp_path, name, value, folder):
    model = build_tiny("llama")
    model.get_parameter(name).data[3] = value
    if folder:
        model.save_pretrained(tmp_path / "dense")
    places = (tmp_path / "dense", tmp_path / "out") if folder else (model,)
    run = prune_folder if folder else prune_model
    with pytest.raises(ValueError, match=f"^{name} holds infinite or NaN values: the model is damaged"):
        run(*places, **ARGUMENTS)
    assert not (tmp_path / "out").exists()


def test_an_output_layer_that_is_left_does_not_matter():
    model = build_tiny("llama")
    model.lm_head.weight.data[5] = NAN
    model.model.layers[0].mlp.up_proj.weight.data[2] = INF
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.up_proj.weight holds"):
        prune_model(model, **ARGUMENTS)
    model.model.layers[0].mlp.up_proj.weight.data[2] = 1
    assert prune_model(model, **ARGUMENTS).sparsity == 0.5


@pytest.mark.parametrize("damp", [None, 0.05])
@pytest.mark.parametrize("reconstruct", [None, Reconstruction(passes=1, learning_rate=1e-4)])
def test_damping_and_reconstruction_are_recorded(damp, reconstruct):
    model = build_tiny("llama")
    prune_model(model, **ARGUMENTS, damp=damp, reconstruct=reconstruct)
    kept = model.config.lissom
    assert kept["damp"] == damp
    wanted = None if reconstruct is None else {"passes": 1, "learning_rate": 1e-4, "sequences": 1}
    assert kept["reconstruct"] == wanted
    assert '"reconstruct"' in model.config.to_json_string()
