# SPDX-License-Identifier: Apache-2.0
"""nn.sparsify: which linears are swapped, which are left, and the reasons that it gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lissom
from lissom.nn import Sparse24Linear, sparsify
from lissom.testing import random_sparse24


def linear(k: int = 32, n: int = 32, *, sparse: bool = True, **options: object) -> nn.Linear:
    layer = nn.Linear(k, n, **options)
    if sparse:
        layer.weight.data = random_sparse24(n, k, dtype=layer.weight.dtype)
    return layer


def prune(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = random_sparse24(*module.weight.shape, dtype=module.weight.dtype)


def test_swaps_what_is_24_and_says_what_not(dtype):
    model = nn.Sequential(
        linear(dtype=dtype), nn.ReLU(), linear(sparse=False, dtype=dtype), linear(dtype=dtype)
    )
    before, x = copy.deepcopy(model), torch.randn(3, 32).to(dtype)
    report = sparsify(model)
    assert [type(m).__name__ for m in model] == ["Sparse24Linear", "ReLU", "Linear", "Sparse24Linear"]
    assert report.touched == ["0", "3"]
    assert report.left == [("2", "not 2:4: row 0, quad 0 has more than two non-zeros")]
    assert report.dense_bytes == 2 * 32 * 32 * dtype.itemsize
    assert report.packed_bytes == sum(model[i].packed.numel() for i in (0, 3))
    assert "2 linears swapped, 1 left" in str(report)
    torch.testing.assert_close(model(x), before(x))
    assert lissom.sparsify is sparsify
    again = sparsify(model)
    assert again.touched == []
    assert str(again) == "no linear was swapped; 1 left"


class Doubled(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


def with_hook() -> nn.Linear:
    layer = linear()
    layer.register_forward_hook(lambda module, args, y: y + 1)
    return layer


def parametrized() -> nn.Linear:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


class Mine(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: linear(sparse=False), "not 2:4: row 0, quad 0"),
        (lambda: linear(6, 4, sparse=False), "in_features 6 is not a multiple of 4"),
        (lambda: nn.Linear(32, 4, device="meta"), "meta device"),
        (lambda: nn.Linear(32, 4, dtype=torch.float64), "float64 has no kernel"),
        (lambda: Mine(32, 4), "is a Mine, not a plain nn.Linear"),
        (parametrized, "is a ParametrizedLinear"),
        (with_hook, "has hooks, which a swap would drop"),
    ],
)
def test_reasons(make, reason):
    model = nn.Sequential(make())
    before = model[0]
    report = sparsify(model)
    assert report.touched == []
    assert [name for name, _ in report.left] == ["0"]
    assert reason in report.left[0][1]
    assert model[0] is before


def test_tied_weights_are_left():
    embedding, head = nn.Embedding(32, 32), linear()
    head.weight = embedding.weight
    embedding.weight.data = random_sparse24(32, 32)
    twice = linear()
    holder = nn.Module()
    holder.bare = nn.Parameter(torch.zeros(32, 32))
    bare = linear()
    bare.weight = holder.bare
    model = nn.ModuleDict(
        {"e": embedding, "head": head, "a": twice, "b": twice, "holder": holder, "bare": bare}
    )
    report = sparsify(model)
    assert report.touched == []
    assert {name: reason for name, reason in report.left if "tied" in reason}.keys() == {"head", "a", "bare"}


def test_a_bare_linear_cannot_be_swapped_in_place():
    report = sparsify(linear())
    assert report.touched == []
    assert "from_linear" in report.left[0][1]


def test_include_and_exclude():
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({name: linear() for name in ("up", "down", "gate")})

    assert sparsify(model(), include=["up"]).touched == ["up"]
    assert sparsify(model(), exclude=["up"]).touched == ["down", "gate"]
    report = sparsify(model(), include=["re:.*[tn]e?$"], exclude=["down"])
    assert report.touched == ["gate"]
    assert set(report.left) == {("up", "excluded"), ("down", "excluded")}


def test_a_llama_gives_the_same_logits(tiny_llama):
    dense = tiny_llama()
    prune(dense)
    model = copy.deepcopy(dense)
    report = sparsify(model)
    assert len(report.touched) + len(report.left) == sum(isinstance(m, nn.Linear) for m in dense.modules())
    assert len(report.touched) >= 21
    assert all(isinstance(model.get_submodule(name), Sparse24Linear) for name in report.touched)
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    state = model.state_dict()
    assert state["model.layers.0.mlp.up_proj.weight_meta"].dtype == torch.uint8
    assert not any(t.isnan().any() for t in state.values() if t.is_floating_point())


def test_conv1d_is_swapped_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(48, 64).eval()  # weight [in, out]
    values, meta = lissom.ops.sparse24_compress(conv.weight.detach().t().contiguous(), pattern="magnitude")
    conv.weight.data = lissom.ops.sparse24_decompress(values, meta, 64).t().contiguous()
    model, x = nn.Sequential(conv), torch.randn(3, 64)
    want = model(x)
    assert sparsify(model).touched == ["0"]
    assert isinstance(model[0], Sparse24Linear)
    torch.testing.assert_close(model(x), want)
