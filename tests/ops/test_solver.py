# SPDX-License-Identifier: Apache-2.0
"""The solver operators against slow references in Python and float64, in every tier."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lissom
import lissom.testing
from lissom.ops import solver
from lissom.reference import solver as twin

DTYPES = (torch.float32, torch.float64)
TIERS = [
    tier for tier in lissom.testing.tiers() if tier in ("portable", "avx2", "avx512")
]  # with kernels of their own
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ROUNDING = {torch.float32: 2.0**-22, torch.float64: 2.0**-51}  # of a product and a sum


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    lissom.set_cpu_isa(request.param)
    return request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1, ties: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    return torch.randn(*shape, generator=generator).to(dtype)


def slow_lowest(scores: list[float], count: int, forced: list[bool]) -> set[int]:
    """Places of the lowest scores by a stable sort, forced ones first."""
    order = sorted(range(len(scores)), key=lambda i: (not forced[i], scores[i]))
    return set(order[:count]) | {i for i, given_ in enumerate(forced) if given_}


# --- ADMM ---


def check_admm(x, u, b, rho, rho_next, kept, group, forced=None, *, same: bool = False) -> None:
    """Compares one step with the definition; `same`: the right-hand side goes over x."""
    before = solver.solver_admm_mask(u)
    exact_z = (x + u).double()
    dual = u.clone()
    x_given = x.clone()
    rhs = x_given if same else torch.full_like(x, math.nan)
    changed = solver.solver_admm_step_(x_given, dual, b, rhs, rho, rho_next, kept, group, forced)
    z = exact_z.reshape(-1, group).tolist() if x.numel() else []
    fixed = (torch.zeros_like(x, dtype=torch.bool) if forced is None else forced).reshape(-1, group).tolist()
    marks = torch.zeros(len(z), group, dtype=torch.bool)
    for g, (row, given_) in enumerate(zip(z, fixed)):
        for place in slow_lowest([abs(value) for value in row], group - kept, given_):
            marks[g, place] = True
    marks = marks.view(x.shape)
    assert torch.equal(solver.solver_admm_mask(dual), marks)
    assert changed.item() == (marks != before).sum()
    unit = ROUNDING[x.dtype]
    exact = torch.where(marks, exact_z * rho / rho_next, 0)
    assert ((dual.double() - exact).abs() <= 2 * unit * exact.abs()).all()
    pull = torch.zeros_like(exact_z) if b is None else b.double()
    part = torch.where(marks, -rho * exact_z, rho_next * exact_z)
    assert ((rhs.double() - (pull + part)).abs() <= unit * (pull.abs() + part.abs())).all()


PATTERNS = [
    (2, 4),
    (1, 4),
    (3, 4),
    (1, 2),
    (4, 8),
    (8, 16),
    (5, 16),
    (16, 32),
    (2, 3),
    (5, 7),
    (1, 1),
    (4, 4),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kept, group", PATTERNS)
def test_admm_small_groups(tier, dtype, kept, group, ties):
    """Sizes around a vector and around a unit of work, where whole groups are left over."""
    for groups in (1, 3, 4, 17, 64, 1400):
        shape = (3 if groups < 100 else 1, groups * group)
        x, u, b = (randn(*shape, dtype=dtype, seed=seed, ties=ties) for seed in (1, 2, 3))
        forced = randn(*shape, seed=4) > 0.8
        if groups < 1000:
            check_admm(x, u, b, 0.5, 0.65, kept, group, forced)
            check_admm(x, u, None, 2.0, 1.5, kept, group, same=True)
        else:
            check_admm(x, u, b, 1.0, 1.3, kept, group)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("group", [33, 40, 64, 100, 576, 1531])
def test_admm_long_groups(tier, dtype, group, ties):
    """Groups that are rows: selection, with every count of ties."""
    x, u, b = (randn(4, group, dtype=dtype, seed=seed, ties=ties) for seed in (1, 2, 3))
    forced = randn(4, group, seed=4) > 0.5
    for kept in (0, 1, group // 2, group - 1, group):
        check_admm(x, u, b, 0.5, 0.65, kept, group)
        check_admm(x, u, b, 0.5, 0.65, kept, group, forced, same=True)


# Few values and long ranges: ties, zeros, neighbours in the last bit, denormals, huge ones.
AWKWARD = torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2.0**-23, 3.0, 1e-42, -1e-42, 1e30, -2e-30, 0.1])


@settings(max_examples=200, deadline=None)
@given(
    group=st.integers(1, 80),
    share=st.floats(0, 1),
    shape=st.tuples(st.integers(0, 5), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    tier=st.sampled_from(TIERS),
    seed=st.integers(0, 1 << 30),
)
def test_admm_any_group(group, share, shape, dtype, tier, seed):
    lissom.set_cpu_isa(tier)
    shape, kept = (shape[0], group * shape[1]), round(share * group)
    generator = torch.Generator().manual_seed(seed)
    x, u = (AWKWARD[torch.randint(len(AWKWARD), shape, generator=generator)].to(dtype) for _ in range(2))
    forced = torch.rand(shape, generator=generator) < 0.2
    dual, rhs = u.clone(), torch.empty_like(x)
    solver.solver_admm_step_(x, dual, None, rhs, 1.0, 1.0, kept, group, forced)
    marks = solver.solver_admm_mask(dual).view(-1, group).tolist()
    scores = (x + u).abs().view(-1, group).tolist()
    for row, given_, marked in zip(scores, forced.view(-1, group).tolist(), marks):
        assert {i for i, mark in enumerate(marked) if mark} == slow_lowest(row, group - kept, given_)


def test_admm_mask_given(tier, dtype):
    """A mask chosen elsewhere is forced, with a group that would prune nothing by itself."""
    x, u, b = (randn(5, 37, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    check_admm(x, u, b, 1.0, 2.0, 1, 1, randn(5, 37) > 0)


def test_admm_layer_as_one_row(tier):
    x, u, b = (randn(24, 50, seed=seed) for seed in (1, 2, 3))
    check_admm(x.view(1, -1), u.view(1, -1), b.view(1, -1), 1.0, 1.0, 500, 1200)


def test_admm_counts_dead_inputs_once(tier):
    """An input that is zero for ever is pruned at the first step, and is no change afterwards."""
    x, u = randn(6, 16), torch.zeros(6, 16)
    x[:, 5] = 0
    rhs = torch.empty_like(x)
    first = solver.solver_admm_step_(x, u, None, rhs, 1.0, 1.1, 2, 4)
    assert first == 48
    assert solver.solver_admm_mask(u)[:, 5].all()
    u.masked_fill_(u != 0, 1e-30)  # the same choice again
    x.masked_fill_(~solver.solver_admm_mask(u), 5)
    x.masked_fill_(solver.solver_admm_mask(u), 0)
    assert solver.solver_admm_step_(x, u, None, rhs, 1.0, 1.1, 2, 4) == 0


def test_admm_finds_a_minimum(tier):
    """Twenty steps on a small least-squares problem end in a 2:4 mask, and x agrees with its sparse copy."""
    weight, inputs = randn(8, 16, dtype=torch.float64), randn(16, 64, dtype=torch.float64, seed=2)
    hessian = inputs @ inputs.t()
    b, u = weight @ hessian, torch.zeros_like(weight)
    rhs, rho, settled = b + 0.05 * 64 * weight, 0.05 * 64, []
    for _ in range(40):
        x = torch.linalg.solve(hessian + rho * torch.eye(16), rhs, left=False)
        settled.append(int(solver.solver_admm_step_(x, u, b, rhs, rho, 1.2 * rho, 2, 4)))
        rho *= 1.2
    assert settled[-1] == 0
    pruned = solver.solver_admm_mask(u)
    assert (pruned.view(-1, 4).sum(1) == 2).all()
    assert x[pruned].norm() < 1e-2 * x.norm()


@pytest.mark.parametrize("kept, group", [(2, 4), (3, 5), (1, 1), (700, 1200)])
def test_admm_same_for_any_number_of_threads(tier, kept, group):
    shape = (131, 1200)
    x, u, b = (randn(*shape, seed=seed) for seed in (1, 2, 3))
    forced = randn(*shape, seed=4) > 1
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        dual, rhs = u.clone(), torch.empty_like(x)
        changed = solver.solver_admm_step_(x, dual, b, rhs, 1.0, 1.3, kept, group, forced)
        seen.append((dual, rhs, changed))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other))


@pytest.mark.parametrize("kept, group", [(2, 4), (3, 5), (1, 1), (30, 60)])
def test_admm_twin(tier, dtype, kept, group):
    x, u, b = (randn(7, 60, dtype=dtype, seed=seed, ties=True) for seed in (1, 2, 3))
    forced = randn(7, 60, seed=4) > 1
    duals, rights = (u.clone(), u.clone()), (torch.empty_like(x), torch.empty_like(x))
    ours = solver.solver_admm_step_(x, duals[0], b, rights[0], 1.0, 1.3, kept, group, forced)
    theirs = twin.admm_step_(x, duals[1], b, rights[1], 1.0, 1.3, kept, group, forced)
    assert ours == theirs
    assert torch.equal(solver.solver_admm_mask(duals[0]), twin.admm_mask(duals[1]))
    torch.testing.assert_close(duals[0], duals[1])
    torch.testing.assert_close(rights[0], rights[1])


def admm_samples(dtype: torch.dtype) -> list[tuple]:
    x, u, b, rhs = (randn(3, 40, dtype=dtype, seed=seed) for seed in range(4))
    forced = b > 1
    return [
        (x, u, b, rhs, 1.0, 1.3, 2, 4),
        (x, u, None, rhs, 1.0, 1.3, 20, 40, forced),
        (x[:0], u[:0], b[:0], rhs[:0], 1.0, 1.3, 2, 4, forced[:0]),
    ]


def test_admm_opcheck(dtype):
    operator = torch.ops.lissom.solver_admm_step_.default
    for arguments in admm_samples(dtype):
        result = torch.library.opcheck(operator, arguments, test_utils=CHECKS)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            {"x": torch.ones(3, 40, dtype=torch.bfloat16)},
            TypeError,
            "x must be float32 or float64; got BFloat16",
        ),
        ({"x": torch.ones(40, 3).t()}, ValueError, r"x must be contiguous.*strides"),
        ({"u": torch.zeros(3, 40).double()}, TypeError, "u must be Float; got Double"),
        ({"u": torch.zeros(3, 41)}, ValueError, r"u must be contiguous \[3, 40\]; got \[3, 41\]"),
        ({"b": torch.zeros(40)}, ValueError, r"b must be contiguous \[3, 40\]; got \[40\]"),
        ({"rhs": torch.zeros(40, 3).t()}, ValueError, r"rhs must be contiguous.*strides \[1, 3\]"),
        ({"forced": torch.zeros(3, 40)}, TypeError, "forced must be Bool; got Float"),
        ({"rho": 0.0}, ValueError, "rho and rho_next must be positive; got 0 and 1"),
        ({"rho_next": math.nan}, ValueError, "rho and rho_next must be positive"),
        ({"group": 3}, ValueError, "multiple of group; got kept=2, group=3 and C=40"),
        ({"kept": 5}, ValueError, "kept=5, group=4"),
        ({"kept": -1}, ValueError, "kept=-1"),
        ({"group": 0}, ValueError, "group=0"),
    ],
)
def test_admm_errors(change, error, words):
    arguments = {
        "x": torch.ones(3, 40),
        "u": torch.zeros(3, 40),
        "b": None,
        "rhs": torch.zeros(3, 40),
        "rho": 1.0,
        "rho_next": 1.0,
        "kept": 2,
        "group": 4,
    } | change
    with pytest.raises(error, match=words):
        solver.solver_admm_step_(**arguments)
    with pytest.raises(error, match="solver_admm_step_: "):
        twin.admm_step_(**arguments)


# --- conjugate gradients ---


def pcg_problem(rows: int, columns: int, dtype: torch.dtype, *, condition: float = 30.0):
    """H, wanted right-hand side b, mask, and the state of a start at zero."""
    vectors = torch.linalg.qr(randn(columns, columns, dtype=torch.float64))[0]
    values = torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64)
    h = ((vectors * values) @ vectors.t()).to(dtype)
    pruned = randn(rows, columns, seed=2) > 0
    b = randn(rows, columns, dtype=dtype, seed=3)
    scale = h.diagonal().reciprocal()
    r = b.masked_fill(pruned, 0)
    p = r * scale
    return h, b, pruned, [torch.zeros_like(b), r, p, (r * p).sum(1)], scale


@pytest.mark.parametrize("columns", [1, 3, 16, 17, 37, 64, 100, 200])
def test_pcg_reaches_the_exact_solution(tier, dtype, columns):
    h, b, pruned, (w, r, p, energy), scale = pcg_problem(5, columns, dtype)
    for _ in range(min(columns, 60)):
        norms = solver.solver_pcg_step_(w, r, p, p @ h, energy, scale, pruned)
    unit = torch.finfo(dtype).eps
    assert (norms.sqrt() <= 1e3 * unit * b.norm(dim=1)).all()
    for row in range(5):
        kept = ~pruned[row]
        exact = torch.zeros(columns, dtype=torch.float64)
        exact[kept] = torch.linalg.solve(h.double()[kept][:, kept], b[row].double()[kept])
        assert (w[row].double() - exact).norm() <= 300 * unit * (1 + exact.norm())
        assert (w[row][pruned[row]] == 0).all()


def test_pcg_one_step_in_float64_terms(tier, dtype):
    """Each quantity of one step from its definition, from a state with other numbers than a start has."""
    h, _, pruned, (w, r, p, energy), scale = pcg_problem(7, 83, dtype)
    for _ in range(3):
        solver.solver_pcg_step_(w, r, p, p @ h, energy, scale, pruned)
    q = p @ h
    old = [t.to(torch.float64, copy=True) for t in (w, r, p, q, energy, scale)]
    norms = solver.solver_pcg_step_(w, r, p, q, energy, scale, pruned)
    length = (old[4] / (old[2] * old[3]).sum(1))[:, None]
    exact_w = old[0] + length * old[2]
    exact_r = (old[1] - length * old[3]).masked_fill(pruned, 0)
    after = (exact_r * exact_r * old[5]).sum(1)
    exact_p = exact_r * old[5] + (after / old[4])[:, None] * old[2]
    limits = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
    for got, exact in ((w, exact_w), (r, exact_r), (p, exact_p), (energy, after)):
        torch.testing.assert_close(got.double(), exact, **limits)
    torch.testing.assert_close(norms.double(), exact_r.square().sum(1), **limits)


def test_pcg_leaves_solved_rows_alone(tier, dtype):
    """Zero rows, fully pruned rows, rows without curvature: no NaN, not one bit changes."""
    h, _, pruned, (w, r, p, energy), scale = pcg_problem(6, 40, dtype)
    r[1] = p[1] = energy[1] = 0
    pruned[2] = True
    r[2] = p[2] = energy[2] = 0
    q = p @ h
    q[4] = -q[4]
    w += 1
    before = [t.clone() for t in (w, r, p, energy)]
    norms = solver.solver_pcg_step_(w, r, p, q, energy, scale, pruned)
    for old, new in zip(before, (w, r, p, energy)):
        assert new.isfinite().all()
        assert torch.equal(old[[1, 2, 4]], new[[1, 2, 4]])
        assert not torch.equal(old[[0, 3, 5]], new[[0, 3, 5]])
    assert norms[[1, 2]].tolist() == [0, 0]
    torch.testing.assert_close(norms[4], r[4].square().sum())


def test_pcg_same_for_any_number_of_threads(tier):
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        h, _, pruned, (w, r, p, energy), scale = pcg_problem(301, 230, torch.float32)
        q = (p.double() @ h.double()).float()
        norms = solver.solver_pcg_step_(w, r, p, q, energy, scale, pruned)
        seen.append((w, r, p, energy, norms))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other))


def test_pcg_twin(tier, dtype):
    h, _, pruned, state, scale = pcg_problem(6, 50, dtype)
    state[1][2] = state[2][2] = state[3][2] = 0
    theirs = [t.clone() for t in state]
    for _ in range(2):
        ours_norm = solver.solver_pcg_step_(*state[:3], state[2] @ h, state[3], scale, pruned)
        theirs_norm = twin.pcg_step_(*theirs[:3], theirs[2] @ h, theirs[3], scale, pruned)
    for a, b in zip([*state, ours_norm], [*theirs, theirs_norm]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (0, 0)])
def test_pcg_empty(tier, rows, columns):
    w = torch.zeros(rows, columns)
    norms = solver.solver_pcg_step_(
        w, w.clone(), w.clone(), w.clone(), torch.zeros(rows), torch.ones(columns), w.bool()
    )
    assert norms.tolist() == [0] * rows


def test_pcg_opcheck(dtype):
    h, _, pruned, (w, r, p, energy), scale = pcg_problem(4, 24, dtype)
    operator = torch.ops.lissom.solver_pcg_step_.default
    for rows in (slice(None), slice(0)):
        state = [t[rows].clone() for t in (w, r, p, p @ h, energy)]
        result = torch.library.opcheck(operator, (*state, scale, pruned[rows]), test_utils=CHECKS)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"w": torch.ones(3, 8, dtype=torch.half)}, TypeError, "w must be float32 or float64; got Half"),
        ({"w": torch.ones(24)}, ValueError, r"w must be contiguous \[R, C\]; got \[24\]"),
        ({"w": torch.ones(8, 3).t()}, ValueError, "w must be contiguous.*strides"),
        ({"q": torch.ones(3, 9)}, ValueError, r"q must be contiguous \[3, 8\]; got \[3, 9\]"),
        ({"r": torch.ones(3, 8).double()}, TypeError, "r must be Float; got Double"),
        ({"energy": torch.ones(3, 1)}, ValueError, r"energy must be contiguous \[3\]; got \[3, 1\]"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be contiguous \[8\]; got \[3\]"),
        ({"pruned": torch.ones(3, 8)}, TypeError, "pruned must be Bool"),
    ],
)
def test_pcg_errors(change, error, words):
    tensors = {name: torch.ones(3, 8) for name in "wrpq"}
    tensors |= {
        "energy": torch.ones(3),
        "scale": torch.ones(8),
        "pruned": torch.zeros(3, 8, dtype=torch.bool),
    }
    tensors |= change
    with pytest.raises(error, match=words):
        solver.solver_pcg_step_(**tensors)
    with pytest.raises(error, match="solver_pcg_step_: "):
        twin.pcg_step_(**tensors)
