# SPDX-License-Identifier: Apache-2.0
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.pruning.pattern import (
    Pattern,
    check_frozen,
    mark,
    mark_group,
    mark_groups,
    mark_lowest,
    mark_tile,
)


@pytest.mark.parametrize(
    "spec, sparsity, kept, group, text",
    [
        ("2:4", Fraction(1, 2), 2, 4, "2:4"),
        ("1:4", Fraction(3, 4), 1, 4, "1:4"),  # n is what stays, as hardware counts
        ("4:8", Fraction(1, 2), 4, 8, "4:8"),
        ("4:4", Fraction(0), 4, 4, "4:4"),
        ("50%", Fraction(1, 2), None, None, "50%"),
        ("29%", Fraction(29, 100), None, None, "29%"),
        (0.29, Fraction(29, 100), None, None, "29%"),
        ("0.7", Fraction(7, 10), None, None, "70%"),
        (0, Fraction(0), None, None, "0%"),
        ("1/3", Fraction(1, 3), None, None, "1/3"),  # no decimal of percents is exact
        ("68.1234567%", Fraction(681234567, 10**9), None, None, "68.1234567%"),
        ("2:4+70%", Fraction(7, 10), 2, 4, "2:4+70%"),
        ("2:4 + 0.625", Fraction(5, 8), 2, 4, "2:4+62.5%"),
        ("1:3+2/3", Fraction(2, 3), 1, 3, "1:3"),  # exactly what 1:3 prunes: nothing is raised
        ("2:4t", Fraction(1, 2), 2, 4, "2:4t"),
        ("2:4t+75%", Fraction(3, 4), 2, 4, "2:4t+75%"),
    ],
)
def test_parse(spec, sparsity, kept, group, text):
    pattern = Pattern.parse(spec)
    assert (pattern.sparsity, pattern.kept, pattern.group) == (sparsity, kept, group)
    assert str(pattern) == text
    assert Pattern.parse(pattern) is pattern
    assert Pattern.parse(text) == pattern
    assert pattern.transposable == ("t" in text)
    assert pattern.raised == ("+" in text)


@pytest.mark.parametrize(
    "spec",
    ["5:4", "-1:4", "0:4", "0:0", "1:-4", 1, 1.0, 50, -0.1, "100%", "-1%", "half", "2:4:8", ""],
)
def test_what_cannot_be_a_pattern(spec):
    with pytest.raises(ValueError, match="pattern"):
        Pattern.parse(spec)


@pytest.mark.parametrize("spec", ["2:4+", "2:4+100%", "2:4+x", "2:4x", "2:8t", "5:4t", "50%+70%"])
def test_what_cannot_be_a_pattern_of_two_stages(spec):
    with pytest.raises(ValueError, match="pattern"):
        Pattern.parse(spec)


def test_raising_cannot_lower():
    with pytest.raises(ValueError, match=r"'2:4\+40%': 2:4 alone prunes 50%"):
        Pattern.parse("2:4+40%")


@given(st.fractions(0, 1, max_denominator=10**6).filter(lambda share: share < 1))
def test_text_reads_back(share):
    for pattern in (Pattern(share), Pattern(Fraction(1, 2) + share / 2, 2, 4)):
        assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "specs, fits",
    [("2:4 1:4 1:2 2:8 2:4+70% 2:4t", True), ("3:4 4:8 3:8 1:3 2:6 2:2 1:1 50%", False)],
)
def test_what_the_packed_form_can_hold(specs, fits):
    for spec in specs.split():
        assert Pattern.parse(spec).fits_quads == fits, spec


def test_obstacles():
    pattern = Pattern.parse("2:4")
    assert pattern.obstacle(8) is None
    assert pattern.obstacle(8, 3) is None
    assert "10 inputs do not divide into groups of 4" in pattern.obstacle(10)
    assert "6 outputs do not divide into groups of 4" in Pattern.parse("2:4t").obstacle(8, 6)
    assert Pattern.parse("50%").obstacle(7, 5) is None


@pytest.mark.parametrize("spec", [None, True, [2, 4]])
def test_wrong_types(spec):
    with pytest.raises(TypeError, match="pattern must be text"):
        Pattern.parse(spec)


def test_count_has_no_rounding_error():
    assert Pattern.parse(0.29).count(100) == 29  # the float product is 28.999999999999996
    assert Pattern.parse("70%").count(10) == 7
    assert Pattern.parse("50%").count(7) == 3


def _stable(scores, count):
    marks = torch.zeros_like(scores, dtype=torch.bool)
    return marks.scatter_(-1, scores.sort(dim=-1, stable=True).indices[..., :count], True)


@given(st.data())
def test_lowest_are_those_of_a_stable_sort(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    values = st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0, float("inf")])
    scores = torch.tensor(data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns)))
    scores = scores.view(rows, columns)
    count = data.draw(st.integers(0, columns))
    assert torch.equal(mark_lowest(scores, count), _stable(scores, count))


@given(st.data())
def test_groups_are_those_of_a_stable_sort(data):
    group = data.draw(st.integers(1, 8))
    kept = data.draw(st.integers(1, group))
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    size = rows * groups * group
    values = st.sampled_from([-1.0, 0.0, 1.0, 2.0])
    scores = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))).view(rows, -1)
    marks = mark_groups(scores, Pattern.parse(f"{kept}:{group}"))
    expected = _stable(scores.view(rows, groups, group), group - kept).view(rows, -1)
    assert torch.equal(marks, expected)


@pytest.mark.parametrize("scope", ["row", "block", "layer"])
@pytest.mark.parametrize("share", ["50%", "33%", "0%", "99%"])
@pytest.mark.parametrize("constant", [True, False])
def test_counts_are_exact_for_each_stacked_layer(scope, share, constant):
    random = torch.Generator().manual_seed(0)
    scores = torch.zeros(12, 37) if constant else torch.rand(12, 37, generator=random)
    pattern = Pattern.parse(share)
    marks = mark(scores, pattern, scope=scope, rows=(5, 7), block=16)
    if scope == "row":
        assert (marks.sum(1) == pattern.count(37)).all()
    else:
        assert marks[:5].sum() == pattern.count(5 * 37)
        assert marks[5:].sum() == pattern.count(7 * 37)


def test_blocks_share_the_pruning_evenly():
    scores = torch.arange(8 * 64, dtype=torch.float32).view(8, 64).t().reshape(8, 64)
    marks = mark(scores, Pattern.parse("50%"), scope="block", rows=(8,), block=16)
    assert marks.view(8, 4, 16).sum((0, 2)).tolist() == [64] * 4


SCOPES = ["row", "block", "layer"]


def _case(data, *, group=1):
    """Scores with many ties, stacked layers and a random set of frozen entries."""
    rows = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    columns = group * data.draw(st.integers(1, 6))
    size = sum(rows) * columns
    values = st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0, float("inf")])
    scores = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))).view(-1, columns)
    frozen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(-1, columns)
    return scores, tuple(rows), frozen


@given(st.data())
def test_frozen_entries_go_first(data):
    scores, _, frozen = _case(data)
    count = data.draw(st.integers(0, scores.shape[1]))
    marks = mark_lowest(scores, count, frozen=frozen)
    for row, held, marked in zip(scores, frozen, marks):
        # Reference: all frozen ones, then a stable sort of the others.
        order = [i for i in range(len(row)) if held[i]]
        rest = sorted((i for i in range(len(row)) if not held[i]), key=lambda i: row[i].item())
        expected = set(order) | set((order + rest)[:count])
        assert set(marked.nonzero().flatten().tolist()) == expected


@given(st.data())
def test_frozen_groups(data):
    group = data.draw(st.integers(1, 6))
    pattern = Pattern(Fraction(0), data.draw(st.integers(1, group)), group)
    scores, _, frozen = _case(data, group=group)
    marks = mark_groups(scores, pattern, frozen=frozen)
    expected = mark_lowest(
        scores.reshape(-1, group), pattern.pruned_per_group, frozen=frozen.reshape(-1, group)
    ).view_as(scores)
    assert torch.equal(marks, expected)
    columns_first = mark_group(
        scores.reshape(-1, group).t(), pattern.pruned_per_group, frozen=frozen.reshape(-1, group).t()
    )
    assert torch.equal(columns_first.t().reshape(scores.shape), expected)


@given(st.data())
def test_two_stages_are_exact(data):
    group = data.draw(st.integers(2, 5))
    kept = data.draw(st.integers(1, group))
    share = data.draw(st.fractions(Fraction(group - kept, group), Fraction(39, 40), max_denominator=40))
    pattern = Pattern(share, kept, group)
    scope = data.draw(st.sampled_from(SCOPES))
    scores, rows, _ = _case(data, group=group)
    columns = scores.shape[1]
    marks = mark(scores, pattern, scope=scope, rows=rows, block=data.draw(st.integers(1, 16)))
    first = mark_groups(scores, pattern)
    assert (marks | first).equal(marks), "n:m comes first and is never reopened"
    if scope == "row":
        assert (marks.sum(1) == pattern.count(columns)).all()
    for part in marks.split(rows):
        wanted = len(part) * pattern.count(columns) if scope == "row" else pattern.count(part.numel())
        assert part.sum() == wanted
    if scope == "layer":
        for part, before, score in zip(marks.split(rows), first.split(rows), scores.split(rows)):
            added, spared = score[part & ~before], score[~part]
            assert not len(added) or not len(spared) or added.max() <= spared.min()


@given(st.data())
def test_frozen_is_a_part_of_every_mark(data):
    spec = data.draw(st.sampled_from(["50%", "30%", "0%", "2:4", "1:4", "2:4+70%", "2:4t", "2:4t+70%"]))
    pattern = Pattern.parse(spec)
    scope = data.draw(st.sampled_from(SCOPES))
    scores, rows, frozen = _case(data, group=4)
    scores = scores.repeat_interleave(4, 0)
    frozen = frozen.repeat_interleave(4, 0)
    rows = tuple(4 * count for count in rows)
    marks = mark(scores, pattern, scope=scope, rows=rows, block=8, frozen=frozen)
    assert (marks | frozen).equal(marks)
    free = torch.zeros_like(frozen)
    assert mark(scores, pattern, scope=scope, rows=rows, block=8, frozen=free).equal(
        mark(scores, pattern, scope=scope, rows=rows, block=8)
    )
    # What was chosen is a fixed point: chosen again with itself frozen, nothing is added.
    again = mark(scores, pattern, scope=scope, rows=rows, block=8, frozen=marks)
    assert again.equal(marks)


@pytest.mark.parametrize("scope", SCOPES)
def test_frozen_entries_count_towards_the_share(scope):
    random = torch.Generator().manual_seed(1)
    scores = torch.rand(8, 64, generator=random)
    pattern = Pattern.parse("50%")
    frozen = mark(torch.rand(8, 64, generator=random), Pattern.parse("25%"), scope="row", rows=(8,), block=16)
    marks = mark(scores, pattern, scope=scope, rows=(8,), block=64, frozen=frozen)
    assert marks.sum() == 8 * 32
    assert (marks & frozen).equal(frozen)


def test_tiles_are_the_parts_of_a_mark():
    scores = torch.rand(6, 48, generator=torch.Generator().manual_seed(2))
    for spec in ("40%", "2:4+70%", "2:4"):
        pattern = Pattern.parse(spec)
        whole = mark(scores, pattern, scope="block", rows=(2, 4), block=16)
        tiles = [mark_tile(scores[:, at : at + 16], at, pattern, (2, 4)) for at in (0, 16, 32)]
        assert torch.equal(whole, torch.cat(tiles, 1))


def test_masks_that_cannot_be_preserved():
    half = torch.tensor([[True, True, False, False, True, True, True, False]])
    check_frozen(half, Pattern.parse("75%"), (1, 8), name="layer")
    check_frozen(half, Pattern.parse("62.5%"), (1, 8), name="layer")
    check_frozen(half, Pattern.parse("1:4"), (1, 8), name="layer")
    check_frozen(half, Pattern.parse("2:4+75%"), (1, 8), name="layer")
    with pytest.raises(ValueError, match=r"layer: 5 of 8 weights \(62.5 %\) are pruned already.*50%"):
        check_frozen(half, Pattern.parse("50%"), (1, 8), name="layer")
    with pytest.raises(ValueError, match=r"layer: the mask to preserve must be a bool tensor \[8, 1\]"):
        check_frozen(half, Pattern.parse("75%"), (8, 1), name="layer")
    with pytest.raises(ValueError, match=r"torch\.float32"):
        check_frozen(half.float(), Pattern.parse("75%"), (1, 8), name="layer")
    uneven = torch.tensor([[True, True, True, False, False, False, False, False]])
    check_frozen(uneven, Pattern.parse("2:4"), (1, 8), name="layer")


def test_transposable_masks_that_cannot_be_completed():
    # Two zeros at most in each row and column, yet no 2:4 mask of the tile holds them all: the last row
    # would need two in the one column that has room.
    frozen = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    plain = mark(frozen.float(), Pattern.parse("2:4t"), scope="row", rows=(4,), block=4, frozen=frozen)
    assert (plain & frozen).equal(frozen)
