# SPDX-License-Identifier: Apache-2.0
"""The int8 benchmark: all compute one product, up to what quantisation costs each, and ratios say what they say."""

from __future__ import annotations

import pytest
import torch

from lissom.benchmark import sparse24_int8


@pytest.fixture(scope="module")
def row():
    return sparse24_int8.run(tokens=[17], shapes=[(256, 128)], rounds=1)[0]


def test_ratios_are_over_ours(row):
    us = row["us"]
    inside = min(us["torch dynamic"], us["oneDNN int8, quantise"])
    assert row["ratio"] == pytest.approx(inside / us["ours, quantise"])
    assert row["ratio_bare"] == pytest.approx(us["oneDNN int8"] / us["ours"])
    assert row["left_out"] == {}


def test_contenders_compute_x_times_w():
    torch.manual_seed(1)
    x, w = torch.randn(20, 256), torch.randn(64, 256)
    dense = x @ w.t()
    for make in (sparse24_int8._dynamic, sparse24_int8._onednn):
        for name, call in make(x, w).items():
            assert (call(0) - dense).norm() < 0.03 * dense.norm(), name
    kept = w.clone()
    small = kept.view(64, 64, 4).abs().argsort(-1)[..., :2]
    kept.view(64, 64, 4).scatter_(-1, small, 0)
    for name, call in sparse24_int8._ours(x, w).items():
        assert (call(0) - x @ kept.t()).norm() < 0.03 * dense.norm(), name


def test_who_is_missing_is_named(monkeypatch):
    def refuse(x, w):
        raise RuntimeError("no engine\nsome stack")

    monkeypatch.setattr(sparse24_int8, "_onednn", refuse)
    calls, left_out = sparse24_int8.contenders(17, 64, 64)
    assert left_out == {"oneDNN int8": "no engine"}
    assert "ours" in calls
