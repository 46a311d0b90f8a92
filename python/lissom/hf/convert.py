# SPDX-License-Identifier: Apache-2.0
"""Turns folders with 2:4 weights, in retired formats or dense, into packed ones, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lissom
from lissom.hf.atomic import replacing_directory
from lissom.hf.card import CardFacts, render_card
from lissom.hf.checkpoint import (
    CONFIG_NAME,
    META_SUFFIX,
    PATTERN,
    check_folder,
    packed_entry,
)
from lissom.hf.foreign.canonical import Foreign
from lissom.hf.foreign.declared import without_declaration
from lissom.hf.foreign.dense import FORMAT as DENSE
from lissom.hf.foreign.plan import Layer, Plan, Scales, make_plan
from lissom.hf.side import CARD_NAME, copy_side_files, side_files
from lissom.models.shards import ShardWriter, Stored

_PATIENCE = 2.0  # seconds between two messages, and before the first
_WORTH_TELLING = 3.0  # seconds left that are worth a first message

Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class ConvertReport:
    """What :func:`convert_folder` wrote, or what :func:`plan_conversion` says it would.

    Attributes:
        source: the folder that was read.
        target: the folder that was written; None in a plan.
        layers: every foreign weight, packed or written out.
        dense: tensors that were copied bit for bit, and `dense_bytes` of them.
        source_bytes: bytes of all tensors before, and `output_bytes` after.
        peak_bytes: memory that conversion needs beside the program, at most.
        files: names of the files in the target; `left` names those of the source that were not taken along.
        notes: what the user should know.
        seconds: how long it took.
    """

    source: str
    target: str | None
    layers: tuple[Layer, ...]
    dense: int
    dense_bytes: int
    source_bytes: int
    output_bytes: int
    peak_bytes: int
    files: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def packed(self) -> tuple[Layer, ...]:
        """The layers that are packed now."""
        return tuple(layer for layer in self.layers if layer.packed)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def convert_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    scales: Scales = "auto",
    overwrite: bool = False,
    on_event: Listener | None = None,
) -> ConvertReport:
    """Converts a local model folder with 2:4 weights, in a retired format or dense, into a packed one.

    Reads `sparse-24-bitmask` and `sparse-bitmask` of compressed-tensors, marlin-24 as compressed-tensors, vLLM's
    GPTQ loader and Sparse-Marlin name its tensors, and ordinary weights with their zeros, of which the linears that
    are 2:4 are packed. Weights that were stored as integers are dequantised. Other tensors are copied bit for bit,
    tokenizer and other side files too. Of the weights, one at a time is in memory. The target appears when it is
    complete; an interruption leaves it as it was.

    Args:
        source: folder with config.json and safetensors weights, in one file or several.
        target: folder to write; `lissom.hf.load_model` and `AutoModelForCausalLM.from_pretrained` load it.
        dtype: type of weights that were stored as integers: float16, bfloat16 or float32; None: as the config says,
            else float16.
        scales: order of marlin-24 scales with several groups: "kernel", "plain", or "auto" by the version of
            compressed-tensors that wrote them.
        overwrite: allow replacing a model that is in the target.
        on_event: called with stages and, when it takes more than some seconds, progress.

    Returns:
        What was converted.

    Raises:
        CheckpointError: the source is damaged, incomplete, or of a format that lissom does not read.
        FileExistsError: the target holds a model and `overwrite` is False.
        ValueError: unknown dtype or scales, or the target is the source.

    Example:
        >>> convert_folder("/nowhere", "out")
        Traceback (most recent call last):
        lissom.hf.checkpoint.CheckpointError: /nowhere is not a model folder: there is no such folder...
    """
    start = time.perf_counter()
    tell = on_event or (lambda event: None)
    folder, goal = Path(source), Path(target)
    _check_target(folder, goal, overwrite=overwrite)
    tell({"event": "stage", "text": f"reading the headers of {folder}"})
    plan = make_plan(folder, dtype=dtype, scales=scales)
    _check_room(goal, plan.output_bytes)
    tell({"event": "stage", "text": f"writing {goal}"})
    with replacing_directory(goal, overwrite=overwrite) as fresh:
        shards = ShardWriter(fresh, plan.names())
        shards.copy(_outputs(plan, _Progress(plan, tell)))
        shards.finish()
        _write_side_files(plan, fresh, goal)
        check_folder(fresh)
        files = tuple(sorted(entry.name for entry in fresh.iterdir()))
    return _report(plan, target=str(goal), files=files, seconds=time.perf_counter() - start)


def plan_conversion(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, scales: Scales = "auto"
) -> ConvertReport:
    """Says what :func:`convert_folder` would do; it reads bit masks and dense matrices, no other weights.

    Args:
        source, dtype, scales: as for :func:`convert_folder`.

    Returns:
        A report without a target.

    Raises:
        CheckpointError, ValueError: as for :func:`convert_folder`, as far as headers tell.
    """
    return _report(make_plan(Path(source), dtype=dtype, scales=scales))


def _report(
    plan: Plan, *, target: str | None = None, files: tuple[str, ...] = (), seconds: float = 0.0
) -> ConvertReport:
    _, left = side_files(plan.folder)
    return ConvertReport(
        source=str(plan.folder),
        target=target,
        layers=tuple(plan.layers),
        dense=len(plan.others),
        dense_bytes=sum(each.size for each in plan.others),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        peak_bytes=plan.peak_bytes,
        files=files,
        left=tuple(left),
        notes=tuple(plan.notes),
        seconds=seconds,
    )


def _check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"the target {target} is the source itself: choose another folder")
    if target.exists() and target.resolve() == Path.cwd():
        # The folder is replaced as a whole: the shell that stands in it would stand in a deleted one.
        raise ValueError(f"the target {target} is the current folder: choose another one")
    if (target / CONFIG_NAME).exists() and not overwrite:
        raise FileExistsError(
            f"{target} already holds a model: choose another folder, or pass overwrite=True (--overwrite)"
        )


def _check_room(target: Path, needed: int) -> None:
    parent = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            f"the converted weights need {needed / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB left: make room or "
            "choose a target on another disk"
        )


@dataclass
class _Output:
    """A tensor of the new checkpoint, made when it is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    produce: Callable[[], Iterator[bytes | memoryview]]
    done: Callable[[], None]

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Its bytes, piece by piece."""
        yield from self.produce()
        self.done()


def _outputs(plan: Plan, progress: _Progress) -> Iterator[_Output]:
    """The new tensors, in the order in which the old ones lie in their files."""
    for part in plan.order:
        if isinstance(part, Stored):
            yield _Output(
                part.name,
                part.dtype,
                part.shape,
                part.size,
                part.chunks,
                progress.after(part.name, part.size),
            )
            continue
        layer, weight = part
        done = progress.after(layer.name, layer.source_bytes)
        if not layer.packed:
            yield _Output(
                layer.name, weight.dtype, weight.shape, layer.output_bytes, _written_out(weight), done
            )
            continue
        rows, columns = weight.shape
        meta_shape = (rows, (columns + 7) // 8)
        meta_bytes = meta_shape[0] * meta_shape[1]
        made = _Packing(weight)
        name, values_bytes = layer.name, layer.output_bytes - meta_bytes
        meta_name = f"{name.removesuffix('.weight')}{META_SUFFIX}"
        yield _Output(name, weight.dtype, (rows, columns // 2), values_bytes, made.values, lambda: None)
        yield _Output(meta_name, "U8", meta_shape, meta_bytes, made.meta, done)


def _written_out(weight: Foreign) -> Callable[[], Iterator[memoryview]]:
    def produce() -> Iterator[memoryview]:
        for block in weight.dense():
            yield _bytes_of(block)

    return produce


class _Packing:
    """A weight that is packed when its values are asked for and forgotten when its metadata have been."""

    def __init__(self, weight: Foreign) -> None:
        self._weight = weight
        self._meta: torch.Tensor | None = None

    def values(self) -> Iterator[memoryview]:
        values, self._meta = self._weight.packed()
        yield _bytes_of(values)

    def meta(self) -> Iterator[memoryview]:
        assert self._meta is not None
        meta, self._meta = self._meta, None
        yield _bytes_of(meta)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


class _Progress:
    """Tells how far it is and how long it will take, where that is long."""

    def __init__(self, plan: Plan, tell: Listener) -> None:
        self._total, self._of = plan.source_bytes, len(plan.order)
        self._tell = tell
        self._start = self._last = time.perf_counter()
        self._bytes = self._done = 0
        self._told = False

    def after(self, name: str, size: int) -> Callable[[], None]:
        """What to call once a tensor is written."""

        def done() -> None:
            self._bytes += size
            self._done += 1
            self._maybe_tell(name)

        return done

    def _maybe_tell(self, name: str) -> None:
        now = time.perf_counter()
        left = (now - self._start) * (self._total - self._bytes) / max(self._bytes, 1)
        last = self._done == self._of
        if (now - self._last < _PATIENCE or (not self._told and left < _WORTH_TELLING)) and not (
            last and self._told
        ):
            return
        self._last, self._told = now, True
        self._tell(
            {
                "event": "progress",
                "step": "convert",
                "done": self._done,
                "of": self._of,
                "name": name,
                "relative_error": None,
                "remaining_seconds": left,
            }
        )


def _write_side_files(plan: Plan, fresh: Path, target: Path) -> None:
    copy_side_files(plan.folder, fresh)
    config = _new_config(plan)
    (fresh / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    cards = (folder / CARD_NAME for folder in (plan.folder, target))
    old = next((card for card in cards if card.is_file()), None)
    existing = old.read_text(encoding="utf-8", errors="replace") if old else None
    packed = sum(layer.packed for layer in plan.layers)
    card = render_card(
        CardFacts(), config["lissom"], format="packed", packed_modules=packed, existing=existing
    )
    (fresh / CARD_NAME).write_text(card, encoding="utf-8")


def _new_config(plan: Plan) -> dict[str, Any]:
    config = without_declaration(plan.config)
    if plan.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = plan.dtype
    before = config.get("lissom")
    before = before if isinstance(before, dict) else {}
    formats = sorted({layer.format.partition(",")[0] for layer in plan.layers})
    made = f"converted from {' and '.join(formats)}"
    config["lissom"] = before | {
        "version": lissom.__version__,
        "method": before.get("method", made) if formats == [DENSE] else made,
        "pattern": PATTERN,
        "format": "packed",
    }
    if plan.writer:
        config["lissom"]["writer"] = plan.writer
    packed = [layer.name.removesuffix(".weight") for layer in plan.layers if layer.packed]
    config["quantization_config"] = packed_entry(packed)
    return config
