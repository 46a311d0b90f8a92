# SPDX-License-Identifier: Apache-2.0
"""pytest bench/bench_sparse24.py: the 2:4 linear and its dense peers under pytest-benchmark.

`lissom bench sparse24` and, for int8, `python -m lissom.benchmark.sparse24_int8` print the interleaved comparisons that
the documentation quotes; this file is for following one contender over time (--benchmark-save, --benchmark-compare).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lissom.benchmark import machine, sparse24, sparse24_int8


@pytest.mark.parametrize("contender", ["ours", "F.linear", "oneDNN"])
@pytest.mark.parametrize("tokens", sparse24.TOKENS)
@pytest.mark.parametrize("k, n", sparse24.SHAPES)
@pytest.mark.parametrize("dtype", sparse24.DTYPES)
def test_linear(
    benchmark: Callable[..., Any], *, dtype: str, k: int, n: int, tokens: int, contender: str
) -> None:
    calls = sparse24.contenders(getattr(torch, dtype), tokens, n, k)
    if contender not in calls:
        pytest.skip(f"{contender} is not available")
    turn = itertools.count()
    with machine.torch_threads(1), torch.inference_mode():
        benchmark.pedantic(lambda: calls[contender](next(turn)), rounds=9, warmup_rounds=1)


@pytest.mark.parametrize(
    "contender", ["ours", "ours, quantise", "torch dynamic", "oneDNN int8", "oneDNN int8, quantise"]
)
@pytest.mark.parametrize("tokens", sparse24_int8.TOKENS)
@pytest.mark.parametrize("k, n", sparse24_int8.SHAPES)
def test_linear_int8(benchmark: Callable[..., Any], *, k: int, n: int, tokens: int, contender: str) -> None:
    calls, left_out = sparse24_int8.contenders(tokens, n, k)
    if contender not in calls:
        pytest.skip(f"{contender} is not available: {left_out}")
    turn = itertools.count()
    with machine.torch_threads(1), torch.inference_mode():
        benchmark.pedantic(lambda: calls[contender](next(turn)), rounds=9, warmup_rounds=1)
