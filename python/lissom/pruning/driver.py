# SPDX-License-Identifier: Apache-2.0
"""Prunes a whole model block by block, each block on the outputs of the pruned blocks before it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..evaluation.data import Calibration, Source, read_calibration
from ..models.stream import BlockStream, Hook, evaluating
from ..models.walk import LinearRef, ModelMap, UnsupportedModelError, describe
from .gram import Gram
from .pattern import Pattern
from .problem import Options
from .report import BlockProgress, BlockReport, LayerReport, PruneReport
from .selection import Selection, Step, select_linears
from .solver import Pruned, check_damp, find_method, prune_group
from .state import PruneState, fingerprint

_FEW_TOKENS_DAMP = 0.1  # with fewer than 2 C tokens the held-out error is lower than with 0.01


def prune(model: nn.Module, **arguments: Any) -> nn.Module:
    """Prune a model in place and return it; `model.config.lissom` then tells how it was made.

    Args:
        model: a transformers causal language model.
        **arguments: as for `prune_model`.

    Returns:
        The same model.

    Raises:
        ValueError: as for `prune_model`.

    Example:
        >>> model = prune(model, pattern="2:4", method="wanda", data=texts, tokenizer=tok)  # doctest: +SKIP
    """
    prune_model(model, **arguments)
    return model


def prune_model(
    model: nn.Module,
    *,
    pattern: str | float | Pattern,
    method: str,
    data: Source | None = None,
    tokenizer: Any = None,
    samples: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    damp: float | None = None,
    options: Options | None = None,
    strict: bool = True,
    batch: int | None = None,
    state_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    on_progress: Callable[[BlockProgress], None] | None = None,
) -> PruneReport:
    """Prune the linear layers of a model in place, block by block; embeddings, norms and output layer stay.

    Args:
        model: a transformers causal language model with dense floating-point weights, on one device.
        pattern, method, options: as for `prune_weight`.
        data, tokenizer, samples, seq_len, seed: calibration, as for `lissom.evaluation.calibration_windows`,
            or a mapping with `input_ids` and `attention_mask` [S, T]. Only magnitude can do without.
        include, exclude: module names or `re:<regex>`; exclude wins. Naming the output layer includes it.
        damp: share of mean(diag(H)) added to H; None: 0.01, or 0.1 for a layer with fewer than 2 C tokens.
        strict: raise for a chosen layer that cannot be pruned instead of leaving it with a reason.
        batch: sequences per forward pass; None: as many as make about 4096 tokens.
        state_dir: folder that keeps finished blocks.
        resume: go on from `state_dir` to the same bits that an uninterrupted run gives.
        on_progress: called after each block.

    Returns:
        What was pruned, what was left and why, errors and times.

    Raises:
        UnsupportedModelError: an unknown architecture, or packed, quantised or meta weights.
        ValueError: arguments, data or weights that cannot be used; the sentence says which.
    """
    began = time.perf_counter()
    parsed = Pattern.parse(pattern)
    parts = describe(model)
    selection = select_linears(parts, parsed, include=include, exclude=exclude, strict=strict)
    _check(model, selection, method, damp, has_data=data is not None)
    calibration = None
    if data is not None:
        calibration = read_calibration(data, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    run = _Run(model, parts, selection, parsed, method, damp, options or Options(), calibration, batch)
    state = _open_state(run, state_dir, resume)
    with evaluating(model), torch.no_grad():
        layers, blocks = _prune_steps(run, state, on_progress)
    return _conclude(run, layers, blocks, time.perf_counter() - began)


@dataclass(frozen=True)
class _Run:
    """Everything that decides the result of a run."""

    model: nn.Module
    parts: ModelMap
    selection: Selection
    pattern: Pattern
    method: str
    damp: float | None
    options: Options
    calibration: Calibration | None
    batch: int | None

    def fingerprint(self) -> dict[str, Any]:
        """What a later run must repeat to go on with this one's state."""
        arguments = {
            "pattern": str(self.pattern),
            "method": self.method,
            "damp": self.damp,
            **asdict(self.options),
            "batch": self.batch,
            "layers": [linear.name for linear in self.selection.linears()],
        }
        tokens, mask = (self.calibration.tokens, self.calibration.mask) if self.calibration else (None, None)
        return fingerprint(self.model, tokens, mask, arguments)

    def stream(self) -> BlockStream | None:
        """The calibration tokens in front of the first block; None without calibration."""
        if self.calibration is None:
            return None
        device = next(self.model.parameters()).device
        mask = self.calibration.mask
        tokens = self.calibration.tokens.to(device)
        return BlockStream(
            self.model, self.parts, tokens, None if mask is None else mask.to(device), batch=self.batch
        )


def _prune_steps(
    run: _Run, state: PruneState | None, on_progress: Callable[[BlockProgress], None] | None
) -> tuple[list[LayerReport], list[BlockReport]]:
    steps = run.selection.steps
    resumed = [state is not None and state.has(number) for number in range(len(steps))]
    to_solve = [number for number, step in enumerate(steps) if step.linears and not resumed[number]]
    stream = run.stream() if to_solve else None
    layers: list[LayerReport] = []
    blocks: list[BlockReport] = []
    for number, step in enumerate(steps):
        clock = _Clock()
        grams = _collect(run, step, stream) if stream is not None and number in to_solve else {}
        clock.lap("collect")
        weights, reports = (
            state.load(number) if state is not None and resumed[number] else _solve(run, step, grams)
        )
        _write(step.linears, weights)
        if state is not None and number in to_solve:
            state.save(number, weights, reports)
        clock.lap("solve")
        if stream is not None and number < to_solve[-1]:
            stream.advance()
        clock.lap("advance")
        layers += reports
        blocks.append(BlockReport(step.name, **clock.seconds))
        if on_progress is not None:
            on_progress(_progress(len(steps), blocks, resumed, reports))
    return layers, blocks


def _progress(
    steps: int, blocks: list[BlockReport], resumed: list[bool], layers: list[LayerReport]
) -> BlockProgress:
    solved = [block.seconds for block, skipped in zip(blocks, resumed) if not skipped]
    done = len(blocks)
    return BlockProgress(
        block=done,
        blocks=steps,
        name=blocks[-1].name,
        seconds=blocks[-1].seconds,
        elapsed=sum(block.seconds for block in blocks),
        remaining=sum(solved) / max(len(solved), 1) * resumed[done:].count(False),
        resumed=resumed[done - 1],
        layers=layers,
    )


def _collect(run: _Run, step: Step, stream: BlockStream) -> dict[str, Gram]:
    """Gram matrices of the inputs of a step's layers, by group."""
    grams = {}
    hooks: dict[nn.Module, Hook] = {}
    for group, linears in step.groups().items():
        device = linears[0].weight().device
        grams[group] = Gram(linears[0].shape[1], group, device=device)
        hooks[linears[0].module] = grams[group].add
    if step.linears[0] is run.parts.head:
        tail = [run.model.get_submodule(name) for name in run.parts.tail]
        (gram,) = grams.values()
        for hidden, mask in stream.batches():
            for module in tail:
                hidden = module(hidden)
            gram.add(hidden, mask)
    else:
        stream.observe(hooks)
    for gram in grams.values():
        if gram.tokens != stream.tokens:
            raise RuntimeError(
                f"{gram.name} saw {gram.tokens} of {stream.tokens} calibration tokens: the block does not "
                "call its layers once per token, so it cannot be pruned"
            )
    return grams


def _solve(
    run: _Run, step: Step, grams: dict[str, Gram]
) -> tuple[dict[str, torch.Tensor], list[LayerReport]]:
    weights, reports = {}, []
    for group, linears in step.groups().items():
        began = time.perf_counter()
        gram = grams.pop(group, None)
        matrix, damp, dead = None, 0.0, 0
        if gram is not None:
            dtype = torch.float64 if linears[0].weight().dtype == torch.float64 else torch.float32
            matrix = gram.matrix(dtype)
            dead = int((matrix.diagonal() == 0).sum())
            damp = _damping(run, gram)
        solved = prune_group(
            [linear.weight() for linear in linears],
            matrix,
            pattern=run.pattern,
            method=run.method,
            damp=damp,
            options=run.options,
            name=group,
        )
        seconds = time.perf_counter() - began
        rows = sum(linear.shape[0] for linear in linears)
        for linear, result in zip(linears, solved):
            reports.append(_report(run, linear, result, seconds * linear.shape[0] / rows, dead))
            weights[linear.name] = result.weight
    return weights, reports


def _damping(run: _Run, gram: Gram) -> float:
    """The damping asked for, or the one that suits the number of tokens."""
    usual = 0.01 if run.damp is None else run.damp
    if run.method != "sparsegpt" or gram.tokens >= 2 * len(gram):
        return usual
    few = f"{gram.name}: {gram.tokens} calibration tokens for {len(gram)} inputs (fewer than 2 per input)"
    if run.damp is not None:
        warnings.warn(f"{few}; more tokens or damp={_FEW_TOKENS_DAMP} would generalise better", stacklevel=2)
        return usual
    warnings.warn(f"{few}; damp raised to {_FEW_TOKENS_DAMP}", stacklevel=2)
    return _FEW_TOKENS_DAMP


def _report(run: _Run, linear: LinearRef, result: Pruned, seconds: float, dead: int) -> LayerReport:
    sparsity = result.mask.sum().item() / result.mask.numel()
    return LayerReport(
        linear.name, linear.shape, str(run.pattern), sparsity, result.relative_error, seconds, dead
    )


def _write(linears: Sequence[LinearRef], weights: Mapping[str, torch.Tensor]) -> None:
    for linear in linears:
        linear.weight().copy_(weights[linear.name])


def _check(
    model: nn.Module, selection: Selection, method: str, damp: float | None, *, has_data: bool
) -> None:
    find_method(method)
    if damp is not None:
        check_damp(damp)
    if not has_data and method != "magnitude":
        raise ValueError(f"method {method!r} needs calibration data; got data=None")
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "the model is quantised or packed (config.quantization_config): prune the dense one"
        )
    for linear in selection.linears():
        if linear.weight().is_meta:
            raise UnsupportedModelError(
                f"{linear.name} is on the meta device and holds no values; load the model first"
            )


def _open_state(run: _Run, state_dir: str | PathLike[str] | None, resume: bool) -> PruneState | None:
    if state_dir is None:
        if resume:
            raise ValueError("resume=True needs state_dir, the folder of the run to go on with")
        return None
    return PruneState(state_dir, run.fingerprint(), resume=resume)


def _conclude(run: _Run, layers: list[LayerReport], blocks: list[BlockReport], seconds: float) -> PruneReport:
    report = PruneReport(
        method=run.method,
        pattern=str(run.pattern),
        layers=layers,
        left=run.selection.left,
        blocks=blocks,
        touched_parameters=run.selection.touched_parameters,
        total_parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        calibration=run.calibration.provenance() if run.calibration else {},
        seconds=seconds,
    )
    config: Any = run.model.config
    config.lissom = _provenance(report)
    return report


def _provenance(report: PruneReport) -> dict[str, Any]:
    """What config.json keeps about the run."""
    import lissom

    return {
        "version": lissom.__version__,
        "pattern": report.pattern,
        "method": report.method,
        "sparsity": report.sparsity,
        "calibration": report.calibration,
        "layers": [layer.name for layer in report.layers],
    }


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"{name}_seconds"] = now - self._last
        self._last = now
