# SPDX-License-Identifier: Apache-2.0
"""Numbers of sparse24_linear on every path: shapes, epilogues, strides, extreme values. Gradients, errors, tracing and
memory have files of their own.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import lissom
from lissom import ops
from lissom.reference import sparse24 as twin
from lissom.testing import (
    ACCUMULATION,
    ACTIVATIONS,
    DTYPES,
    exact_linear,
    random_sparse24,
    relative_error,
)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(n: int, k: int, dtype: torch.dtype, *, full: float = 0.9):
    """values, meta, packed of a random weight."""
    values, meta = ops.sparse24_compress(random_sparse24(n, k, dtype=dtype, full=full))
    return values, meta, ops.sparse24_pack(values, meta)


def check(x, values, meta, packed, bias=None, act="none", residual=None, out=None) -> torch.Tensor:
    n, k = values.shape[0], values.shape[1] * 2
    y = ops.sparse24_linear(x, packed, n, k, bias, act, residual, out_dtype=out)
    exact = exact_linear(x, values, meta, bias, act, residual=residual)
    assert y.dtype == (out or x.dtype)
    assert relative_error(y, exact.y, exact.scale) <= ACCUMULATION
    return y


# Whole panels and records, one less and one more, a single row; and every size of the last tile of tokens.
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 48, 80])
def test_tails_of_n(kernel, n):
    check(randn(9, 64, dtype=kernel.dtype), *problem(n, 64, kernel.dtype))


@pytest.mark.parametrize("k", [0, 4, 8, 12, 16, 20, 28, 32, 36, 60, 64, 68, 100])
def test_tails_of_k(kernel, k):
    check(randn(5, k, dtype=kernel.dtype), *problem(20, k, kernel.dtype), randn(20))


@pytest.mark.parametrize(
    "m", [*range(1, 20), 31, 32, 33, 47, 48, 49, 63, 65, 96, 97, 127, 129, 255, 256, 257, 530]
)
def test_numbers_of_tokens(kernel, m):
    check(randn(m, 36, dtype=kernel.dtype), *problem(35, 36, kernel.dtype))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 20, 32), (3, 0, 32), (0, 0, 0), (3, 20, 0), (1, 1, 4), (0, 20, 0)]
)
def test_empty_dimensions(kernel, m, n, k):
    bias = randn(n)
    y = check(
        randn(m, k, dtype=kernel.dtype), *problem(n, k, kernel.dtype), bias, "relu", None, torch.float32
    )
    if k == 0:
        assert torch.equal(y, bias.relu().expand(m, n))


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (0, 3), (2, 1, 3, 2)])
def test_leading_dimensions(isa, dtype, lead):
    y = check(randn(*lead, 36, dtype=dtype), *problem(20, 36, dtype))
    assert y.shape == (*lead, 20)
    assert y.is_contiguous()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("wide", [False, True], ids=["own", "float32"])
def test_epilogue(kernel, act, wide):
    """Every activation with and without bias (either dtype) and residual, in both output dtypes, with a tail of N."""
    form = problem(37, 40, kernel.dtype)
    out = torch.float32 if wide else kernel.dtype
    x = randn(11, 40, dtype=kernel.dtype)
    for bias, residual in itertools.product([None, kernel.dtype, torch.float32], [False, True]):
        check(
            x,
            *form,
            None if bias is None else randn(37, dtype=bias, seed=2),
            act,
            randn(11, 37, dtype=out, seed=3) if residual else None,
            out,
        )


def test_residual_comes_after_the_activation(kernel):
    _, _, packed = problem(16, 32, kernel.dtype)
    x = torch.zeros(2, 32, dtype=kernel.dtype)
    residual = torch.full((2, 16), -3.0, dtype=kernel.dtype)
    assert torch.equal(ops.sparse24_linear(x, packed, 16, 32, None, "relu", residual), residual)


@pytest.mark.parametrize("k", [36, 64])
def test_strides_of_x_and_residual(kernel, k):
    """Rows apart, repeated, overlapping, transposed, unaligned: the values count, never the layout."""
    form = problem(20, k, kernel.dtype)
    wide = randn(12, 2 * k + 3, dtype=kernel.dtype)
    flat = randn(40 * k, dtype=kernel.dtype)
    layouts = {
        "rows apart": wide[:, 1 : k + 1],
        "every other row": randn(24, k, dtype=kernel.dtype)[::2],
        "repeated": wide[:1, :k].expand(12, k),
        "overlapping": flat.as_strided((12, k), (3, 1)),
        "columns apart": wide[:, : 2 * k : 2],
        "transposed": randn(k, 12, dtype=kernel.dtype).t(),
        "unaligned": flat[1 : 12 * k + 1].view(12, k),
        "leading apart": randn(3, 9, k, dtype=kernel.dtype)[:, 1:5],
        "leading swapped": randn(4, 3, k, dtype=kernel.dtype).transpose(0, 1),
        "flipped": randn(12, k, dtype=kernel.dtype).flip(0),
    }
    for name, x in layouts.items():
        lead = x.shape[:-1]
        residual = randn(*lead, 25, dtype=kernel.dtype)[..., 3:23]
        y = check(x, *form, None, "none", residual)
        same = ops.sparse24_linear(x.contiguous(), form[2], 20, k, None, "none", residual.contiguous())
        assert torch.equal(y, same), name
        check(x, *form, None, "none", residual[..., :1].expand(*lead, 20))


@pytest.mark.parametrize("k", [4096, 16384])
def test_accumulation_error_at_the_largest_k(kernel, k):
    values, meta, packed = problem(16, k, kernel.dtype, full=1.0)
    y = check(randn(3, k, dtype=kernel.dtype), values, meta, packed, out=torch.float32)
    assert y.abs().max() > 0.1


def test_a_pruned_position_never_sees_x(kernel):
    """Dense arithmetic gives Inf * 0 = NaN; a pruned weight is not there."""
    w = torch.zeros(20, 64, dtype=kernel.dtype)
    w[:, 2::4], w[:, 3::4] = 1, -2
    packed = ops.sparse24_pack(*ops.sparse24_compress(w))
    clean = randn(40, 64, dtype=kernel.dtype)
    x = clean.clone()
    x[0, 0], x[3, 33], x[17, 12], x[39, 61] = math.inf, math.nan, -math.inf, math.nan
    y = ops.sparse24_linear(x, packed, 20, 64)
    assert y.isfinite().all()
    assert torch.equal(y[1:3], ops.sparse24_linear(clean, packed, 20, 64)[1:3])
    assert F.linear(x.float(), w.float()).isnan().any()


def test_non_finite_values_travel_as_ieee_says(kernel):
    values, meta, packed = problem(20, 64, kernel.dtype, full=1.0)
    x = randn(20, 64, dtype=kernel.dtype)
    x[2, 5], x[4, 40], x[4, 41], x[19, 63] = math.inf, math.inf, -math.inf, math.nan
    y = check(x, values, meta, packed)
    assert y[2].isinf().any()
    assert y[19].isnan().any()
    values[3, 7], values[19, 31] = math.inf, math.nan
    y = check(randn(20, 64, dtype=kernel.dtype), values, meta, ops.sparse24_pack(values, meta))
    assert y[:, 3].isinf().all()
    assert y[:, 19].isnan().all()


def test_a_filler_is_kept_and_sees_x(kernel):
    """A quad with one non-zero stores an explicit zero beside it: there Inf gives NaN, as in dense arithmetic."""
    w = torch.zeros(16, 32, dtype=kernel.dtype)
    w[:, 0] = 1  # kept positions of the first quad: 0, 3
    packed = ops.sparse24_pack(*ops.sparse24_compress(w))
    x = torch.ones(2, 32, dtype=kernel.dtype)
    x[0, 3], x[1, 1] = math.inf, math.inf
    y = ops.sparse24_linear(x, packed, 16, 32)
    assert y[0].isnan().all()
    assert (y[1] == 1).all()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_over_the_whole_range(isa, dtype, act):
    """Against float64; where that overflows or is undefined, so do we: silu(-Inf) is NaN, as in torch."""
    points = torch.cat(
        (torch.linspace(-110, 110, 881), torch.tensor([-0.0, 1e-30, -1e-30, 3e4, -3e4, 3e38, -3e38]))
    )
    points = torch.cat((points, torch.tensor([math.inf, -math.inf, math.nan])))
    n = len(points)
    packed = ops.sparse24_pack(torch.zeros(n, 2, dtype=dtype), torch.full((n, 1), 0xE, dtype=torch.uint8))
    x = torch.ones(1, 4, dtype=dtype)
    y = ops.sparse24_linear(x, packed, n, 4, points, act, out_dtype=torch.float32)[0]
    exact = exact_linear(x, torch.zeros(n, 2), torch.full((n, 1), 0xE, dtype=torch.uint8), points, act)
    wanted = exact.y[0]
    wanted[(points.abs() > 1e38) & points.isfinite()] = y[(points.abs() > 1e38) & points.isfinite()].double()
    assert relative_error(y, wanted, points.double().abs().nan_to_num(1, posinf=1)) <= ACCUMULATION
    huge = y[n - 5 : n - 3]
    assert huge[0] == points[n - 5]
    assert huge[1] in ((points[n - 4],) if act == "none" else (0,))


def test_output_overflow_becomes_infinity(isa):
    values, meta = (
        torch.full((16, 2), 200.0, dtype=torch.float16),
        torch.full((16, 1), 0xE, dtype=torch.uint8),
    )
    packed = ops.sparse24_pack(values, meta)
    x = torch.tensor([[0, 0, 200, 200], [0, 0, -200, -200], [0, 0, 163, 164]], dtype=torch.float16)
    y = ops.sparse24_linear(x, packed, 16, 4)
    assert y[:, 0].tolist() == [math.inf, -math.inf, 65408.0]
    assert ops.sparse24_linear(x, packed, 16, 4, out_dtype=torch.float32)[:, 0].tolist() == [
        80000,
        -80000,
        65400,
    ]


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_rounding_to_16_bits_is_to_nearest_even(isa, out):
    """All results of a one-term product, bit for bit as torch rounds: ties, subnormals, overflow, tails."""
    generator = torch.Generator().manual_seed(5)
    bias = torch.randint(-(2**31), 2**31, (4003,), generator=generator, dtype=torch.int64).to(torch.int32)
    bias[::3] &= ~0x7FFF  # ties for bfloat16
    bias[1::3] &= ~0xFFF  # ties for float16
    small = torch.rand(4003, generator=generator).mul(1e-7).view(torch.int32)
    bias = torch.cat((bias, small, torch.linspace(65400, 65600, 401).view(torch.int32))).view(torch.float32)
    bias = bias[bias.isfinite()]
    n = len(bias)
    packed = ops.sparse24_pack(torch.zeros(n, 2, dtype=out), torch.full((n, 1), 0xE, dtype=torch.uint8))
    y = ops.sparse24_linear(torch.zeros(1, 4, dtype=out), packed, n, 4, bias)[0]
    assert torch.equal(y, bias.to(out))


def test_denormals(kernel):
    """Float math keeps them; the bf16 dot and tile instructions count them as zero (documented)."""
    values, meta = torch.zeros(16, 16, dtype=kernel.dtype), torch.full((16, 4), 0xEE, dtype=torch.uint8)
    tiny = torch.finfo(kernel.dtype).smallest_normal / 4
    values[:, 0] = tiny
    packed = ops.sparse24_pack(values, meta)
    x = torch.zeros(3, 32, dtype=kernel.dtype)
    x[:, 2] = 1
    y = ops.sparse24_linear(x, packed, 16, 32, out_dtype=torch.float32)
    flushed = kernel.path in ("permuted-dot", "tiles")
    assert (y == (0.0 if flushed else tiny)).all()


def test_twin_and_kernels_agree(kernel):
    values, meta, packed = problem(37, 76, kernel.dtype)
    x, bias = randn(4, 5, 76, dtype=kernel.dtype), randn(37)
    residual = randn(4, 5, 37, dtype=kernel.dtype)
    ours = ops.sparse24_linear(x, packed, 37, 76, bias, "gelu", residual)
    theirs = twin.linear(x, packed, 37, 76, bias, "gelu", residual)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        ops.sparse24_linear_values(x, values, meta, bias), twin.linear_values(x, values, meta, bias)
    )


def test_repeats_bit_for_bit(kernel):
    form = problem(200, 256, kernel.dtype)
    x = randn(70, 256, dtype=kernel.dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        first = check(x, *form)
        for _ in range(3):
            assert torch.equal(ops.sparse24_linear(x, form[2], 200, 256), first)


def test_linear_values_is_linear(isa, dtype):
    values, meta, packed = problem(37, 76, dtype)
    x, bias = randn(9, 76, dtype=dtype), randn(37, dtype=dtype)
    assert torch.equal(
        ops.sparse24_linear_values(x, values, meta, bias), ops.sparse24_linear(x, packed, 37, 76, bias)
    )


def test_every_dtype_chooses_a_path_for_any_m(isa):
    for dtype, m in itertools.product(DTYPES, [1, 15, 16, 48, 1 << 40]):
        assert lissom._C.path_name(str(dtype).removeprefix("torch."), m) in lissom.testing.paths(isa, dtype)
