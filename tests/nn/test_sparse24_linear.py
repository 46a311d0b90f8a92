# SPDX-License-Identifier: Apache-2.0
"""nn.Sparse24Linear as a layer: what it computes, trains, traces and gives back."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lissom import ops
from lissom.nn import Sparse24Linear
from lissom.testing import random_sparse24


def dense_layer(k: int = 36, n: int = 20, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """An nn.Linear whose weight is 2:4."""
    torch.manual_seed(0)
    layer = nn.Linear(k, n, bias, dtype=dtype)
    layer.weight.data = random_sparse24(n, k, dtype=dtype) + 0.0
    return layer


def x_for(layer: nn.Module, *lead: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*lead, layer.in_features, generator=generator).to(layer.weight.dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_computes_what_the_dense_layer_computes(isa, dtype, bias):
    dense = dense_layer(bias=bias, dtype=dtype)
    layer = Sparse24Linear.from_linear(dense)
    x = x_for(dense, 2, 5)
    torch.testing.assert_close(layer(x), dense(x))
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert torch.equal(layer.to_linear().weight, dense.weight)
    torch.testing.assert_close(layer.to_linear()(x), dense(x))


def test_is_a_linear_with_the_names_of_the_format():
    layer = Sparse24Linear(36, 20)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (36, 20)
    assert dict(layer.state_dict()).keys() == {"weight", "weight_meta", "bias"}
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert Sparse24Linear(36, 20, bias=False).bias is None
    assert "in_features=36, out_features=20, bias=True, pattern=2:4" in repr(layer)


def test_new_layer_is_24_and_as_large_as_nn_linear():
    torch.manual_seed(0)
    w = Sparse24Linear(512, 64).dense_weight()
    assert ops.sparse24_check(w)[0]
    assert w.count_nonzero() == w.numel() // 2
    assert 0 < w.abs().max() <= 512**-0.5


def test_frozen_weight_takes_the_bytes_of_the_packed_form_and_is_visibly_not_dense():
    layer = Sparse24Linear.from_linear(dense_layer())
    assert layer.weight.isnan().all()
    assert layer.weight.untyped_storage().nbytes() == 4
    assert layer.weight_meta is None
    assert layer.weight.shape == (20, 18)
    assert not layer.weight.requires_grad
    wide = Sparse24Linear.from_linear(dense_layer(1024, 1024, bias=False, dtype=torch.bfloat16))
    held = sum(t.untyped_storage().nbytes() for t in (wide.packed, wide.weight))
    assert held < 1024 * 1024 * 2 * 9 / 16 + 100
    with pytest.raises(RuntimeError, match="shape"):
        F.linear(torch.ones(2, 36), layer.weight)


def test_bias_is_shared_not_copied():
    dense = dense_layer()
    layer = Sparse24Linear.from_linear(dense)
    assert layer.bias is dense.bias
    assert layer.to_linear().bias is dense.bias


def test_from_linear_refuses_a_dense_weight_and_can_prune_it():
    dense = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"row 0, quad 0 .*has 4 non-zeros"):
        Sparse24Linear.from_linear(dense)
    layer = Sparse24Linear.from_linear(dense, pattern="magnitude")
    assert ops.sparse24_check(layer.dense_weight())[0]
    with pytest.raises(ValueError, match="multiple of 4"):
        Sparse24Linear.from_linear(nn.Linear(6, 4))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (((6, 4), {}), ValueError),
        (((8, 4), {"dtype": torch.float64}), TypeError),
        (((8, 4), {"dtype": torch.int8}), TypeError),
    ],
)
def test_constructor_refuses(arguments, error):
    with pytest.raises(error, match="Sparse24Linear"):
        Sparse24Linear(*arguments[0], **arguments[1])


def test_train_and_eval_change_nothing_else():
    dense = dense_layer().eval()
    layer = Sparse24Linear.from_linear(dense)
    assert not layer.training
    x = x_for(dense, 3)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert layer.to_linear().training is False


def test_gradient_of_x_and_bias_through_a_frozen_weight():
    dense = dense_layer()
    layer = Sparse24Linear.from_linear(dense_layer())
    grads = []
    for module in (dense, layer):
        x = x_for(dense, 2, 5).requires_grad_()
        module(x).square().sum().backward()
        grads.append((x.grad, module.bias.grad))
    assert layer.weight.grad is None
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("bias", [False, True])
def test_training_keeps_the_mask_and_equals_masked_dense_training(optimizer, bias):
    dense = dense_layer(bias=bias)
    layer = Sparse24Linear.from_linear(dense_layer(bias=bias)).requires_grad_()
    mask = dense.weight != 0
    x, target = x_for(dense, 64), torch.ones(64, 20)
    for module in (dense, layer):
        steps = optimizer(module.parameters(), lr=0.01)
        for _ in range(5):
            steps.zero_grad()
            F.mse_loss(module(x), target).backward()
            if module is dense:
                dense.weight.grad *= mask
            steps.step()
    trained = layer.dense_weight()
    assert not trained[~mask].any()
    assert (trained != Sparse24Linear.from_linear(dense_layer(bias=bias)).dense_weight())[mask].all()
    torch.testing.assert_close(trained, dense.weight.detach(), rtol=1e-4, atol=1e-5)


def test_freezing_after_training_packs_again():
    layer = Sparse24Linear.from_linear(dense_layer()).requires_grad_()
    x = x_for(layer, 3)
    layer(x).sum().backward()
    assert layer.packed is None
    assert not layer.weight.isnan().any()
    with torch.no_grad():
        layer.weight.mul_(2)
        wanted = layer(x)
    layer.requires_grad_(False)
    assert torch.equal(layer(x), wanted)
    assert layer.packed is not None
    assert layer.weight.isnan().all()


def test_autocast():
    layer = Sparse24Linear.from_linear(dense_layer(dtype=torch.bfloat16))
    trained = Sparse24Linear.from_linear(dense_layer(dtype=torch.bfloat16)).requires_grad_()
    x = torch.randn(3, 36)
    with torch.autocast("cpu", torch.bfloat16):
        for module in (layer, trained):
            y = module(x)
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, module(x.bfloat16()))
    with pytest.raises(TypeError, match="cast x"):
        layer(x)


@pytest.mark.parametrize("trainable", [False, True])
def test_compiles_in_one_graph_for_any_number_of_tokens(trainable):
    model = nn.Sequential(Sparse24Linear.from_linear(dense_layer()), nn.ReLU(), Sparse24Linear(20, 12))
    model.requires_grad_(trainable)
    model(x_for(model[0], 2))  # a trainable layer unpacks at its first call
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for m in (5, 2, 33, 64, 7):
        x = x_for(model[0], m)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


def test_compiles_with_inductor():
    layer = Sparse24Linear.from_linear(dense_layer())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.silu(layer(x)) + 1, fullgraph=True, dynamic=True)
    for m in (4, 9):
        x = x_for(layer, m)
        torch.testing.assert_close(compiled(x), F.silu(layer(x)) + 1)


def test_exports_saves_and_loads():
    layer = Sparse24Linear.from_linear(dense_layer())
    shapes = ({0: torch.export.Dim("m", min=1)},)
    program = torch.export.export(layer, (x_for(layer, 4),), dynamic_shapes=shapes)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    again = torch.export.load(stream).module()
    for m in (1, 9):
        assert torch.equal(again(x_for(layer, m)), layer(x_for(layer, m)))


def test_peft_adapts_it():
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `train`)")
    model = nn.Sequential(Sparse24Linear.from_linear(dense_layer()), nn.ReLU(), nn.Linear(20, 4))
    x = x_for(model[0], 3)
    wanted = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    torch.testing.assert_close(adapted(x), wanted)
    adapted(x).sum().backward()
    with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)
