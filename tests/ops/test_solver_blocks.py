# SPDX-License-Identifier: Apache-2.0
"""The solver operators that work on blocks and small systems, against float64, in every tier."""

from __future__ import annotations

import pytest
import torch

import lissom
import lissom.testing
from lissom.ops import solver
from lissom.reference import solver as twin

DTYPES = (torch.float32, torch.float64)
TIERS = [
    tier for tier in lissom.testing.tiers() if tier in ("portable", "avx2", "avx512")
]  # with own kernels
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    lissom.set_cpu_isa(request.param)
    return request.param


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hessian(columns: int, *, seed: int = 5) -> torch.Tensor:
    """A positive definite H [C, C] in float64 with columns of different sizes."""
    inputs = randn(columns, 2 * columns, dtype=torch.float64, seed=seed)
    inputs *= torch.logspace(0, 1, columns, dtype=torch.float64)[:, None]
    return inputs @ inputs.t() / columns + 0.1 * torch.eye(columns, dtype=torch.float64)


# --- SparseGPT's pass ---


def block_problem(columns: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [B, R] and U [B, B], cut out of a larger factor."""
    wide = torch.linalg.cholesky(torch.linalg.inv(hessian(columns + 8)), upper=True).to(dtype)
    return randn(columns, rows, dtype=dtype, seed=2), wide[4 : columns + 4, 4 : columns + 4]


def check_pass(tile, forced, factor, kept, group) -> None:
    """Redoes the pass in float64 under the mask that came out, and judges every choice on the way."""
    work, pruned = tile.clone(), forced.clone()
    errors = solver.solver_sparsegpt_block_(work, pruned, factor, kept, group)
    exact, u = tile.double(), factor.double()
    room = 1e-4 if tile.dtype == torch.float32 else 1e-11
    limit = (
        room * tile.double().abs().max() * factor.diagonal().double().reciprocal().max()
        if tile.numel()
        else 0
    )
    assert not (forced & ~pruned).any()
    for column in range(len(tile)):
        if column % group == 0:
            part = slice(column, column + group)
            gone = pruned[part]
            wanted = torch.maximum(forced[part].sum(0), torch.tensor(group - kept))
            assert torch.equal(gone.sum(0), wanted)
            scores = (exact[part] / u.diagonal()[part, None]).abs()
            free = gone & ~forced[part]
            worst = scores.masked_fill(~free, -1).amax(0)
            best = scores.masked_fill(gone, torch.inf).amin(0)
            assert (worst <= best + limit).all()
        error = torch.where(pruned[column], exact[column] / u[column, column], 0)
        assert ((errors[column].double() - error).abs() <= limit).all()
        exact[column + 1 :] -= u[column, column + 1 :, None] * error
        assert ((work[column].double() - exact[column].masked_fill(pruned[column], 0)).abs() <= limit).all()
    assert (work[pruned] == 0).all()


@pytest.mark.parametrize("kept, group", [(2, 4), (1, 4), (1, 2), (4, 8), (2, 3), (5, 7), (16, 32), (30, 60)])
@pytest.mark.parametrize("rows", [1, 15, 33, 100])
def test_pass_chooses_and_compensates(tier, dtype, kept, group, rows):
    for groups in (1, 2, 120 // group):
        tile, factor = block_problem(groups * group, rows, dtype)
        check_pass(tile, torch.zeros_like(tile, dtype=torch.bool), factor, kept, group)
        check_pass(tile, randn(*tile.shape, seed=4) > 0.5, factor, kept, group)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 6, 7, 31, 128])
def test_pass_under_a_given_mask(tier, dtype, columns):
    tile, factor = block_problem(columns, 50, dtype)
    mask = randn(*tile.shape, seed=4) > 0
    check_pass(tile, mask, factor, 1, 1)
    check_pass(tile, torch.zeros_like(mask), factor, 1, 1)
    check_pass(tile, torch.ones_like(mask), factor, 1, 1)


def test_pass_among_equals_the_first_goes(tier, dtype):
    """With U = I the scores are the weights; few values make ties certain."""
    tile = torch.randint(-2, 3, (24, 90), generator=torch.Generator().manual_seed(3)).to(dtype)
    for kept, group in ((2, 4), (1, 4), (3, 8), (2, 3)):
        forced = randn(24, 90, seed=4) > 1.2
        pruned = forced.clone()
        solver.solver_sparsegpt_block_(tile.clone(), pruned, torch.eye(24, dtype=dtype), kept, group)
        for row in range(90):
            for start in range(0, 24, group):
                places = range(start, start + group)
                order = sorted(places, key=lambda j: (not forced[j, row], abs(tile[j, row].item())))
                wanted = set(order[: group - kept]) | {j for j in places if forced[j, row]}
                assert {j for j in places if pruned[j, row]} == wanted


def test_pass_block_by_block_is_the_optimal_brain_surgeon(tier):
    """One pruned column at a time, the loss of each is e^2: the sum is the loss of the whole, d H d^T."""
    h = hessian(32)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    start = randn(32, 20, dtype=torch.float64, seed=2)
    weight, pruned = start.clone(), torch.zeros(32, 20, dtype=torch.bool)
    lost = 0.0
    for block in (slice(0, 12), slice(12, 32)):
        errors = solver.solver_sparsegpt_block_(weight[block], pruned[block], factor[block, block], 2, 4)
        weight[block.stop :].addmm_(factor[block, block.stop :].t(), errors, alpha=-1)
        lost += errors.square().sum().item()
    change = weight - start
    assert ((h @ change) * change).sum().item() == pytest.approx(lost, rel=1e-10)


@pytest.mark.parametrize("columns, rows", [(0, 5), (8, 0), (0, 0)])
def test_pass_empty(tier, columns, rows):
    tile = torch.zeros(columns, rows)
    errors = solver.solver_sparsegpt_block_(tile, tile.bool(), torch.eye(columns), 2, 4)
    assert errors.shape == (columns, rows)


def test_pass_same_for_any_number_of_threads(tier):
    tile, factor = block_problem(64, 1000, torch.float32)
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        work, pruned = tile.clone(), torch.zeros_like(tile, dtype=torch.bool)
        errors = solver.solver_sparsegpt_block_(work, pruned, factor, 2, 4)
        seen.append((work, pruned, errors))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other))


@pytest.mark.parametrize("kept, group", [(2, 4), (1, 1), (3, 5)])
def test_pass_twin(tier, dtype, kept, group):
    tile, factor = block_problem(40, 37, dtype)
    forced = randn(40, 37, seed=4) > 0.8
    masks, works = (forced.clone(), forced.clone()), (tile.clone(), tile.clone())
    ours = solver.solver_sparsegpt_block_(works[0], masks[0], factor, kept, group)
    theirs = twin.sparsegpt_block_(works[1], masks[1], factor, kept, group)
    assert torch.equal(*masks)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*works, rtol=1e-4, atol=1e-5)


def test_pass_opcheck(dtype):
    operator = torch.ops.lissom.solver_sparsegpt_block_.default
    tile, factor = block_problem(8, 6, dtype)
    for rows in (6, 0):
        arguments = (tile[:, :rows].clone(), torch.zeros(8, rows, dtype=torch.bool), factor, 2, 4)
        result = torch.library.opcheck(operator, arguments, test_utils=CHECKS)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"tile": torch.ones(8, 5).half()}, TypeError, "tile must be float32 or float64; got Half"),
        ({"tile": torch.ones(5, 8).t()}, ValueError, "tile must be contiguous.*strides"),
        ({"pruned": torch.zeros(8, 6, dtype=torch.bool)}, ValueError, r"pruned must be contiguous \[8, 5\]"),
        ({"pruned": torch.zeros(8, 5)}, TypeError, "pruned must be Bool; got Float"),
        ({"factor": torch.eye(9)}, ValueError, r"factor must be .*\[9, 9\]"),
        ({"factor": torch.eye(8).double()}, TypeError, "factor must be Float; got Double"),
        ({"group": 3}, ValueError, "B a multiple of group; got kept=2, group=3 and B=8"),
    ],
)
def test_pass_errors(change, error, words):
    arguments = {
        "tile": torch.ones(8, 5),
        "pruned": torch.zeros(8, 5, dtype=torch.bool),
        "factor": torch.eye(8),
        "kept": 2,
        "group": 4,
    } | change
    with pytest.raises(error, match=words):
        solver.solver_sparsegpt_block_(**arguments)
    with pytest.raises(error, match="solver_sparsegpt_block_: "):
        twin.sparsegpt_block_(**arguments)
