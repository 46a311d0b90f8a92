# SPDX-License-Identifier: Apache-2.0
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.pruning.pattern import Pattern, mark, mark_groups, mark_lowest


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
    ],
)
def test_parse(spec, sparsity, kept, group, text):
    pattern = Pattern.parse(spec)
    assert (pattern.sparsity, pattern.kept, pattern.group) == (sparsity, kept, group)
    assert str(pattern) == text
    assert Pattern.parse(pattern) is pattern


@pytest.mark.parametrize(
    "spec", ["5:4", "-1:4", "0:4", "0:0", "1:-4", 1, 1.0, 50, -0.1, "100%", "-1%", "half", "2:4:8", ""]
)
def test_what_cannot_be_a_pattern(spec):
    with pytest.raises(ValueError, match="pattern"):
        Pattern.parse(spec)


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
