# SPDX-License-Identifier: Apache-2.0
"""int8 through the CUDA host without a GPU: sparse24_linear_int8 and the forms, over the stand-in."""

from __future__ import annotations

import pytest
import torch
from test_sparse24_host import cuda, kernels, library  # noqa: F401  (fixtures)

from lissom import ops
from lissom.reference import sparse24 as twin
from lissom.reference import sparse24_int8 as twin_int8

# ruff: noqa: F811


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def problem(n: int, k: int):
    values, meta = twin.compress(draw(n, k, seed=3), pattern="magnitude")
    return values, meta, twin.pack(values, meta, "sm80-v1")


def powers(*shape: int) -> torch.Tensor:
    """Scales whose products with small integers are exact."""
    return 2.0 ** -torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("n", "k"), [(0, 8), (20, 36), (33, 128), (3, 0), (40, 260)])
def test_forms(cuda, n, k):
    values, meta, packed = problem(n, k)
    w = twin.decompress(values, meta, k)
    assert all(map(torch.equal, cuda.sparse24_compress(w), (values, meta)))
    assert cuda.sparse24_check(w).tolist() == [1, -1, -1]
    assert torch.equal(cuda.sparse24_decompress(values, meta, k), w)
    dense = draw(n, k)
    largest = cuda.sparse24_compress(dense, pattern="magnitude")
    assert all(map(torch.equal, largest, ops.sparse24_compress(dense, pattern="magnitude")))
    assert torch.equal(cuda.sparse24_pack(values, meta), packed)
    assert all(map(torch.equal, cuda.sparse24_unpack(packed, n, k, dtype=torch.int8), (values, meta)))


LAYOUTS = {
    "whole": lambda m, k: draw(m, k),
    "rows apart": lambda m, k: draw(m, 2 * k + 3)[:, 1 : k + 1],
    "transposed": lambda m, k: draw(k, m).t(),
    "one row for all": lambda m, k: draw(1, k).expand(m, k),
    "leading": lambda m, k: draw(m, 2, k).transpose(0, 1),
    "unaligned": lambda m, k: draw(m * k + 1)[1:].view(m, k),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 20, 132), (3, 33, 36), (20, 40, 132)])
def test_linear(cuda, layout, m, n, k):
    """Bit for bit the twin: sums, scales, bias and residual are exact here."""
    values, meta, packed = problem(n, k)
    x, native = LAYOUTS[layout](m, k), twin.pack(values, meta)
    lead = x.shape[:-1]
    scale_x, scale_w = powers(*lead), powers(2 * n)[::2]
    bias = torch.arange(float(n)) - 7
    for terms, out in (
        ((None, "none", None), None),
        ((bias, "relu", None), torch.bfloat16),
        ((bias.half(), "none", torch.ones(*lead, n + 5).half()[..., 2 : n + 2]), torch.float16),
        ((bias, "none", torch.ones(*lead, n)), torch.float32),
    ):
        y = cuda.sparse24_linear_int8(x, scale_x, packed, scale_w, n, k, *terms, out_dtype=out)
        wanted = twin_int8.linear_int8(x, scale_x, native, scale_w, n, k, *terms, out_dtype=out)
        assert y.dtype == wanted.dtype == (out or torch.float32)
        assert y.is_contiguous()
        assert torch.equal(y, wanted)
    started = " ".join(kernels())
    assert "sparse24_gemm" in started
    assert "gemv" not in started  # there is none for int8


def test_the_cpu_has_the_same_bits(cuda):
    """Any scales: both round the sum, the product of the scales, and what they make together with the bias."""
    n, k = 40, 132
    values, meta, packed = problem(n, k)
    x, generator = draw(20, k), torch.Generator().manual_seed(4)
    scale_x, scale_w, bias = (torch.rand(size, generator=generator) for size in (20, n, n))
    for terms in ((None,), (bias,), (bias, "relu")):
        y = cuda.sparse24_linear_int8(x, scale_x, packed, scale_w, n, k, *terms)
        native = ops.sparse24_linear_int8(x, scale_x, twin.pack(values, meta), scale_w, n, k, *terms)
        assert torch.equal(y, native)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 20, 32), (3, 0, 32), (3, 20, 0), (9, 20, 0), (0, 0, 0)])
def test_nothing_to_do(cuda, m, n, k):
    packed, bias = problem(n, k)[2], torch.arange(float(n))
    y = cuda.sparse24_linear_int8(draw(m, k), torch.ones(m), packed, torch.ones(n), n, k, bias)
    assert torch.equal(y, bias.expand(m, n))


def test_long_k_is_divided(cuda):
    """Parts of k in int32, added by the second kernel."""
    m, n, k = 5, 33, 16388
    values, meta, packed = problem(n, k)
    x = draw(m, k)
    y = cuda.sparse24_linear_int8(x, torch.ones(m), packed, torch.ones(n), n, k)
    assert torch.equal(y.double(), x.double() @ twin.decompress(values, meta, k).double().t())
    assert any("reduce" in name for name in kernels()), kernels()


VALUES, META, PACKED = problem(20, 36)
X, ONES = draw(3, 36), torch.ones(3)
SCALE_W = torch.ones(20)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": X.float()}, TypeError, "x must be int8"),
        ({"scale_x": ONES[:2]}, ValueError, r"leading shape of x, \[3\]; got \[2\]"),
        ({"scale_w": SCALE_W[1:]}, ValueError, r"scale_w must be \[N=20\]"),
        ({"scale_w": SCALE_W.half()}, TypeError, "must be float32"),
        ({"packed": PACKED[:-16]}, RuntimeError, r"of float16, \d+ of int8\); got \d+ bytes"),
        ({"packed": ops.sparse24_pack(VALUES, META)}, RuntimeError, "packed again on the device"),
        (
            {"packed": ops.sparse24_pack(VALUES.half(), META, "sm80-v1")},
            TypeError,
            "packed must hold an int8 weight; got Half",
        ),
        ({"act": "swish"}, ValueError, "none, relu, gelu"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
        ({"bias": SCALE_W.half()}, TypeError, "bias must be float32 or y's dtype"),
    ],
)
def test_refusal(cuda, change, error, words):
    right = {"x": X, "scale_x": ONES, "packed": PACKED, "scale_w": SCALE_W, "N": 20, "K": 36}
    with pytest.raises(error, match=rf"^lissom::sparse24_linear_int8: (.|\n)*{words}"):
        cuda.sparse24_linear_int8(**right | change)
    assert kernels() == []


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.sparse24_linear(X, PACKED, 20, 36),
        lambda o: o.sparse24_linear_values(X, VALUES, META),
        lambda o: o.sparse24_grad_input(torch.ones(3, 20).half(), PACKED, 20, 36),
        lambda o: o.sparse24_mask_mm(draw(3, 20), X, META),
    ],
)
def test_operators_of_floats_say_no(cuda, call):
    with pytest.raises(TypeError, match=r"^lissom::sparse24_\w+: (.|\n)*(int8|Char)"):
        call(cuda)
    assert kernels() == []
