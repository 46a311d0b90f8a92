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
    forward_rate = _rate(weight.dtype)
    # Gram products of 16-bit inputs run at about half the speed of the model's own matmuls, never below
    # float32's.
    solve_rate = _rate(torch.float32)
    gram_rate = max(solve_rate, forward_rate / 2) if weight.dtype == torch.bfloat16 else solve_rate
    seconds = 0.0
    for _, block in zip(selection.steps, parts.blocks):
        width = block.linears[0].shape[1]
        operations = (
            2 * sum(linear.shape[0] * linear.shape[1] for linear in block.linears) + 2 * seq_len * width
        )
        seconds += 2 * operations * tokens / forward_rate
    for step in selection.steps:
        for group in step.groups().values():
            rows, columns = sum(linear.shape[0] for linear in group), group[0].shape[1]
            seconds += 1.3 * tokens * columns**2 / gram_rate
            work = 4 * rows * columns**2
            if method == "sparsegpt":
                work += rows * columns**2 + 2 * columns**3
                seconds += columns * (50e-6 + rows * 128 * 2e-10)
            seconds += work / solve_rate
    return seconds


def _rate(dtype: torch.dtype) -> float:
    """Operations per second of a matmul of two 1024 x 1024 matrices, here and now."""
    size = 1024
    left = torch.ones(size, size, dtype=dtype)
    left @ left
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
