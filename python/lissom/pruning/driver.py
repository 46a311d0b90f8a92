# SPDX-License-Identifier: Apache-2.0
"""Prunes a whole model block by block, each block on the outputs of the pruned blocks before it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..evaluation.data import Calibration, read_calibration
from ..models.resident import Resident
from ..models.stream import evaluating
from ..models.walk import UnsupportedModelError, describe, plain_name
from .arrange import check_permutable, permute_channels
from .mrp import check_variant
from .parallel import Ranks
from .pattern import Pattern
from .report import BlockReport, LayerReport, PruneReport
from .selection import Selection, read_pattern, select_linears, unpackable
from .settings import Settings
from .solver import check_options
from .state import PruneState
from .sweep import Run, sweep


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


def prune_model(model: nn.Module | Resident, **arguments: Any) -> PruneReport:
    """Prune the linear layers of a model in place, block by block; embeddings, norms and output layer stay.

    Args:
        model: a transformers model with dense floating-point weights, on one device, compiled or not; or one
            that is loaded block by block.
        **arguments: the fields of `Settings`.

    Returns:
        What was pruned, what was left and why, errors and times.

    Raises:
        UnsupportedModelError: an unknown architecture, or packed, quantised or meta weights.
        ValueError: arguments, data or weights that cannot be used; the sentence says which.

    Example:
        >>> from lissom.models.tiny import build_tiny
        >>> report = prune_model(build_tiny("llama"), pattern="50%", method="magnitude")
        >>> len(report.layers), report.sparsity
        (21, 0.5)
    """
    began = time.perf_counter()
    settings = read_settings(arguments)
    resident = model if isinstance(model, Resident) else Resident(model)
    parts, pattern = describe(resident.model), read_pattern(settings.pattern)
    selection = select_linears(
        parts, pattern, include=settings.include, exclude=settings.exclude, strict=settings.strict
    )
    _check(resident, selection)
    run = Run(settings, resident, parts, str(pattern), selection, _calibration(settings))
    if settings.permute:
        check_permutable(run)
    state = _open_state(run)
    with evaluating(resident.model), _eager(resident.model), torch.no_grad(), _telling(run):
        if settings.permute:
            permute_channels(run, state)
        layers, blocks = sweep(run, state)
    report = _conclude(run, layers, blocks, time.perf_counter() - began)
    resident.model.config.lissom = _provenance(report, settings)
    return report


def prune_folder(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    format: str = "dense",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    **arguments: Any,
) -> PruneReport:
    """Prune a model folder into another one with one block of the model in memory at a time.

    Args:
        source: folder with config.json and dense safetensors weights.
        target: folder to write; complete or not there at all.
        dtype: type of the weights in memory; None: as the config says, else as stored.
        format: "dense", ordinary weights with their zeros, or "packed", 2:4 linears as values and metadata.
        max_shard_size: weights above this size are split into several files.
        overwrite: allow replacing a model in `target`.
        **arguments: as for `prune_model`. With `spill_dir`, the hidden states of the calibration tokens lie on
            disk as well; of several processes (`ranks`), the first one writes.

    Returns:
        As `prune_model`.

    Raises:
        CheckpointError: the source is damaged or incomplete.
        FileExistsError: `target` holds a model and `overwrite` is False.
        UnsupportedModelError, ValueError: as for `prune_model`; a format that is unknown or does not hold the pattern.

    Example:
        >>> prune_folder("llama-70b", "out", data="text.txt", tokenizer=tok)  # doctest: +SKIP
    """
    from transformers.utils.hub import convert_file_size_to_int

    if format not in ("packed", "dense"):
        raise ValueError(f"format must be 'packed' or 'dense', got {format!r}")
    misfit = unpackable(arguments.get("pattern", Settings.pattern)) if format == "packed" else None
    if misfit:
        raise ValueError(
            f"format 'packed' holds at most two of every four weights, got {misfit}: write 'dense'"
        )
    shard = convert_file_size_to_int(max_shard_size)
    resident = Resident.open(source, dtype=dtype)
    writes = arguments.get("ranks", Ranks()).rank == 0
    saving = partial(
        resident.saving, target, overwrite=overwrite, packed=format == "packed", shard_bytes=shard
    )
    with saving() if writes else nullcontext() as output:
        return prune_model(resident, output=output, **arguments)


def read_settings(arguments: Mapping[str, Any]) -> Settings:
    """The settings of a run, of which none is given in vain.

    Args:
        arguments: fields of `Settings`.

    Returns:
        The settings.

    Raises:
        ValueError: one that cannot be used, or that the others leave without effect.
    """
    settings = Settings(**arguments)
    check_options(settings.method, settings.options)
    if settings.method == "mrp":
        pattern = read_pattern(settings.pattern)
        for each in [pattern] if isinstance(pattern, Pattern) else pattern.values():
            if each is not None:
                check_variant(each, settings.options.variant)
    if settings.reconstruct is not None and settings.data is None:
        raise ValueError("reconstruct trains blocks on calibration data; got data=None")
    if settings.blend and not settings.compensates:
        why = "data=None" if settings.data is None else f"method {settings.method!r} with refit=False"
        raise ValueError(
            f"blend {settings.blend!r} is about targets of weights that make up for others, and {why} changes no "
            "kept weight: leave it out"
        )
    return settings


@contextmanager
def _telling(run: Run) -> Iterator[None]:
    """Say more when a run ends early: what became of the model in memory, and which weight is to blame."""
    before = _versions(run)
    try:
        yield
    except BaseException as error:
        changed = sum(before[name] != version for name, version in _versions(run).items())
        if changed:
            resume = " with resume=True" if run.settings.state_dir is not None else ""
            warnings.warn(
                f"pruning ended early: {changed} of {len(before)} layers of the model in memory are changed already, "
                f"and config.lissom does not say so; load the model again before you prune it{resume}",
                stacklevel=4,
            )
        if isinstance(error, ValueError):
            _blame_weights(run, error)
        raise


def _versions(run: Run) -> dict[str, int]:
    """How often each layer was written to; of a folder none, for its weights are read again."""
    if run.resident.folder is not None:
        return {}
    return {linear.name: linear.parameter._version for linear in run.selection.linears()}


def _blame_weights(run: Run, error: ValueError) -> None:
    """A weight that is not finite comes out as an overflow in a later layer: name the weight instead.

    Raises:
        ValueError: there is one.
    """
    head, resident = run.parts.head, run.resident
    with resident.block(*resident.rest(run.apart())):  # embeddings and the like; the block is still there
        for name, parameter in resident.model.named_parameters():
            unused = head is not None and name == head.stored and head.name not in run.selection.patterns
            if parameter.is_meta or unused or torch.isfinite(parameter).all():
                continue
            raise ValueError(
                f"{plain_name(name)} holds infinite or NaN values: the model is damaged"
            ) from error


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Let nothing compiled run: its blocks are called one by one, with hooks that leave them half-way."""
    compiled = any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()
    )
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def _calibration(settings: Settings) -> Calibration | None:
    if settings.data is None:
        return None
    calibration = read_calibration(
        settings.data,
        settings.tokenizer,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=settings.seed,
    )
    samples = len(next(iter(calibration.inputs.values())))
    if samples < settings.ranks.size:
        raise ValueError(
            f"{samples} calibration samples cannot be shared out to {settings.ranks.size} processes"
        )
    return calibration


def _open_state(run: Run) -> PruneState | None:
    """The folder of finished blocks, made by the first process; all of them must be about the same run."""
    settings, ranks = run.settings, run.settings.ranks
    if settings.state_dir is None and ranks.size == 1:
        return None
    fingerprint = run.fingerprint()
    ranks.same("the run (model, data and arguments)", fingerprint)
    if settings.state_dir is None:
        return None
    if ranks.rank == 0:
        state = PruneState(settings.state_dir, fingerprint, resume=settings.resume)
    ranks.barrier()
    return state if ranks.rank == 0 else PruneState(settings.state_dir, fingerprint, resume=True)


def _check(resident: Resident, selection: Selection) -> None:
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


def _conclude(run: Run, layers: list[LayerReport], blocks: list[BlockReport], seconds: float) -> PruneReport:
    return PruneReport(
        method=run.settings.method,
        pattern=run.pattern,
        refit=run.settings.options.refit if run.calibration else False,
        blend=run.settings.target_blend,
        permuted=run.settings.permute,
        layers=layers,
        left=run.selection.left,
        blocks=blocks,
        touched_parameters=run.selection.touched_parameters,
        total_parameters=sum(parameter.numel() for parameter in run.resident.model.parameters()),
        calibration=run.calibration.provenance() if run.calibration else {},
        seconds=seconds,
    )


def _provenance(report: PruneReport, settings: Settings) -> dict[str, Any]:
    """What config.json keeps about the run; a damping of None was chosen by the number of tokens."""
    import lissom

    return {
        "version": lissom.__version__,
        "pattern": report.pattern,
        "method": report.method,
        "refit": report.refit,
        "blend": report.blend,
        "damp": settings.damp,
        "permuted": report.permuted,
        "reconstruct": asdict(settings.reconstruct) if settings.reconstruct else None,
        "sparsity": report.sparsity,
        "calibration": report.calibration,
        "layers": [layer.name for layer in report.layers],
    }
