# SPDX-License-Identifier: Apache-2.0
"""Gradients of the sparse24 products: linear, linear_values, sparse24_grad_input, sparse24_mask_mm and decompress."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lissom import ops
from lissom.reference import sparse24 as twin
from lissom.testing import ACCUMULATION, ACTIVATIONS, ROUNDING, random_sparse24, relative_error


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return t.requires_grad_()


def form(n: int, k: int, dtype: torch.dtype = torch.float32):
    values, meta = ops.sparse24_compress(random_sparse24(n, k, dtype=dtype, full=0.9))
    return values, meta, ops.sparse24_pack(values, meta)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_linear(dtype, act):
    values, meta, packed = form(36, 40, dtype)
    x, bias, residual = leaf(2, 5, 40, dtype=dtype), leaf(36, seed=2), leaf(2, 5, 36, dtype=dtype, seed=3)
    dy = leaf(2, 5, 36, dtype=dtype, seed=4).detach()
    got = torch.autograd.grad(
        ops.sparse24_linear(x, packed, 36, 40, bias, act, residual), [x, bias, residual], dy
    )
    leaves = [t.detach().double().requires_grad_() for t in (x, bias, residual)]
    w = ops.sparse24_decompress(values, meta, 40).double()
    y = twin.activate(F.linear(leaves[0], w, leaves[1]), act) + leaves[2]
    wanted = torch.autograd.grad(y, leaves, dy.double())
    for ours, exact, source in zip(got, wanted, (x, bias, residual), strict=True):
        assert ours.dtype == source.dtype
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 + 4 * 2 * ROUNDING[dtype])


@pytest.mark.parametrize("wanted", range(8))
def test_linear_values_computes_only_what_is_asked(wanted, monkeypatch):
    """Each subset of x, values, bias: right gradients, and no operator runs for one that nobody wants."""
    values, meta, _ = form(20, 36)
    x, bias = leaf(7, 36).detach(), leaf(20, seed=2).detach()
    inputs = [x, values.clone(), bias]
    chosen = [t.requires_grad_() for i, t in enumerate(inputs) if wanted >> i & 1]
    called = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = ops.sparse24_linear_values(inputs[0], inputs[1], meta, inputs[2])
        if chosen:
            y.sum().backward()
    called = {event.name for event in profile.events()}
    assert y.requires_grad == bool(chosen)
    assert ("lissom::sparse24_grad_input" in called) == bool(wanted & 1)
    assert ("lissom::sparse24_mask_mm" in called) == bool(wanted & 2)
    w = ops.sparse24_decompress(values, meta, 36)
    columns = twin.positions(meta, 36)
    exact = [w.sum(0).expand(7, 36), x.detach().sum(0)[columns], torch.full((20,), 7.0)]
    for i, t in enumerate(inputs):
        if wanted >> i & 1:
            torch.testing.assert_close(t.grad, exact[i])
        else:
            assert t.grad is None


def test_without_bias():
    """Trailing arguments left out must not shift the gradients of the others."""
    values, meta, packed = form(20, 36)
    x, trained = leaf(7, 36), values.clone().requires_grad_()
    ops.sparse24_linear_values(x, trained, meta).sum().backward()
    assert trained.grad.shape == values.shape
    torch.testing.assert_close(x.grad, ops.sparse24_decompress(values, meta, 36).sum(0).expand(7, 36))
    residual = leaf(7, 20, seed=3)
    ops.sparse24_linear(x.detach(), packed, 20, 36, None, "none", residual).sum().backward()
    assert (residual.grad == 1).all()


@pytest.mark.parametrize(("m", "n", "k"), [(0, 20, 36), (3, 0, 36), (3, 20, 0), (1, 1, 4), (3, 600, 36)])
def test_sampled_and_dense_products(dtype, m, n, k):
    values, meta, packed = form(n, k, dtype)
    w = ops.sparse24_decompress(values, meta, k).double()
    x, dy = leaf(m, k, dtype=dtype).detach(), leaf(m, n, dtype=dtype, seed=2).detach()
    exact, scale = dy.double() @ w, dy.double().abs() @ w.abs()
    dx = ops.sparse24_grad_input(dy, packed, n, k)
    assert dx.dtype == dtype
    assert relative_error(dx, exact, scale, roundings=2) <= ACCUMULATION
    columns = twin.positions(meta, k)
    exact = (dy.double().t() @ x.double()).gather(1, columns)
    scale = (dy.double().t().abs() @ x.double().abs()).gather(1, columns)
    sampled = ops.sparse24_mask_mm(dy, x, meta)
    assert sampled.dtype == dtype
    assert relative_error(sampled, exact, scale, roundings=2) <= ACCUMULATION


def test_parts_of_a_float16_gradient_may_overflow():
    w = torch.zeros(600, 32, dtype=torch.float16)
    w[:300, 0], w[300:, 0] = 1, -1
    packed = ops.sparse24_pack(*ops.sparse24_compress(w))
    dy = torch.full((1, 600), 300.0, dtype=torch.float16)  # parts of 256 rows give 76800
    assert not ops.sparse24_grad_input(dy, packed, 600, 32).any()


def test_strided_gradients():
    values, meta, packed = form(20, 36)
    dy = leaf(20, 9, seed=5).detach().t()
    x = leaf(9, 40).detach()[:, 2:38]
    torch.testing.assert_close(
        ops.sparse24_grad_input(dy, packed, 20, 36), ops.sparse24_grad_input(dy.contiguous(), packed, 20, 36)
    )
    torch.testing.assert_close(
        ops.sparse24_mask_mm(dy, x, meta), ops.sparse24_mask_mm(dy.contiguous(), x.contiguous(), meta)
    )
    # sum() hands a zero-stride gradient to backward
    leaf_x = leaf(9, 36)
    ops.sparse24_linear(leaf_x, packed, 20, 36).sum().backward()
    torch.testing.assert_close(leaf_x.grad, ops.sparse24_decompress(values, meta, 36).sum(0).expand(9, 36))


def test_decompress_is_differentiable_and_compress_says_that_it_is_not():
    values, meta, _ = form(20, 36)
    trained = values.clone().requires_grad_()
    (ops.sparse24_decompress(trained, meta, 36) ** 2).sum().backward()
    torch.testing.assert_close(trained.grad, 2 * values)
    dense = leaf(20, 36)
    kept, _ = ops.sparse24_compress(dense, pattern="magnitude")
    with pytest.raises(RuntimeError, match=r"sparse24_compress: no gradient .* w\.detach\(\)"):
        kept.sum().backward()


@pytest.mark.parametrize("trainable", [False, True])
def test_double_backward_is_refused(trainable):
    values, meta, packed = form(20, 36)
    x = leaf(3, 36)
    y = (
        ops.sparse24_linear_values(x, values.clone().requires_grad_(), meta)
        if trainable
        else ops.sparse24_linear(x, packed, 20, 36)
    )
    (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


def test_gradients_by_finite_differences():
    """fp32 has too few digits for gradcheck, but y is linear in all three: one difference is exact to rounding."""
    values, meta, _ = form(16, 32)
    inputs = [leaf(4, 32), values.clone().requires_grad_(), leaf(16, seed=2)]
    dy = leaf(4, 16, seed=3).detach()

    def f(x, v, b):
        return (ops.sparse24_linear_values(x, v, meta, b) * dy).sum()

    grads = torch.autograd.grad(f(*inputs), inputs)
    for i, gradient in enumerate(grads):
        step = [leaf(*t.shape, seed=9).detach() * (j == i) for j, t in enumerate(inputs)]
        with torch.no_grad():
            up = f(*[t + s for t, s in zip(inputs, step, strict=True)])
            down = f(*[t - s for t, s in zip(inputs, step, strict=True)])
        torch.testing.assert_close((up - down) / 2, (gradient * step[i]).sum(), rtol=1e-4, atol=1e-4)
