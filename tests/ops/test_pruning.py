# SPDX-License-Identifier: Apache-2.0
"""The search for an order of columns: every tier against the twin bit for bit, and against what an order must be."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lissom
import lissom.testing
from lissom.ops.pruning import pruning_permute
from lissom.reference import pruning as twin

TIERS = [tier for tier in lissom.testing.tiers() if tier in ("portable", "avx2", "avx512")]
PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (2, 3), (5, 16), (63, 64)]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    lissom.set_cpu_isa(request.param)
    return request.param


def scores(rows: int, columns: int, *, most: int = 255, seed: int = 0) -> torch.Tensor:
    """Columns of different sizes, as channels are; small `most`: many ties."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(columns, generator=generator).mul(0.7).exp()
    values = torch.randn(rows, columns, generator=generator).abs() * sizes * most / 4
    return values.clamp(max=most).to(torch.uint8)


def slow_pruned(levels: torch.Tensor, order: torch.Tensor, kept: int, group: int) -> int:
    """What every group of every row prunes, one by one."""
    lost = 0
    for row in levels.tolist():
        for start in range(0, len(order), group):
            lost += sum(sorted(row[c] for c in order[start : start + group].tolist())[: group - kept])
    return lost


@pytest.mark.parametrize("kept, group", PATTERNS)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 2049])
def test_every_tier_finds_what_the_twin_finds(tier, rows, kept, group):
    columns = group * max(2, 48 // group)
    for most in (255, 3):
        levels = scores(rows, columns, most=most)
        found = pruning_permute(levels, kept, group)
        assert torch.equal(found, twin.permute(levels, kept, group, 100, 2048))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 80),
    groups=st.integers(0, 9),
    pattern=st.sampled_from(PATTERNS[:-1]),
    most=st.sampled_from([0, 1, 2, 255]),
    rounds=st.sampled_from([0, 1, 2, 100]),
    window=st.integers(0, 40),
    seed=st.integers(0, 10**6),
)
def test_properties(rows, groups, pattern, most, rounds, window, seed):
    kept, group = pattern
    levels = scores(rows, groups * group, most=most, seed=seed)
    options = {"rounds": rounds, "window": group + window}
    found = [
        pruning_permute(levels, kept, group, **options) for lissom_tier in TIERS if not _set(lissom_tier)
    ]
    assert all(torch.equal(order, found[0]) for order in found)
    assert torch.equal(found[0], twin.permute(levels, kept, group, rounds, group + window))
    order = found[0]
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(groups * group))
    identity = torch.arange(groups * group)
    assert slow_pruned(levels, order, kept, group) <= slow_pruned(levels, identity, kept, group)
    members = order.view(-1, group)
    assert (members.diff() > 0).all()
    lost = [(-slow_pruned(levels, one, kept, group), int(one[0])) for one in members]
    assert lost == sorted(lost)
    if rounds == 0:
        assert sorted(members.tolist()) == identity.view(-1, group).tolist()


def _set(tier: str) -> None:
    lissom.set_cpu_isa(tier)


@pytest.mark.parametrize("kept, group", [(2, 4), (1, 4), (2, 3), (3, 8)])
def test_no_exchange_of_two_columns_is_left(kept, group):
    levels = scores(19, 4 * group, seed=5)
    order = pruning_permute(levels, kept, group, rounds=1000)
    best = slow_pruned(levels, order, kept, group)
    assert best < slow_pruned(levels, torch.arange(4 * group), kept, group)
    for a, b in itertools.combinations(range(4 * group), 2):
        other = order.clone()
        other[[a, b]] = other[[b, a]]
        assert slow_pruned(levels, other, kept, group) >= best


def test_close_to_the_best_of_all_orders():
    """12 columns make 5775 partitions into groups of four: none keeps much more than what is found."""
    levels = scores(16, 12, seed=2)
    partitions = [
        (first, second, tuple(set(range(12)) - set(first) - set(second)))
        for first in itertools.combinations(range(12), 4)
        for second in itertools.combinations(sorted(set(range(12)) - set(first)), 4)
        if first[0] == 0
    ]
    lost = {p: slow_pruned(levels, torch.tensor([*p[0], *p[1], *p[2]]), 2, 4) for p in partitions}
    found = slow_pruned(levels, pruning_permute(levels, 2, 4), 2, 4)
    assert min(lost.values()) <= found <= sorted(lost.values())[len(lost) // 100]


def test_large_columns_are_spread():
    levels = torch.zeros(5, 32, dtype=torch.uint8)
    levels[:, :16] = 200
    order = pruning_permute(levels, 2, 4)
    assert slow_pruned(levels, order, 2, 4) == 0
    assert ((order.view(-1, 4) < 16).sum(1) == 2).all()


def test_an_order_that_loses_nothing_stays():
    levels = torch.zeros(7, 24, dtype=torch.uint8)
    levels[:, ::2] = 9
    assert pruning_permute(levels, 2, 4).tolist() == list(range(24))


def test_more_rounds_keep_more(tier):
    levels = scores(100, 256, seed=4)
    lost = [
        slow_pruned(levels, pruning_permute(levels, 2, 4, rounds=rounds), 2, 4)
        for rounds in (0, 1, 4, 16, 100)
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.9 * lost[0]


def test_threads_share_the_work_and_nothing_else(tier):
    levels = scores(3000, 512, seed=1)
    torch.set_num_threads(1)
    alone = pruning_permute(levels, 2, 4)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(pruning_permute(levels, 2, 4), alone)


def test_windows_are_searched_by_themselves():
    levels = scores(40, 40, seed=3)
    order = pruning_permute(levels, 2, 4, window=15)  # three windows: 16, 16 and 8 columns
    windows = torch.bucketize(order.view(-1, 4), torch.tensor([16, 32]), right=True)
    assert (windows == windows[:, :1]).all()
    for first, last in ((0, 16), (16, 32), (32, 40)):
        own = first + pruning_permute(levels[:, first:last], 2, 4)
        assert sorted(own.view(-1, 4).tolist()) == sorted(
            order.view(-1, 4)[windows[:, 0] == first // 16].tolist()
        )


def test_sums_do_not_overflow():
    """70000 rows of 255 against 0: distances beyond 2^24, sums of gains beyond 2^25."""
    levels = torch.zeros(70000, 8, dtype=torch.uint8)
    levels[:, :4] = 255
    order = pruning_permute(levels, 2, 4)
    assert ((order.view(-1, 4) < 4).sum(1) == 2).all()


def test_any_layout_is_read_as_it_is():
    levels = scores(50, 32, seed=6)
    wide = torch.full((100, 40), 77, dtype=torch.uint8)
    wide[::2, 4:36] = levels
    wanted = pruning_permute(levels, 2, 4)
    assert torch.equal(pruning_permute(wide[::2, 4:36], 2, 4), wanted)
    assert torch.equal(pruning_permute(levels.t().contiguous().t(), 2, 4), wanted)


LEVELS = torch.zeros(3, 8, dtype=torch.uint8)
CASES = {
    "float": (lambda f: f(LEVELS.float(), 2, 4, 1, 8), TypeError, "must be uint8"),
    "1-D": (lambda f: f(LEVELS[0], 2, 4, 1, 8), ValueError, r"must be \[R, C\].*\[8\]"),
    "kept all": (lambda f: f(LEVELS, 4, 4, 1, 8), ValueError, "1 <= kept < group <= 64; got kept 4, group 4"),
    "kept none": (lambda f: f(LEVELS, 0, 4, 1, 8), ValueError, "got kept 0, group 4"),
    "wide group": (lambda f: f(LEVELS, 2, 65, 1, 80), ValueError, "group 65"),
    "columns": (lambda f: f(LEVELS[:, :6], 2, 4, 1, 8), ValueError, r"groups of 4; got levels \[3, 6\]"),
    "rounds": (lambda f: f(LEVELS, 2, 4, -1, 8), ValueError, "rounds must not be negative; got -1"),
    "window": (lambda f: f(LEVELS, 2, 4, 1, 3), ValueError, "one group of 4; got 3"),
}


@pytest.mark.parametrize("call, error, words", CASES.values(), ids=CASES)
def test_refusals(call, error, words):
    on_meta = lambda levels, *numbers: torch.ops.lissom.pruning_permute(levels.to("meta"), *numbers)  # noqa: E731
    for form in (torch.ops.lissom.pruning_permute, twin.permute, on_meta):
        with pytest.raises(error, match=f"lissom::pruning_permute: .*{words}"):
            call(form)


@pytest.mark.parametrize("rows, columns", [(0, 8), (5, 0), (0, 0), (33, 24)])
def test_opcheck(rows, columns):
    arguments = (scores(rows, columns), 2, 4, 10, 8)
    result = torch.library.opcheck(torch.ops.lissom.pruning_permute, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}
