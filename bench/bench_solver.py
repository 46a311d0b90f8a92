# SPDX-License-Identifier: Apache-2.0
"""The solver operators beside the same steps in torch.

`python bench/bench_solver.py` prints the interleaved comparison that docs/kernels/solver.md quotes;
`pytest bench/bench_solver.py` follows one contender over time (--benchmark-save, --benchmark-compare).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from lissom.benchmark import machine
from lissom.ops import solver
from lissom.pruning.pattern import mark_group, mark_lowest

SHAPES = ((3072, 576), (576, 1536), (4096, 4096))


class Call(NamedTuple):
    """What is timed, and what must be done before without being timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def admm(rows: int, columns: int, pattern: str) -> dict[str, Call]:
    """One step of ADMM on float32 weights; patterns "n:m" or "50%" of every row."""
    kept, group = (int(n) for n in pattern.split(":")) if ":" in pattern else (columns // 2, columns)
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    dual, right = torch.zeros_like(x), torch.empty_like(x)
    rho, rise = 0.5, 1.1
    state = {"dual": torch.zeros_like(x)}

    def in_torch() -> None:
        z = x + state["dual"]
        scores = z.abs()
        if group < columns:
            marks = mark_group(scores.view(-1, group).t().contiguous(), group - kept)
            pruned = marks.t().reshape(z.shape)
        else:
            pruned = mark_lowest(scores, group - kept)
        torch.where(pruned, -rho * z, rho * rise * z).add_(pull)
        state["dual"] = torch.where(pruned, z / rise, 0)

    def ours() -> None:
        solver.solver_admm_step_(x, dual, pull, right, rho, rho * rise, kept, group)

    return {"ours": Call(ours), "torch": Call(in_torch)}


def pcg(rows: int, columns: int) -> dict[str, Call]:
    """One step of conjugate gradients behind its product with H, half of the weights kept."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(rows, columns, generator=generator) for _ in range(4)]
    start[3] += 3 * start[2]  # q = p H for some positive definite H
    pruned = torch.rand(rows, columns, generator=generator) < 0.5
    scale, energy = torch.rand(columns, generator=generator) + 0.5, torch.ones(rows)
    state = [tensor.clone() for tensor in start]
    work = torch.empty_like(start[0])

    def again() -> None:
        for tensor, first in zip(state, start):
            tensor.copy_(first)
        energy.fill_(1)

    def row_dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vecdot(left, right)[:, None]

    def in_torch() -> None:
        weight, residual, step, image = state
        before = energy[:, None]
        length = torch.where(before > 0, before / row_dot(step, image), 0)
        weight.addcmul_(step, length)
        residual.addcmul_(image, length, value=-1).masked_fill_(pruned, 0)
        torch.mul(residual, scale, out=work)
        after = row_dot(residual, work)
        step.mul_(torch.where(before > 0, after / before, 0)).add_(work)
        residual.norm()

    def ours() -> None:
        solver.solver_pcg_step_(*state, energy, scale, pruned)

    return {"ours": Call(ours, again), "torch": Call(in_torch, again)}


def sparsegpt(rows: int, _columns: int, pattern: str) -> dict[str, Call]:
    """The pass over one block of 128 columns; pattern "n:m", or "mask" for a given one."""
    width = 128
    kept, group = (int(n) for n in pattern.split(":")) if ":" in pattern else (1, 1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, rows, generator=generator)
    marks = (torch.rand(width, rows, generator=generator) < 0.5) & (group == 1)
    factor = torch.randn(width, width, generator=generator).mul_(0.1).triu_(1) + torch.eye(width)
    tile, pruned = start.clone(), marks.clone()

    def again() -> None:
        tile.copy_(start)
        pruned.copy_(marks)

    def in_torch() -> None:
        scale = factor.diagonal()[:, None]
        errors = torch.empty_like(tile)
        for column in range(width):
            if group > 1 and column % group == 0:
                part = slice(column, column + group)
                pruned[part] = mark_group((tile[part] / scale[part]).square_(), group - kept)
            error = errors[column]
            torch.mul(tile[column], pruned[column], out=error).div_(factor[column, column])
            tile[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)

    def ours() -> None:
        solver.solver_sparsegpt_block_(tile, pruned, factor, kept, group)

    return {"ours": Call(ours, again), "torch": Call(in_torch, again)}


def solve(rows: int, columns: int, width: int | None = None) -> dict[str, Call]:
    """Exact solves on half of the columns, for every row its own half; of all columns 64 rows only."""
    if width is None:
        rows, width = 64, columns
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(width, 2 * width, generator=generator)
    h = inputs @ inputs.t() / width
    b = torch.randn(rows, width, generator=generator)
    chosen = torch.zeros(rows, width, dtype=torch.bool)
    chosen.scatter_(1, torch.rand(rows, width, generator=generator).argsort(1)[:, : width // 2], True)
    most = 1 << 25  # entries of one batch of systems

    def in_torch() -> None:
        found = torch.zeros_like(b)
        count = width // 2
        for part in torch.arange(rows).split(max(1, most // count**2)):
            index = chosen[part].nonzero()[:, 1].view(-1, count)
            factor = torch.linalg.cholesky_ex(h[index[:, :, None], index[:, None, :]])[0]
            right = b[part].gather(1, index)[:, :, None]
            found[part] = found[part].scatter(1, index, torch.cholesky_solve(right, factor)[:, :, 0])

    def ours() -> None:
        solver.solver_masked_solve(h, b, chosen)

    return {"ours": Call(ours), "torch": Call(in_torch)}


CASES: dict[str, Callable[[int, int], dict[str, Call]]] = {
    "admm 2:4": lambda rows, columns: admm(rows, columns, "2:4"),
    "admm 4:8": lambda rows, columns: admm(rows, columns, "4:8"),
    "admm 50%": lambda rows, columns: admm(rows, columns, "50%"),
    "pcg": pcg,
    "sparsegpt 2:4": lambda rows, columns: sparsegpt(rows, columns, "2:4"),
    "sparsegpt mask": lambda rows, columns: sparsegpt(rows, columns, "mask"),
    "solve 64 of 128": lambda rows, columns: solve(rows, columns, 128),
    "solve half, 64 rows": solve,
}


@pytest.mark.parametrize("contender", ["ours", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_solver(benchmark: Callable[..., Any], *, case: str, shape: tuple[int, int], contender: str) -> None:
    call = CASES[case](*shape)[contender]
    with machine.torch_threads(1), torch.inference_mode():
        benchmark.pedantic(call.run, setup=call.prepare, rounds=9, warmup_rounds=1)


def compare(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each contender on this thread, which other programs disturb least; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first one warms up
        for name, call in calls.items():
            call.prepare()
            start = time.thread_time()
            call.run()
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def main() -> None:
    """Print one line for each case and shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    with machine.torch_threads(1), torch.inference_mode():
        for case, shape in itertools.product(CASES, SHAPES):
            if chosen.only not in case:
                continue
            found = compare(CASES[case](*shape), chosen.rounds)
            ratio = found["torch"] / found["ours"]
            print(
                f"| {case} | {shape[0]} x {shape[1]} | {1e3 * found['torch']:.2f} | {1e3 * found['ours']:.2f} | "
                f"{ratio:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
