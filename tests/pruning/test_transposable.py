# SPDX-License-Identifier: Apache-2.0
import itertools
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.pruning import transposable
from lissom.pruning.pattern import Pattern, mark, mark_groups
from lissom.pruning.transposable import transposable_mask

SHAPES = [(kept, group) for group in (1, 2, 3, 4) for kept in range(1, group + 1)]


@lru_cache
def every_valid_mask(kept, group):
    """All 2^(m*m) masks of a tile, filtered by their row and column sums."""
    codes = torch.arange(1 << group * group)
    masks = (codes[:, None] >> torch.arange(group * group)).bitwise_and(1).bool().view(-1, group, group)
    right = (masks.sum(1) == group - kept).all(-1) & (masks.sum(2) == group - kept).all(-1)
    return masks[right]


def by_search(scores, kept, group, frozen):
    """The definition, tile by tile: fewest frozen entries reopened, then the greatest kept sum."""
    best = []
    masks = every_valid_mask(kept, group)
    for top, left in itertools.product(range(0, scores.shape[0], group), range(0, scores.shape[1], group)):
        tile = scores[top : top + group, left : left + group].double()
        held = frozen[top : top + group, left : left + group]
        reopened = (held & ~masks).sum((1, 2))
        kept_sum = (tile * (~masks & ~held)).sum((1, 2))
        best.append((int(reopened.min()), float(kept_sum[reopened == reopened.min()].max())))
    return best


def values_of(marks, scores, group, frozen):
    found = []
    for top, left in itertools.product(range(0, scores.shape[0], group), range(0, scores.shape[1], group)):
        tile = (slice(top, top + group), slice(left, left + group))
        found.append(float((scores[tile].double() * (~marks[tile] & ~frozen[tile])).sum()))
    return found


@pytest.mark.parametrize("kept, group", SHAPES)
def test_masks_are_all_valid_ones(kept, group):
    found = {tuple(mask) for mask in transposable._tile_masks(kept, group).tolist()}
    assert found == {tuple(mask.flatten().tolist()) for mask in every_valid_mask(kept, group)}
    assert len(found) == len(transposable._tile_masks(kept, group))


def test_there_are_ninety():
    assert len(transposable._tile_masks(2, 4)) == 90


@given(st.data())
def test_best_mask_of_each_tile(data):
    kept, group = data.draw(st.sampled_from(SHAPES))
    rows, columns = (group * data.draw(st.integers(1, 3)) for _ in range(2))
    size = rows * columns
    numbers = st.floats(-4, 100, width=32) | st.sampled_from([0.0, 1.0])
    scores = torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size))).view(rows, columns)
    frozen = torch.zeros_like(scores, dtype=torch.bool)
    before = scores.clone()
    marks = transposable_mask(scores, kept, group)
    assert torch.equal(scores, before), "the scores are not written to"
    for side in (marks, marks.t()):
        assert (side.reshape(-1, group).sum(1) == group - kept).all()
    expected = [total for _, total in by_search(scores, kept, group, frozen)]
    assert values_of(marks, scores, group, frozen) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(st.data())
def test_frozen_entries_are_part_of_the_tile_where_a_mask_can_hold_them(data):
    numbers = st.lists(st.integers(0, 9), min_size=32, max_size=32)
    scores = torch.tensor(data.draw(numbers), dtype=torch.float32).view(4, 8)
    frozen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=32, max_size=32))).view(4, 8)
    marks = transposable_mask(scores, 2, 4, frozen=frozen)
    assert (marks & frozen).equal(frozen)
    for tile, (reopened, total) in enumerate(by_search(scores, 2, 4, frozen)):
        part = slice(4 * tile, 4 * tile + 4)
        # 8 entries of a valid mask, and beside it those frozen ones that it could not hold.
        assert marks[:, part].sum() == 8 + reopened
        assert values_of(marks[:, part], scores[:, part], 4, frozen[:, part]) == [total]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_prune_early_entries(dtype):
    marks = transposable_mask(torch.full((8, 8), 0.1, dtype=dtype), 2, 4)
    tile = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(marks, tile.repeat(2, 2))


def test_infinite_scores_are_kept():
    scores = torch.rand(4, 4, dtype=torch.float64)  # one float64 tile is computed on without a copy
    scores[0, 0] = float("inf")
    before = scores.clone()
    assert not transposable_mask(scores, 2, 4)[0, 0]
    assert torch.equal(scores, before)


def test_strips_do_not_show(monkeypatch):
    scores = torch.rand(40, 24, generator=torch.Generator().manual_seed(0))
    frozen = torch.rand(40, 24, generator=torch.Generator().manual_seed(1)) < 0.2
    whole = transposable_mask(scores, 2, 4, frozen=frozen)
    monkeypatch.setattr(transposable, "_TILES_AT_ONCE", 13)  # three strips of two rows of tiles, and a tail
    assert torch.equal(transposable_mask(scores, 2, 4, frozen=frozen), whole)


def test_marks_of_a_pattern_are_transposable():
    scores = torch.rand(16, 32, generator=torch.Generator().manual_seed(3))
    pattern = Pattern.parse("2:4t")
    expected = transposable_mask(scores, 2, 4)
    assert torch.equal(mark_groups(scores, pattern), expected)
    assert torch.equal(mark(scores, pattern, scope="block", rows=(4, 12), block=8), expected)
    raised = mark(scores, Pattern.parse("2:4t+70%"), scope="layer", rows=(16,), block=8)
    assert raised.sum() == 16 * 32 * 7 // 10
    assert (raised & expected).equal(expected)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"2:4t takes a weight .* divide by 4, got \[6, 8\]"):
        transposable_mask(torch.rand(6, 8), 2, 4)
    with pytest.raises(ValueError, match="m up to 4, got 4:8"):
        transposable_mask(torch.rand(8, 8), 4, 8)


def test_nothing_to_choose():
    assert transposable_mask(torch.rand(0, 8), 2, 4).shape == (0, 8)
    assert not transposable_mask(torch.rand(8, 8), 4, 4).any()
