# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import describe
from lissom.pruning import Options, Reconstruction, prune_model
from lissom.pruning.pattern import Pattern
from lissom.pruning.solver import Moments, prune_group

IDS = torch.randint(3, 97, (10, 24), generator=torch.Generator().manual_seed(0))
EXACT = Options(refit="exact")


def _seen(model, name):
    """What a linear reads in one plain forward pass."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def _spread(apart):
    """The largest token over the median one of its sequence."""
    sizes = apart.square().sum(-1).reshape(len(IDS), -1)
    return (sizes.amax(1) / sizes.median(1).values.clamp_min(1e-300)).max()


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_blended_targets_pair_the_dense_and_the_pruned_stream(blend):
    dense = build_tiny("llama", dtype=torch.float64)
    expected = copy.deepcopy(dense)
    for block in describe(expected).blocks:
        solved = {}
        for linear in block.linears:
            inputs, wanted = _seen(expected, linear.name), _seen(dense, linear.name)
            assert _spread(wanted - inputs) < 100  # no token so far off that it keeps its own target
            moments = Moments(inputs.t() @ inputs, wanted.t() @ inputs, blend)
            (result,) = prune_group(
                [linear.weight()], moments, pattern=Pattern.parse("2:4"), method="sparsegpt", options=EXACT
            )
            solved[linear.name] = result.weight
        for linear in block.linears:
            linear.weight().copy_(solved[linear.name])
    model = build_tiny("llama", dtype=torch.float64)
    arguments = {"pattern": "2:4", "method": "sparsegpt", "damp": 0.01, "options": EXACT}
    prune_model(model, data=IDS, blend=blend, batch=3, **arguments)
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values()):
        torch.testing.assert_close(
            tensor, other, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_pattern_map_splits_layers_that_share_an_input():
    model = build_tiny("llama")
    patterns = {"re:.*q_proj": "2:4", "re:.*k_proj": "dense", "re:.*": "75%"}
    report = prune_model(model, pattern=patterns, data=IDS)
    found = {layer.name.rpartition(".")[2]: (layer.pattern, layer.sparsity) for layer in report.layers}
    assert found["q_proj"] == ("2:4", 0.5)
    assert found["v_proj"] == ("75%", 0.75)
    assert "k_proj" not in found
    assert "model.layers.0.self_attn.k_proj" in report.left


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_experts_with_few_tokens_borrow_from_the_others(family):
    """Five tokens in all: every expert is short, some see none at all."""
    model = build_tiny(family)
    inputs = tiny_inputs(family, sequences=1, length=5)
    with pytest.warns(UserWarning, match=r"experts saw fewer than 2 tokens per input"):
        report = prune_model(model, pattern="2:4", data=inputs, strict=False)
    experts = [layer for layer in report.layers if "expert" in layer.name]
    assert experts
    assert all(layer.sparsity == 0.5 and layer.relative_error is not None for layer in experts)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("reconstruct", [None, Reconstruction(passes=1)])
def test_resumed_run_gives_the_same_bits(tmp_path, reconstruct):
    class Stop(Exception):
        pass

    def stop_at_two(progress):
        if progress.block == 2:
            raise Stop

    arguments = {"pattern": "2:4", "data": IDS, "reconstruct": reconstruct, "batch": 2}
    whole = build_tiny("llama")
    prune_model(whole, **arguments)
    with pytest.raises(Stop):
        prune_model(build_tiny("llama"), state_dir=tmp_path, on_progress=stop_at_two, **arguments)
    model = build_tiny("llama")
    report = prune_model(model, state_dir=tmp_path, resume=True, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values()))
    assert len(report.layers) == 21


def test_unused_dense_stream_is_not_made(monkeypatch):
    from lissom.pruning import sweep

    made = []
    original = sweep.BlockStream
    monkeypatch.setattr(sweep, "BlockStream", lambda *a, **k: made.append(1) or original(*a, **k))
    prune_model(build_tiny("llama"), pattern="2:4", method="wanda", data=IDS, options=Options(refit=False))
    assert len(made) == 1
    prune_model(build_tiny("llama"), pattern="2:4", data=IDS)
    assert len(made) == 3


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "mrp", "alps"])
def test_a_mask_that_is_there_stays_and_counts(method):
    model = build_tiny("llama")
    prune_model(model, pattern="25%", method="wanda", data=IDS, options=Options(scope="row"))
    zeros = {name: tensor == 0 for name, tensor in model.state_dict().items() if tensor.dim() == 2}
    data = None if method == "magnitude" else IDS
    options = Options(scope=None if method in ("magnitude", "sparsegpt", "mrp") else "row")
    report = prune_model(model, pattern="50%", method=method, data=data, preserve_mask=True, options=options)
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert not weight[zeros[f"{layer.name}.weight"]].any()
        assert layer.sparsity == 0.5
        assert (weight == 0).float().mean() >= 0.5


def test_uneven_masks_say_so_and_too_many_zeros_are_refused():
    model = build_tiny("llama")
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).weight.data[:8] = 0
    with pytest.warns(UserWarning, match=rf"{name}: 6\d\.\d% are pruned where 50% was asked for"):
        prune_model(model, pattern="50%", method="wanda", data=IDS, include=[name], preserve_mask=True)
    assert not model.get_submodule(name).weight[:8].any()
    with pytest.raises(ValueError, match="are pruned already and stay so, but pattern 25% prunes only 25%"):
        prune_model(model, pattern="25%", method="wanda", data=IDS, include=[name], preserve_mask=True)
    with pytest.raises(ValueError, match="preserve_mask keeps zeros where they are, permute moves channels"):
        prune_model(model, pattern="2:4", data=IDS, preserve_mask=True, permute=True)
