# SPDX-License-Identifier: Apache-2.0
"""The plans of csrc/sparse24/cuda/plan.h on paper: what is chosen, and how near the model puts it to the bound."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest


class Row(NamedTuple):
    gpu: str
    bytes: int
    m: int
    k: int  # and n
    tile: int
    rows: int
    tokens: int
    splits: int
    bound: float  # microseconds from here on
    memory: float
    l2: float
    sm: float
    exposed: float
    launch: float
    total: float

    def share(self) -> float:
        """Of the tighter bound, without the launch, which any kernel pays."""
        return self.bound / (self.total - self.launch)


@pytest.fixture(scope="module")
def table(simt) -> list[Row]:
    answer = simt.run(simt.program("test_sparse24_plan.cpp"))
    types = [str, *[int] * 7, *[float] * 7]
    return [
        Row(*(t(v) for t, v in zip(types, line.split(), strict=True))) for line in answer.stdout.splitlines()
    ]


def test_every_size_has_a_plan_on_every_device(table):
    assert len(table) == 4 * 2 * 3 * 13
    for row in table:
        assert row.tile >= 0 or (row.m <= 4 and row.bytes == 2), row
        assert row.total >= row.launch + row.bound, row


def test_small_m_waits_for_memory_alone(table):
    """On an A100 at least 80 % of the bound; no tile that is wider than its tokens need."""
    for row in table:
        if row.gpu == "A100" and row.k >= 4096 and row.m <= 16 and row.bytes == 2:
            assert row.share() >= 0.8, row
            assert row.tokens < 2 * max(row.m, 8), row
            assert row.splits == 1, row


def test_large_m_is_bound_by_the_tensor_cores(table):
    """On an A100 at least 70 % of the bound."""
    for row in table:
        if row.gpu == "A100" and row.k >= 4096 and row.m >= 4096 and row.bytes == 2:
            assert row.share() >= 0.7, row
            assert (row.rows, row.tokens) == (256, 128), row


def test_more_tokens_never_take_less_time(table):
    """Where there is enough of W to fill a device."""
    for before, row in itertools.pairwise(table):
        if row.k >= 4096 and (before.gpu, before.bytes, before.k) == (row.gpu, row.bytes, row.k):
            assert row.total >= 0.9 * before.total, (before, row)
