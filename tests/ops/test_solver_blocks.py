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


# --- exact solves on sets ---


def exact_solve(h: torch.Tensor, b: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Row by row in float64, by LU."""
    x = torch.zeros(b.shape, dtype=torch.float64)
    for row, mask in enumerate(chosen):
        x[row, mask] = torch.linalg.solve(h.double()[mask][:, mask], b[row, mask].double())
    return x


def check_solve(h: torch.Tensor, b: torch.Tensor, chosen: torch.Tensor) -> None:
    x, info = solver.solver_masked_solve(h, b, chosen)
    assert info.tolist() == [0] * len(b)
    assert (x[~chosen] == 0).all()
    left = (b.double() - x.double() @ h.double()).masked_fill(~chosen, 0)
    unit = torch.finfo(b.dtype).eps
    size = h.double().norm() * x.double().norm(dim=1) + b.double().norm(dim=1)
    assert (left.norm(dim=1) <= 10 * unit * size).all()  # backward stable
    exact = exact_solve(h, b, chosen)
    condition = torch.linalg.cond(h.double()).item() if len(h) else 1
    assert ((x - exact).norm(dim=1) <= 10 * unit * condition * (exact.norm(dim=1) + 1e-30)).all()


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8, 13, 24, 33, 64, 100, 150])
def test_solve_sets_of_every_size(tier, dtype, columns):
    """Rows from the empty set to all columns, in no order, more than fit a register."""
    h, b = hessian(columns).to(dtype), randn(21, columns, dtype=dtype, seed=2)
    chosen = randn(21, columns, seed=3) > torch.linspace(-3, 3, 21)[torch.randperm(21)][:, None]
    chosen[4], chosen[11] = True, False
    check_solve(h, b, chosen)


@pytest.mark.parametrize("rows", [1, 3, 4, 15, 16, 17, 50])
def test_solve_sets_of_one_size(tier, dtype, rows):
    h, b = hessian(80).to(dtype), randn(rows, 80, dtype=dtype, seed=2)
    chosen = torch.zeros(rows, 80, dtype=torch.bool)
    chosen.view(rows, 20, 4).scatter_(2, randn(rows, 20, 4, seed=3).argsort(-1)[:, :, :2], True)
    check_solve(h, b, chosen)


def test_solve_reads_the_lower_triangle_and_the_set_only(tier):
    h, b = hessian(40).float(), randn(9, 40, seed=2)
    chosen = randn(9, 40, seed=3) > 0
    chosen[:, 7] = False
    expected = solver.solver_masked_solve(h, b, chosen)[0]
    h[7], h[:, 7] = torch.nan, torch.nan
    spoiled = torch.where(torch.ones_like(h).triu(1).bool(), torch.nan, h)
    found, info = solver.solver_masked_solve(spoiled, b.masked_fill(~chosen, torch.nan), chosen)
    assert torch.equal(found, expected)
    assert not info.any()


def test_solve_names_the_rows_that_are_not_definite(tier, dtype):
    """Their neighbours in the registers come out as if they were alone."""
    h, b = hessian(30).to(dtype), randn(20, 30, dtype=dtype, seed=2)
    chosen = randn(20, 30, seed=3) > -1
    for first, second in ((10, 20), (12, 24)):
        h[second], h[:, second] = h[first], h[:, first]
        h[second, second] = h[first, first] * 0.999  # with both, H[S, S] is indefinite
        chosen[:, second], chosen[:, first] = True, False
        chosen[3, first] = True
    chosen[17, 10] = True
    x, info = solver.solver_masked_solve(h, b, chosen)
    assert info.nonzero()[:, 0].tolist() == [3, 17]
    assert info[3] == chosen[3, :21].sum()  # 1 + the place of column 20 in the set
    assert x[[3, 17]][chosen[[3, 17]]].isnan().all()
    assert (x[~chosen] == 0).all()
    good = torch.ones(20, dtype=torch.bool)
    good[[3, 17]] = False
    torch.testing.assert_close(
        x[good].double(), exact_solve(h, b, chosen & good[:, None])[good], rtol=1e-2, atol=1e-3
    )
    theirs, twin_info = twin.masked_solve(h, b, chosen)
    assert torch.equal(info, twin_info)
    assert torch.equal(x.isnan(), theirs.isnan())


def test_solve_same_for_any_number_of_threads(tier):
    h, b = hessian(60).float(), randn(333, 60, seed=2)
    chosen = randn(333, 60, seed=3) > 0.2
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        seen.append(solver.solver_masked_solve(h, b, chosen)[0])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_solve_twin(tier, dtype):
    h, b = hessian(50).to(dtype), randn(25, 50, dtype=dtype, seed=2)
    chosen = randn(25, 50, seed=3) > 0
    for ours, theirs in zip(solver.solver_masked_solve(h, b, chosen), twin.masked_solve(h, b, chosen)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (0, 0)])
def test_solve_empty(tier, rows, columns):
    b = torch.zeros(rows, columns)
    x, info = solver.solver_masked_solve(torch.eye(columns), b, b.bool())
    assert x.shape == (rows, columns)
    assert info.tolist() == [0] * rows


def test_solve_opcheck(dtype):
    operator = torch.ops.lissom.solver_masked_solve.default
    h, b = hessian(12).to(dtype), randn(7, 12, dtype=dtype, seed=2)
    for rows in (7, 0):
        result = torch.library.opcheck(operator, (h, b[:rows], b[:rows] > 0), test_utils=CHECKS)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"b": torch.ones(3, 8).half()}, TypeError, "b must be float32 or float64; got Half"),
        ({"b": torch.ones(8, 3).t()}, ValueError, "b must be contiguous.*strides"),
        ({"b": torch.ones(8)}, ValueError, r"b must be contiguous \[R, C\]; got \[8\]"),
        ({"h": torch.eye(9)}, ValueError, r"h must be .*\[9, 9\]"),
        ({"h": torch.eye(8).double()}, TypeError, "h must be Float; got Double"),
        ({"chosen": torch.ones(3, 8)}, TypeError, "chosen must be Bool; got Float"),
        ({"chosen": torch.ones(1, 8, dtype=torch.bool)}, ValueError, r"chosen must be contiguous \[3, 8\]"),
    ],
)
def test_solve_errors(change, error, words):
    arguments = {
        "h": torch.eye(8),
        "b": torch.ones(3, 8),
        "chosen": torch.ones(3, 8, dtype=torch.bool),
    } | change
    with pytest.raises(error, match=words):
        solver.solver_masked_solve(**arguments)
    with pytest.raises(error, match="solver_masked_solve: "):
        twin.masked_solve(**arguments)
