# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lissom.pruning.shifted import BandedSolve, shifted_solve

PENALTIES = (0.1, 0.35, 1.2)


def _hessian(columns: int, *, tokens: int | None = None, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a few directions that are a thousand times stronger than the rest."""
    random = torch.Generator().manual_seed(seed)
    tokens = 3 * columns if tokens is None else tokens
    inputs = torch.randn(tokens, columns, generator=random, dtype=torch.float64)
    if columns > 2:
        inputs += torch.randn(tokens, 2, generator=random, dtype=torch.float64) @ (
            30 * torch.randn(2, columns, generator=random, dtype=torch.float64)
        )
    gram = inputs.t() @ inputs
    scale = gram.diagonal().clamp_min(1e-30).sqrt()
    return gram / (scale[:, None] * scale)


def _right(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _expected(right: torch.Tensor, hessian: torch.Tensor, rho: float) -> torch.Tensor:
    shifted = hessian + rho * torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.solve(shifted, right.t()).t()


# Below, at and above the width of the band, with and without a last block that is narrower.
@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("rows", [1, 7, 64, 250])
def test_every_penalty_from_one_preparation(rows, columns):
    hessian, right = _hessian(columns), _right(rows, columns)
    solve = shifted_solve(hessian.clone(), rows)
    spare = torch.full_like(right, float("nan"))
    for rho in PENALTIES:
        given = right.clone()
        found, free = solve(given, rho, spare)
        torch.testing.assert_close(found, _expected(right, hessian, rho), rtol=1e-10, atol=1e-10)
        assert {found.data_ptr(), free.data_ptr()} == {given.data_ptr(), spare.data_ptr()}


def test_wide_and_tall_go_different_ways():
    hessian = _hessian(8)
    assert isinstance(shifted_solve(hessian.clone(), rows=8), BandedSolve)
    assert not isinstance(shifted_solve(hessian.clone(), rows=9), BandedSolve)


@pytest.mark.parametrize("band", [1, 2, 5, 16, 100])
def test_band_of_any_width(band):
    hessian, right = _hessian(37), _right(5, 37)
    found, _ = BandedSolve(hessian.clone(), band)(right.clone(), 0.1, torch.empty_like(right))
    torch.testing.assert_close(found, _expected(right, hessian, 0.1), rtol=1e-10, atol=1e-10)


def test_inputs_that_nothing_correlates_with():
    """Dead inputs leave columns that are clear already: reflectors of length zero."""
    hessian = _hessian(200)
    for dead in (slice(3, 4), slice(70, 150), slice(199, 200)):
        hessian[dead] = 0
        hessian[:, dead] = 0
        hessian.diagonal()[dead] = 1
    for given in (hessian, torch.eye(200, dtype=torch.float64)):
        right = _right(5, 200)
        found, _ = BandedSolve(given.clone())(right.clone(), 0.1, torch.empty_like(right))
        torch.testing.assert_close(found, _expected(right, given, 0.1), rtol=1e-10, atol=1e-10)


def test_few_tokens_leave_a_singular_matrix_that_the_shift_repairs():
    hessian, right = _hessian(150, tokens=20), _right(5, 150)
    found, _ = BandedSolve(hessian.clone())(right.clone(), 0.1, torch.empty_like(right))
    torch.testing.assert_close(found, _expected(right, hessian, 0.1), rtol=1e-8, atol=1e-8)


def test_single_precision_is_no_worse_than_by_eigenvectors():
    hessian, right = _hessian(300), _right(40, 300)
    narrow = hessian.float()
    values, vectors = torch.linalg.eigh(narrow)
    usual = ((right.float() @ vectors) / (values + 0.1)) @ vectors.t()
    found, _ = BandedSolve(narrow.clone())(right.float(), 0.1, torch.empty(40, 300))
    expected = _expected(right, hessian, 0.1)
    assert (found - expected).norm() <= (usual - expected).norm()


def test_no_rows():
    hessian = _hessian(70)
    found, _ = shifted_solve(hessian, rows=0)(torch.empty(0, 70).double(), 0.1, torch.empty(0, 70).double())
    assert found.shape == (0, 70)
