# SPDX-License-Identifier: Apache-2.0
"""Puts the channels of a model in an order that suits an n:m pattern, before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..models.channels import find_channels
from ..models.fold import fold_permutation
from ..models.stream import BlockStream
from .pattern import Pattern
from .permute import find_orders
from .state import PruneState
from .sweep import Run

_TOKENS = 8192  # norms need few: an order from more differs and is no better


def check_permutable(run: Run) -> None:
    """Refuse a run for which no order can be found or folded, before any work is done.

    Raises:
        ValueError: patterns without groups or of several kinds, no tokens, or a model loaded block by block.
        UnsupportedModelError: an architecture of which it is not known which channels may change places.
    """
    patterns = set(run.selection.patterns.values())
    if len(patterns) > 1 or next(iter(patterns)).group is None:
        raise ValueError(f"permute=True needs one n:m pattern for all layers, got {run.pattern}")
    if run.calibration is None:
        raise ValueError("permute=True needs calibration data; got data=None")
    if run.resident.folder is not None:
        raise ValueError("permute=True needs the whole model in memory (prune_model instead of prune_folder)")
    find_channels(run.resident.model, run.parts)


def permute_channels(run: Run, state: PruneState | None) -> None:
    """Find the orders of a model's channels (or read them from an interrupted run) and fold them into its weights.

    Args:
        run: the run; all processes come out with the orders of the first.
        state: keeps the orders.
    """
    model, ranks = run.resident.model, run.settings.ranks
    channels = find_channels(model, run.parts)
    orders = state.load_orders() if state is not None else None
    if orders is None:
        (pattern,) = set(run.selection.patterns.values())
        found: Mapping[str, torch.Tensor | None] = _find(run, pattern)
        if ranks.rank > 0:
            found = dict.fromkeys(found)
        orders = ranks.exchange(found)
        if state is not None and ranks.rank == 0:
            state.save_orders(orders)
    fold_permutation(model, channels, orders)


def _find(run: Run, pattern: Pattern) -> dict[str, torch.Tensor]:
    chosen = {linear.name for linear in run.selection.linears()}
    channels = find_channels(run.resident.model, run.parts)
    return find_orders(run.parts, channels, _norms(run), pattern, only=chosen)


def _norms(run: Run) -> dict[str, torch.Tensor]:
    """Norms of the inputs of every group in the dense model, from a few of the tokens."""
    assert run.calibration is not None
    inputs = run.calibration.inputs
    main = next(iter(inputs.values()))
    few = max(1, _TOKENS // main.shape[1]) if main.dim() == 2 else 32
    device = run.resident.device
    part = {name: values[:few].to(device) for name, values in inputs.items()}
    stream = BlockStream(run.resident.model, run.parts, part, batch=run.settings.batch)
    squares: dict[str, torch.Tensor] = {}
    for _ in run.parts.blocks:
        for shown in stream.inputs(stream.groups(), advance=True):
            for group, tokens in shown.items():
                added = tokens.double().square().sum(0)
                squares[group] = squares[group] + added if group in squares else added
    return {group: sums.sqrt().float() for group, sums in squares.items()}
