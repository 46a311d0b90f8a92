# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lissom.pruning.gram import CrossGram, Gram, check_gram, damp_, inverse_factor, matmul_precision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 7, 600])
def test_matrix_is_the_sum_over_all_batches(dtype, columns):
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, n, columns, generator=random).to(dtype) for n in (1, 5, 40)]
    gram = Gram(columns, "layer")
    for batch in batches:
        gram.add(batch.view(-1, columns))
    tokens = torch.cat([batch.view(-1, columns) for batch in batches]).double()
    matrix = gram.matrix(torch.float64)
    # Products of 16-bit values are exact in float32; only the float32 sums over 120 tokens round.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (matrix - tokens.t() @ tokens).abs().max() <= tolerance * matrix.diagonal().max()
    assert torch.equal(matrix, matrix.t())
    assert gram.tokens == len(tokens) == 138


def test_merged_sums_are_those_of_all_tokens():
    first, second = torch.randn(10, 5), torch.randn(20, 5)
    gram, other = Gram(5, "layer"), Gram(5, "layer")
    gram.add(first)
    other.add(second)
    gram.merge(other, 0.5)
    torch.testing.assert_close(gram.matrix(), first.t() @ first + 0.5 * second.t() @ second)
    assert gram.tokens == 20


def test_cross_sum_pairs_the_tokens():
    dense, inputs = torch.randn(2, 30, 7, generator=torch.Generator().manual_seed(0)).unbind()
    cross = CrossGram(7)
    cross.add(dense[:10], inputs[:10])
    cross.add(dense[10:], inputs[10:])
    torch.testing.assert_close(
        cross.matrix(torch.float64), (dense.t() @ inputs).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_inputs_name_the_layer(value):
    gram = Gram(3, "model.layers.7.mlp")
    inputs = torch.randn(4, 3)
    inputs[2, 1] = value
    with pytest.raises(ValueError, match=r"model.layers.7.mlp: calibration inputs are infinite or NaN"):
        gram.add(inputs)


def test_wrong_width_and_no_tokens():
    gram = Gram(3, "layer")
    with pytest.raises(ValueError, match=r"inputs must be \[tokens, 3\], got \[2, 4\]"):
        gram.add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no calibration token"):
        gram.matrix()


def test_float32_statistics_do_not_depend_on_the_users_matmul_setting():
    inputs = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    results = []
    for setting in ("highest", "medium"):
        torch.set_float32_matmul_precision(setting)
        try:
            gram = Gram(48, "layer")
            gram.add(inputs)
            results.append(gram.matrix())
            assert torch.get_float32_matmul_precision() == setting
        finally:
            torch.set_float32_matmul_precision("highest")
    assert torch.equal(*results)


def test_precision_is_restored_after_an_error():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), matmul_precision("bf16"):
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("columns", [1, 2, 50])
def test_factor_of_the_inverse(columns):
    inputs = torch.randn(200, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = inputs.t() @ inputs
    factor = inverse_factor(damp_(gram.clone(), 0.01, "layer"))
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(hessian), rtol=1e-12, atol=1e-16)
    assert torch.equal(factor, factor.triu())
    # diag(U)_j^2 is the corner of the inverse of the trailing matrix: the score that SparseGPT divides by.
    for column in range(columns):
        corner = torch.linalg.inv(hessian[column:, column:])[0, 0]
        torch.testing.assert_close(factor[column, column] ** 2, corner, rtol=1e-10, atol=0.0)


def test_failed_factorisation_raises_the_damping_aloud():
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    with pytest.warns(UserWarning, match=r"layer 3: Cholesky .* damp 0.01; trying 0.1"):
        factor = inverse_factor(damp_(gram.clone(), 0.01, "layer 3"))
    torch.testing.assert_close(factor, inverse_factor(damp_(gram.clone(), 0.1, "layer 3")))


def test_hopeless_matrix_is_an_error_not_an_identity():
    with (
        pytest.warns(UserWarning, match="trying 1"),
        pytest.raises(ValueError, match="not positive definite"),
    ):
        damp_(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.1, "layer")


@pytest.mark.parametrize("columns", [1, 511, 512, 513, 1100])
def test_sums_and_checks_by_panels(columns):
    """Across the borders of panels of 512 columns."""
    random = torch.Generator().manual_seed(0)
    dense, inputs = (torch.randn(20, columns, generator=random, dtype=torch.float64) for _ in range(2))
    cross = CrossGram(columns)
    cross.add(dense[:7], inputs[:7])
    cross.add(dense[7:], inputs[7:])
    torch.testing.assert_close(cross.matrix(torch.float64), dense.t() @ inputs)
    gram = inputs.t() @ inputs
    check_gram(gram, columns, "layer")
    for row, column in {(0, columns - 1), (columns - 1, columns // 2)}:
        if row != column:
            skewed = gram.clone()
            skewed[row, column] += gram.diagonal().max()
            with pytest.raises(ValueError, match="across the diagonal"):
                check_gram(skewed, columns, "layer")
        broken = gram.clone()
        broken[row, column] = float("nan")
        with pytest.raises(ValueError, match="infinite or NaN"):
            check_gram(broken, columns, "layer")
