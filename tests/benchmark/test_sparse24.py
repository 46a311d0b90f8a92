# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark: contenders compute the same product and the rows say what was timed."""

import sys
from pathlib import Path

import pytest
import torch

from lissom import ops
from lissom.benchmark import machine, sparse24


@pytest.fixture(scope="module")
def row():
    return sparse24.run(quick=True, threads=1, dtypes=["bfloat16"], tokens=[1], shapes=[(1024, 2048)])[0]


def test_ratios_are_to_the_fastest_peer(row):
    assert row["ratio_best"] == pytest.approx(min(row["peers"].values()) / row["ours_us"])
    huge = [t for name, t in row["other_peers"].items() if name.endswith(", huge pages")]
    best = min(*huge, *row["peers"].values()) / row["ours_us"] if huge else None
    assert row["ratio_huge_pages"] == pytest.approx(best)


def test_every_peer_computes_x_times_w():
    calls = sparse24._dense_peers(torch.randn(3, 64), 32)[0]
    outputs = {name: torch.as_tensor(call(0)) for name, call in calls.items() if name != "OpenVINO"}
    for found in outputs.values():
        torch.testing.assert_close(found, outputs["F.linear"])


def test_a_peer_that_refuses_is_left_out_with_its_reason(monkeypatch):
    def refuse(weight, rows):
        raise RuntimeError("bf16 path needs the cpu support\nsome stack")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    peers, left_out = sparse24._dense_peers(torch.randn(3, 64), 32)
    assert "oneDNN" not in peers
    assert left_out == {"oneDNN": "bf16 path needs the cpu support"}


def test_a_peer_without_huge_pages_is_left_out(monkeypatch):
    monkeypatch.setattr(machine, "onto_huge_pages", lambda address, count: False)
    peers, left_out = sparse24._dense_peers(torch.randn(3, 64), 32, huge_pages=True)
    assert peers == {}
    assert {"F.linear", "oneDNN"} <= left_out.keys()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")
def test_moving_onto_huge_pages_keeps_the_data():
    data = torch.arange(2 << 20)  # 16 MiB
    moved = machine.onto_huge_pages(data.data_ptr(), data.nbytes)
    assert torch.equal(data, torch.arange(2 << 20))
    small = torch.ones(100)
    assert not machine.onto_huge_pages(small.data_ptr(), small.nbytes)
    if not moved:
        pytest.skip("this kernel cannot collapse pages")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")
def test_packed_weights_ask_for_huge_pages():
    weight = torch.randn(2048, 4096, dtype=torch.bfloat16)  # 9 MiB packed
    packed = ops.sparse24_pack(*ops.sparse24_compress(weight, pattern="magnitude"))
    assert packed.data_ptr() % (2 << 20) == 0
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{packed.data_ptr():x}-"))
    flags = next(line for line in lines[start:] if line.startswith("VmFlags:"))
    assert "hg" in flags.split()
    again = ops.sparse24_compress(ops.sparse24_decompress(*ops.sparse24_unpack(packed, 2048, 4096), 4096))
    assert torch.equal(ops.sparse24_pack(*again), packed)
