# SPDX-License-Identifier: Apache-2.0
"""Prunes a whole model block by block, each block on the outputs of the pruned blocks before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..evaluation.data import Calibration, Source, read_calibration
from ..models.resident import Output, Resident
from ..models.spill import Spill
from ..models.stream import evaluating
from ..models.walk import UnsupportedModelError, describe
from .parallel import Ranks
from .pattern import Pattern
from .problem import Options
from .reconstruct import Reconstruction
from .report import BlockProgress, BlockReport, LayerReport, PruneReport
from .selection import Selection, read_pattern, select_linears
from .solver import COMPENSATING, check_damp, find_method
from .state import PruneState
from .sweep import Run, sweep

USUAL_BLEND = 0.5  # fully dense targets shrink every layer's output a little and wreck deep models


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
    model: nn.Module | Resident,
    *,
    pattern: str | float | Pattern | Mapping[str, str | float | Pattern | None] = "2:4",
    method: str = "alps",
    data: Source | None = None,
    tokenizer: Any = None,
    samples: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    damp: float | None = None,
    blend: float | None = None,
    reconstruct: Reconstruction | None = None,
    options: Options | None = None,
    strict: bool = True,
    batch: int | None = None,
    state_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
    spill_dir: str | PathLike[str] | None = None,
    output: Output | None = None,
    on_progress: Callable[[BlockProgress], None] | None = None,
) -> PruneReport:
    """Prune the linear layers of a model in place, block by block; embeddings, norms and output layer stay.

    Args:
        model: a transformers model with dense floating-point weights, on one device; or one that is loaded
            block by block.
        pattern: as for `prune_weight`, or a mapping of names or `re:<regex>` to patterns or "dense"; the
            first entry that matches decides.
        method, options: as for `prune_weight`.
        data, tokenizer, samples, seq_len, seed: calibration, as for `lissom.evaluation.calibration_windows`,
            or a mapping with `input_ids` and `attention_mask` [S, T]. Only magnitude can do without.
        include, exclude: module names or `re:<regex>`; exclude wins. Naming the output layer includes it.
        damp: share of mean(diag(H)) added to H; None: 0.01, or what does best on held-out tokens for a layer
            with fewer than 2 C tokens.
        blend: weight of the dense model's outputs in every layer's target, 0 to 1; the rest is the layer's
            own output on the inputs that the pruned model makes. None: 0.5 when weights are compensated.
        reconstruct: train each block's kept weights a little after it is solved; None: not at all.
        strict: raise for a chosen layer that cannot be pruned instead of leaving it.
        batch: sequences per forward pass; None: as many as make about 4096 tokens.
        state_dir: folder that keeps finished blocks.
        resume: go on from `state_dir` to the same bits that an uninterrupted run gives.
        ranks: processes that share tokens and solves (`Ranks.join()` under torchrun); None: this one alone.
        spill_dir: folder for hidden states that need not stay in memory; None: in memory.
        output: folder in the making that takes every block when it is done (see `prune_folder`).
        on_progress: called after each block.

    Returns:
        What was pruned, what was left and why, errors and times.

    Raises:
        UnsupportedModelError: an unknown architecture, or packed, quantised or meta weights.
        ValueError: arguments, data or weights that cannot be used; the sentence says which.
    """
    began = time.perf_counter()
    resident = model if isinstance(model, Resident) else Resident(model)
    parts, wanted = describe(resident.model), read_pattern(pattern)
    selection = select_linears(parts, wanted, include=include, exclude=exclude, strict=strict)
    ranks, options = ranks or Ranks(), options or Options()
    _check(resident, selection, method, damp, blend, has_data=data is not None)
    calibration = None
    if data is not None:
        calibration = read_calibration(data, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
        _check_shards(calibration, ranks)
    run = Run(
        resident=resident,
        parts=parts,
        pattern=str(wanted),
        selection=selection,
        method=method,
        damp=damp,
        blend=_blend(blend, method, options, has_data=data is not None),
        reconstruct=reconstruct if data is not None else None,
        options=options,
        calibration=calibration,
        batch=batch,
        ranks=ranks,
        spill=None if spill_dir is None else Spill(spill_dir),
        output=output,
    )
    state = _open_state(run, state_dir, resume)
    with evaluating(resident.model), torch.no_grad():
        layers, blocks = sweep(run, state, on_progress)
    report = _conclude(run, layers, blocks, time.perf_counter() - began)
    resident.model.config.lissom = _provenance(report)
    return report


def prune_folder(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    **arguments: Any,
) -> PruneReport:
    """Prune a model folder into another one with one block of the model in memory at a time.

    Args:
        source: folder with config.json and dense safetensors weights.
        target: folder to write, with ordinary zeros-included weights; complete or not there at all.
        dtype: type of the weights in memory; None: as the config says, else as stored.
        overwrite: allow replacing a model in `target`.
        ranks: as for `prune_model`; the first process writes.
        **arguments: as for `prune_model`. With `spill_dir`, the hidden states of the calibration tokens lie on
            disk as well.

    Returns:
        As `prune_model`.

    Raises:
        CheckpointError: the source is damaged or incomplete.
        FileExistsError: `target` holds a model and `overwrite` is False.
        UnsupportedModelError, ValueError: as for `prune_model`.

    Example:
        >>> prune_folder("llama-70b", "out", data="text.txt", tokenizer=tok)  # doctest: +SKIP
    """
    resident = Resident.open(source, dtype=dtype)
    writes = ranks is None or ranks.rank == 0
    with resident.saving(target, overwrite=overwrite) if writes else nullcontext() as output:
        return prune_model(resident, output=output, ranks=ranks, **arguments)


def _blend(blend: float | None, method: str, options: Options, *, has_data: bool) -> float:
    compensates = has_data and (method in COMPENSATING or bool(options.refit))
    if not compensates:
        return 0.0
    return USUAL_BLEND if blend is None else blend


def _check(
    resident: Resident,
    selection: Selection,
    method: str,
    damp: float | None,
    blend: float | None,
    *,
    has_data: bool,
) -> None:
    find_method(method)
    if damp is not None:
        check_damp(damp)
    if blend is not None and not 0 <= blend <= 1:
        raise ValueError(f"blend must lie in [0, 1], got {blend!r}; {USUAL_BLEND} is usual")
    if not has_data and method != "magnitude":
        raise ValueError(f"method {method!r} needs calibration data; got data=None")
    if getattr(resident.model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "the model is quantised or packed (config.quantization_config): prune the dense one"
        )
    for linear in selection.linears():
        if linear.weight().is_meta and resident.folder is None:
            raise UnsupportedModelError(
                f"{linear.name} is on the meta device and holds no values; load the model first, or prune its "
                "folder (prune_folder)"
            )


def _check_shards(calibration: Calibration, ranks: Ranks) -> None:
    samples = len(next(iter(calibration.inputs.values())))
    if samples < ranks.size:
        raise ValueError(f"{samples} calibration samples cannot be shared out to {ranks.size} processes")


def _open_state(run: Run, state_dir: str | PathLike[str] | None, resume: bool) -> PruneState | None:
    if state_dir is None:
        if resume:
            raise ValueError("resume=True needs state_dir, the folder of the run to go on with")
        return None
    return PruneState(state_dir, run.fingerprint(), resume=resume)


def _conclude(run: Run, layers: list[LayerReport], blocks: list[BlockReport], seconds: float) -> PruneReport:
    return PruneReport(
        method=run.method,
        pattern=run.pattern,
        refit=run.options.refit if run.calibration else False,
        blend=run.blend,
        layers=layers,
        left=run.selection.left,
        blocks=blocks,
        touched_parameters=run.selection.touched_parameters,
        total_parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        calibration=run.calibration.provenance() if run.calibration else {},
        seconds=seconds,
    )


def _provenance(report: PruneReport) -> dict[str, Any]:
    """What config.json keeps about the run."""
    import lissom

    return {
        "version": lissom.__version__,
        "pattern": report.pattern,
        "method": report.method,
        "refit": report.refit,
        "blend": report.blend,
        "sparsity": report.sparsity,
        "calibration": report.calibration,
        "layers": [layer.name for layer in report.layers],
    }
