# SPDX-License-Identifier: Apache-2.0
"""Patterns for the layers of a whole model, from one pass of calibration tokens through the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..evaluation.data import Source, read_calibration
from ..models.stream import BlockStream, evaluating
from ..models.walk import LinearRef, describe
from .allocation import Budget, LossCurve, allocate, measure_curve, outlier_ratio, owl
from .costs import DecodeTimer, kept_weights, layer_bytes, price
from .gram import Gram
from .pattern import Pattern
from .selection import DENSE, PatternMap, Selection, select_linears


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How much of a model goes where.

    Attributes:
        method: "budget" gives each layer the option that loses least within a budget, "owl" each block a share by
            its outliers.
        share: of the layers' weights that stay; the only budget that "owl" knows.
        budget_bytes: of all these layers as they are saved packed.
        budget_seconds: that they take for one token on this machine, timed now.
        options: what a layer may become: "dense" and patterns ("budget").
        bound: how far a block's share may be from the mean ("owl").
        threshold: a weight is an outlier above this many times the mean score ("owl").
    """

    method: str = "budget"
    share: float | None = None
    budget_bytes: float | None = None
    budget_seconds: float | None = None
    options: Sequence[str] = (DENSE, "2:4")
    bound: float = 0.08
    threshold: float = 5.0

    def __post_init__(self) -> None:
        if self.method not in ("budget", "owl"):
            raise ValueError(f"allocate method must be 'budget' or 'owl', got {self.method!r}")
        limits = {name: getattr(self, name) for name in ("share", "budget_bytes", "budget_seconds")}
        given = [name for name, limit in limits.items() if limit is not None]
        if self.method == "owl" and given != ["share"]:
            raise ValueError(
                f"allocate method 'owl' needs 'share' and no other budget, got {given or 'none'}"
            )
        if len(given) != 1:
            raise ValueError(
                f"allocate needs one of {', '.join(limits)}, got {' and '.join(given) or 'none'}"
            )
        if not limits[given[0]] > 0 or (self.share is not None and self.share >= 1):
            raise ValueError(f"{given[0]} must be positive, and a share below 1, got {limits[given[0]]!r}")
        for option in self.options:
            if option != DENSE:
                Pattern.parse(option)
        if all(option == DENSE for option in self.options):
            raise ValueError(f"allocate options must hold a pattern, got {list(self.options)}")


def allocate_model(
    model: nn.Module,
    allocation: Allocation,
    *,
    data: Source,
    tokenizer: Any = None,
    samples: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> PatternMap:
    """Choose a pattern for each layer of a model, for `prune_model(pattern=...)`.

    Args:
        model: a transformers model with dense weights; it stays as it is.
        allocation: what to keep within.
        data, tokenizer, samples, seq_len, seed, include, exclude: as for `prune_model`. The output layer is left
            out of account.

    Returns:
        The patterns, by layer ("budget") or by block ("owl").

    Raises:
        UnsupportedModelError: an unknown architecture.
        ValueError: a budget that the options cannot keep, or nothing to prune.

    Example:
        >>> from lissom.models.tiny import build_tiny
        >>> tokens = torch.arange(64).reshape(2, 32) % 32
        >>> patterns = allocate_model(build_tiny("llama"), Allocation(share=0.75), data=tokens)
        >>> sum(pattern is None for pattern in patterns.values()) < len(patterns) == 21
        True
    """
    parts = describe(model)
    # Any share fits every layer: what no pattern can be given to is left out here.
    selection = select_linears(parts, Pattern.parse("50%"), include=include, exclude=exclude, strict=False)
    calibration = read_calibration(data, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    with evaluating(model), torch.no_grad():
        device = next(model.parameters()).device
        inputs = {name: values.to(device) for name, values in calibration.inputs.items()}
        sums = _sums(selection, BlockStream(model, parts, inputs))
        return _by_outliers(sums, allocation) if allocation.method == "owl" else _by_budget(sums, allocation)


@dataclass(frozen=True)
class _Layer:
    """A linear layer, the mean of x x^T over its inputs in the dense model, and which share of all tokens it reads."""

    linear: LinearRef
    gram: torch.Tensor
    share: float


_Sums = Iterator[tuple[str, list[_Layer]]]


def _sums(selection: Selection, stream: BlockStream) -> _Sums:
    """Block by block, what is known of each layer. Means, because routed experts see tokens in unequal numbers."""
    for step, _ in zip(selection.steps, stream.parts.blocks):
        groups = step.groups()
        grams = {
            group: Gram(refs[0].shape[1], group, device=stream.hidden.device)
            for group, refs in groups.items()
        }
        for shown in stream.inputs(list(grams), advance=True):
            for group, tokens in shown.items():
                grams[group].add(tokens)
        found = []
        for group, refs in groups.items():
            gram = grams.pop(group)
            # An expert that no token reached is judged by its weights alone.
            seen = gram.tokens > 0
            mean = gram.matrix() / gram.tokens if seen else torch.eye(len(gram), device=stream.hidden.device)
            found += [_Layer(ref, mean, max(gram.tokens, 1) / stream.tokens) for ref in refs]
        yield step.name, found


def _by_budget(sums: _Sums, allocation: Allocation) -> PatternMap:
    curves: list[LossCurve] = []
    shapes: dict[str, tuple[int, int]] = {}
    itemsize, dtype = 0, torch.float32
    for _, layers in sums:
        for layer in layers:
            linear, weight = layer.linear, layer.linear.weight()
            fitting = [option for option in allocation.options if _fits(option, linear.shape)]
            curve = measure_curve(linear.name, weight, layer.gram, fitting)
            # What an expert loses is lost on its own tokens only.
            curves.append(curve.scaled(layer.share))
            shapes[linear.name] = linear.shape
            itemsize, dtype = weight.element_size(), weight.dtype
    if allocation.budget_bytes is not None:
        costs = price(shapes, allocation.options, lambda *layer: layer_bytes(*layer, itemsize=itemsize))
        return allocate(curves, costs, Budget(allocation.budget_bytes))
    if allocation.budget_seconds is not None:
        return allocate(
            curves, price(shapes, allocation.options, DecodeTimer(dtype)), Budget(allocation.budget_seconds)
        )
    assert allocation.share is not None
    weights = sum(rows * columns for rows, columns in shapes.values())
    return allocate(
        curves, price(shapes, allocation.options, kept_weights), Budget(allocation.share * weights)
    )


def _fits(option: str, shape: tuple[int, int]) -> bool:
    return option == DENSE or Pattern.parse(option).obstacle(shape[1], shape[0]) is None


def _by_outliers(sums: _Sums, allocation: Allocation) -> PatternMap:
    assert allocation.share is not None
    ratios: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for block, layers in sums:
        if layers:
            scores = (layer.linear.weight().abs().float() * layer.gram.diagonal().sqrt() for layer in layers)
            ratios[block] = outlier_ratio(scores, threshold=allocation.threshold)
            sizes[block] = sum(layer.linear.shape[0] * layer.linear.shape[1] for layer in layers)
    return owl(ratios, 1 - allocation.share, bound=allocation.bound, weights=sizes)
