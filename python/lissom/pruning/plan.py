# SPDX-License-Identifier: Apache-2.0
"""What a pruning run would touch, need and take, without computing it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from ..models.stream import BATCH_TOKENS
from ..models.walk import ModelMap, describe
from .pattern import Pattern
from .report import PrunePlan
from .selection import Selection, select_linears
from .solver import find_method

_BYTE_SECONDS = 1.25e-10  # of one thread in an elementwise operation on large tensors; measured


def plan_prune(
    model: nn.Module,
    *,
    pattern: str | float | Pattern,
    method: str,
    samples: int = 64,
    seq_len: int = 1024,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    strict: bool = True,
    batch: int | None = None,
) -> PrunePlan:
    """Say what `prune_model` with these arguments would touch, and estimate its memory and time.

    Args:
        model: a transformers model; may live on the meta device.
        pattern, method, samples, seq_len, include, exclude, strict, batch: as for `prune_model`.

    Returns:
        The plan. Nothing is computed but a few short matmuls, whose speed gives the estimate of the time.

    Raises:
        UnsupportedModelError: an unknown architecture.
        ValueError: arguments that cannot be used, or nothing to prune.
    """
    pattern = Pattern.parse(pattern)
    find_method(method)
    parts = describe(model)
    selection = select_linears(parts, pattern, include=include, exclude=exclude, strict=strict)
    batch_tokens = min(samples * seq_len, batch * seq_len if batch else max(seq_len, BATCH_TOKENS))
    return PrunePlan(
        method=method,
        pattern=str(pattern),
        touched=[linear.name for linear in selection.linears()],
        left=selection.left,
        touched_parameters=selection.touched_parameters,
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        peak_bytes=_peak_bytes(model, parts, selection, samples * seq_len, batch_tokens),
        estimated_seconds=_seconds(parts, selection, method, samples * seq_len, seq_len),
    )


def _peak_bytes(
    model: nn.Module, parts: ModelMap, selection: Selection, tokens: int, batch_tokens: int
) -> int:
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    first = parts.blocks[0].linears[0]
    size = first.parameter.element_size()
    stream = tokens * first.shape[1] * size
    # One batch inside a block: about every linear's input and output, and one input widened to float32.
    forward = batch_tokens * max(
        sum(sum(linear.shape) for linear in block.linears) * size
        + 4 * max(linear.shape[1] for linear in block.linears)
        for block in parts.blocks
    )
    solve = 0
    for step in selection.steps:
        grams = sum(8 * group[0].shape[1] ** 2 for group in step.groups().values())
        for group in step.groups().values():
            rows, columns = sum(linear.shape[0] for linear in group), group[0].shape[1]
            solve = max(solve, grams + 16 * columns**2 + 16 * rows * columns)
    return held + stream + max(forward, solve)


def _seconds(parts: ModelMap, selection: Selection, method: str, tokens: int, seq_len: int) -> float:
    weight = parts.blocks[0].linears[0].parameter
    half = weight.dtype == torch.bfloat16
    model_rate, solve_rate = _matmul_rate(weight.dtype), _matmul_rate(torch.float32)
    element = _BYTE_SECONDS * weight.element_size() / torch.get_num_threads()
    # Gram products of bfloat16 inputs run at a bit under half the rate of the model's own matmuls.
    gram_rate = max(solve_rate, 0.4 * model_rate) if half else solve_rate
    seconds = 0.0
    for _, block in zip(selection.steps, parts.blocks):
        shapes = [linear.shape for linear in block.linears]
        matmul = 2 * sum(rows * columns for rows, columns in shapes) / model_rate
        # Attention runs at about a fifth of the matmul rate; norms, gates and residuals read and write each
        # linear's input and output about twice.
        attention = 2 * seq_len * shapes[0][1] / (0.2 * model_rate)
        passes = 2 * sum(rows + columns for rows, columns in shapes) * element
        seconds += 2 * tokens * (matmul + attention + passes)
    for step in selection.steps:
        for group in step.groups().values():
            rows, columns = sum(linear.shape[0] for linear in group), group[0].shape[1]
            seconds += tokens * (1.2 * columns**2 / gram_rate + 2 * columns * element)
            seconds += 4 * rows * columns**2 / solve_rate
            if method == "sparsegpt":
                # The pass itself: 50 us of calls a column, and a rank-1 update of half a block of rows.
                seconds += (rows * columns**2 + 2 * columns**3) / solve_rate
                seconds += columns * (50e-6 + 64 * rows * 0.2e-9)
    return seconds


def _matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of a matmul of two 1024 x 1024 matrices, here and now."""
    left = torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best
