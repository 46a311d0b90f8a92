# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.pruning import Options, prune_weight, refit, refit_exactly, stationarity
from lissom.pruning.gram import damp_
from lissom.pruning.solver import blended_target, relative_error


def _slow(target, hessian, pruned):
    """Row by row from the definition: w'_S = (w H)_S inv(H_SS)."""
    out = torch.zeros_like(target)
    for row in range(len(target)):
        kept = ~pruned[row]
        out[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (target[row] @ hessian)[kept])
    return out


@given(st.integers(1, 6), st.integers(1, 24), st.integers(0, 2**16))
@settings(deadline=None, max_examples=60)
def test_both_solvers_find_the_minimum(rows, columns, seed):
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(columns, 3 * columns + 5, generator=random, dtype=torch.float64)
    hessian = inputs @ inputs.t()
    target = torch.randn(rows, columns, generator=random, dtype=torch.float64)
    pruned = torch.rand(rows, columns, generator=random) < torch.rand(rows, 1, generator=random)
    expected = _slow(target, hessian, pruned)
    exact = refit_exactly(target, hessian, pruned)
    torch.testing.assert_close(exact, expected, rtol=1e-8, atol=1e-9)
    close = refit(target, hessian, pruned, tolerance=1e-12, iterations=400)
    torch.testing.assert_close(close, expected, rtol=1e-6, atol=1e-7)
    for found in (exact, close):
        assert (found[pruned] == 0).all()


@pytest.mark.parametrize("pattern", ["2:4", "50%", "70%"])
def test_stationarity(layer, pattern):
    """(W' - W) H vanishes on every kept entry: 1e-12 in float64, 1e-6 in float32."""
    weight, gram = layer(256)
    pruned = prune_weight(weight, gram, pattern=pattern, method="wanda", options=Options(refit=False)) == 0
    hessian = damp_(gram.clone(), 0.01, "layer")
    assert stationarity(refit_exactly(weight, hessian, pruned), weight, hessian, pruned) <= 1e-12
    assert (
        stationarity(refit(weight, hessian, pruned, tolerance=1e-13, iterations=300), weight, hessian, pruned)
        <= 1e-12
    )
    single, narrow = weight.float(), hessian.float()
    for solved in (
        refit_exactly(single, narrow, pruned),
        refit(single, narrow, pruned, tolerance=1e-7, iterations=100),
    ):
        assert stationarity(solved.double(), weight, hessian, pruned) <= 1e-6
    assert stationarity(weight.masked_fill(pruned, 0), weight, hessian, pruned) > 1e-2


def test_ten_iterations_come_within_a_percent(layer):
    weight, gram = layer(512)
    start = prune_weight(weight, gram, pattern="2:4", method="sparsegpt", options=Options(refit=False))
    pruned, hessian = start == 0, damp_(gram.clone(), 0.01, "layer")
    exact = relative_error(weight, refit_exactly(weight, hessian, pruned), gram)
    for iterations, above in ((1, 0.5), (10, 0.01), (20, 1e-3)):
        solved = refit(weight, hessian, pruned, start=start, tolerance=0.0, iterations=iterations)
        assert exact * (1 - 1e-6) <= relative_error(weight, solved, gram) <= exact * (1 + above)


def test_a_row_does_not_depend_on_its_neighbours(layer):
    weight, gram = layer(64, rows=24, tokens=400)
    weight[3:9] *= 1e-3
    weight[11] = 0
    pruned = torch.rand(24, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    hessian = damp_(gram.clone(), 0.01, "layer")
    together = refit(weight, hessian, pruned)
    alone = torch.cat([refit(row[None], hessian, mask[None]) for row, mask in zip(weight, pruned)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-8)
    assert torch.isfinite(together).all()
    assert (together[11] == 0).all()


@pytest.mark.parametrize("keep_all", [True, False])
def test_nothing_or_everything_pruned(layer, keep_all):
    weight, gram = layer(32, rows=4, tokens=100)
    pruned = torch.full_like(weight, not keep_all, dtype=torch.bool)
    for solve in (refit, refit_exactly):
        solved = solve(weight, gram, pruned)
        torch.testing.assert_close(solved, weight if keep_all else torch.zeros_like(weight))
    assert refit(weight[:0], gram, pruned[:0]).shape == (0, 32)
    assert refit_exactly(weight[:0], gram, pruned[:0]).shape == (0, 32)


@pytest.mark.parametrize("blend", [0.3, 1.0])
def test_blended_target_is_the_least_squares_solution(blend):
    """Against lstsq on the stacked residuals of outputs and of the damping."""
    random = torch.Generator().manual_seed(0)
    dense = torch.randn(12, 60, generator=random, dtype=torch.float64)
    inputs = dense + 0.5 * torch.randn(12, 60, generator=random, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=random, dtype=torch.float64)
    damping = 0.7
    root = damping**0.5 * torch.eye(12, dtype=torch.float64)
    wanted = torch.cat([(1 - blend) * weight @ inputs + blend * weight @ dense, weight @ root], dim=1)
    expected = torch.linalg.lstsq(torch.cat([inputs, root], dim=1).t(), wanted.t()).solution.t()
    gram = inputs @ inputs.t()
    hessian = gram + damping * torch.eye(12, dtype=torch.float64)
    found = blended_target(weight, hessian, (dense - inputs) @ inputs.t(), blend)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
