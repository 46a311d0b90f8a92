# SPDX-License-Identifier: Apache-2.0
"""The search for an order of columns in every tier, beside its twin in torch.

`python bench/bench_pruning.py` prints CPU seconds of one thread: of the whole search, and of its first round, in which
every threshold meets every column; `pytest bench/bench_pruning.py` follows one tier over time (--benchmark-save,
--benchmark-compare).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lissom
from lissom.benchmark import machine
from lissom.ops.pruning import pruning_permute
from lissom.pruning.pattern import Pattern, mark_groups
from lissom.reference import pruning as twin
from lissom.testing import tiers

# The residual stream and an MLP of a small model, the same of a 7B model.
SHAPES = ((120960, 576), (576, 1536), (16384, 4096), (4096, 11008))
TIERS = [tier for tier in tiers() if tier in ("portable", "avx2", "avx512")]
WINDOW = 2048


def scores(rows: int, columns: int) -> torch.Tensor:
    """Squares of normal weights in columns of different sizes, as levels [R, C]."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(columns, generator=generator).mul_(0.5).exp_()
    parts = [
        torch.randn(len(part), columns, generator=generator).mul_(sizes).square_().mul_(16)
        for part in torch.arange(rows).split(4096)
    ]
    return torch.cat([part.clamp_(max=255).to(torch.uint8) for part in parts])


def pruned(levels: torch.Tensor) -> int:
    """What 2:4 prunes."""
    pattern = Pattern.parse("2:4")
    parts = (part.float() for part in levels.split(1024))
    return int(sum(part[mark_groups(part, pattern)].sum(dtype=torch.float64) for part in parts))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_permute(benchmark: Callable[..., Any], *, shape: tuple[int, int], tier: str) -> None:
    levels = scores(*shape)
    lissom.set_cpu_isa(tier)
    with machine.torch_threads(1):
        benchmark.pedantic(lambda: pruning_permute(levels, 2, 4, window=WINDOW), rounds=3, warmup_rounds=1)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The least CPU seconds of this thread, which other programs disturb least."""
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        taken.append(time.thread_time() - start)
    return min(taken)


def main() -> None:
    """Print one line for each shape and tier."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--twin", action="store_true", help="time the twin as well (minutes)")
    chosen = parser.parse_args()
    with machine.torch_threads(1):
        for shape, tier in itertools.product(SHAPES, TIERS):
            levels = scores(*shape)
            lissom.set_cpu_isa(tier)
            order = pruning_permute(levels, 2, 4, window=WINDOW)
            whole = seconds(lambda x=levels: pruning_permute(x, 2, 4, window=WINDOW), chosen.repeats)
            first = seconds(
                lambda x=levels: pruning_permute(x, 2, 4, rounds=1, window=WINDOW), chosen.repeats
            )
            share = -(-shape[1] // -(-shape[1] // WINDOW))
            rate = shape[0] * shape[1] * share / first / 1e9
            print(
                f"| {shape[0]} x {shape[1]} | {tier} | {whole:.2f} | {first:.3f} | {rate:.0f} | "
                f"{pruned(levels[:, order]) / pruned(levels):.4f} |",
                flush=True,
            )
        if chosen.twin:
            levels = scores(*SHAPES[1])
            taken = seconds(lambda: twin.permute(levels, 2, 4, 100, WINDOW), 1)
            print(f"| {SHAPES[1][0]} x {SHAPES[1][1]} | torch | {taken:.2f} | | | |")


if __name__ == "__main__":
    main()
