# SPDX-License-Identifier: Apache-2.0
"""The loop over the blocks of a model: collect statistics, solve, write, move on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..evaluation.data import Calibration
from ..models.resident import Resident
from ..models.spill import Spill
from ..models.stream import BlockStream
from ..models.walk import LinearRef, ModelMap
from .collect import Statistics, Texts, borrow, read_texts
from .pattern import Pattern
from .reconstruct import Reconstruction, reconstruct_block
from .report import BlockProgress, BlockReport, LayerReport
from .selection import Selection, Step
from .settings import Settings
from .solver import Pruned, prune_group
from .state import PruneState, fingerprint

_Inputs = dict[str, torch.Tensor]  # group -> its input tokens [N, C]


@dataclass(frozen=True)
class Run:
    """A run under way.

    Attributes:
        settings: what was asked for.
        resident: the model, and which of its weights are in memory.
        parts: its map.
        pattern: what was asked for, as text.
        selection: the layers to prune and the pattern of each.
        calibration: tokens; None for magnitude without data.
    """

    settings: Settings
    resident: Resident
    parts: ModelMap
    pattern: str
    selection: Selection
    calibration: Calibration | None

    def fingerprint(self) -> dict[str, Any]:
        """What a later run must repeat to go on with this one's state."""
        settings = self.settings
        arguments = {
            "pattern": self.pattern,
            "method": settings.method,
            "damp": settings.damp,
            "blend": settings.target_blend,
            "permute": settings.permute,
            "preserve_mask": settings.preserve_mask,
            **asdict(settings.options),
            "reconstruct": asdict(settings.reconstruct) if settings.reconstruct else None,
            "batch": settings.batch,
            "processes": settings.ranks.size,
            "layers": [linear.name for linear in self.selection.linears()],
        }
        inputs = self.calibration.inputs if self.calibration else {}
        return fingerprint(self.resident.digest(), inputs, arguments)

    def place(self, number: int) -> list[str | nn.Module]:
        """The modules that a step works with: a block, or the output layer and the norm in front of it."""
        blocks = self.parts.blocks
        if number < len(blocks):
            return [blocks[number].module]
        return [*self.parts.tail, self.selection.steps[number].name]

    def apart(self) -> list[nn.Module]:
        """The modules that a forward pass up to the first block does not need."""
        head = [] if self.parts.head is None else [self.parts.head.module]
        return [*(block.module for block in self.parts.blocks), *head]

    def stream(self) -> BlockStream:
        """This process's share of the calibration in front of the first block."""
        assert self.calibration is not None
        settings, device = self.settings, self.resident.device
        inputs = self.calibration.inputs
        part = settings.ranks.shard(len(next(iter(inputs.values()))))
        shard = {name: values[part].to(device) for name, values in inputs.items()}
        batch = settings.batch
        if settings.reconstruct and batch is None:
            batch = settings.reconstruct.sequences
        spill = None if settings.spill_dir is None else Spill(settings.spill_dir)
        return BlockStream(self.resident.model, self.parts, shard, batch=batch, spill=spill)


class _Streams:
    """Calibration inputs on their way through the model: as pruned so far, and as it was."""

    def __init__(self, run: Run) -> None:
        self.run = run
        with run.resident.block(*run.resident.rest(run.apart())):
            self.pruned = run.stream()
            # Until the first pruned weight both are one; the dense one is needed for targets only.
            self.dense = run.stream() if run.settings.target_blend > 0 or run.settings.reconstruct else None
        self._differ = False
        self.tokens = int(run.settings.ranks.sum_(torch.tensor(self.pruned.tokens)))

    def collect(self, step: Step) -> dict[str, Statistics]:
        """Statistics of the inputs of a step's layers, by group; the dense stream moves on behind the step."""
        settings, device = self.run.settings, self.run.resident.device
        found = {
            group: Statistics(linears, settings, self.tokens, device)
            for group, linears in step.groups().items()
        }
        if step.linears and step.linears[0] is self.run.parts.head:
            self._collect_head(next(iter(found.values())))
        else:
            for shown, dense, texts in self._shown(list(found)):
                for group, tokens in shown.items():
                    found[group].add(tokens, texts, None if dense is None else dense[group])
        for statistics in found.values():
            statistics.sum_over(settings.ranks)
        borrow(found, self.pruned, self.tokens, settings.ranks)
        self._differ = True
        return found

    def _shown(self, groups: list[str]) -> Iterator[tuple[_Inputs, _Inputs | None, Texts]]:
        """By batch: what the groups read in the pruned model, in the dense one where that differs, and its texts."""
        if self.dense is not None and self._differ:
            both = self.dense.inputs(groups, advance=True), self.pruned.inputs(groups)
            for dense, shown, texts in zip(*both, self._texts(), strict=True):
                yield shown, dense, texts
        else:
            stream = (
                self.pruned.inputs(groups) if self.dense is None else self.dense.inputs(groups, advance=True)
            )
            for shown, texts in zip(stream, self._texts(), strict=True):
                yield shown, None, texts

    def _texts(self) -> Iterator[Texts]:
        assert self.run.calibration is not None
        sequences = len(next(iter(self.run.calibration.inputs.values())))
        return read_texts(self.pruned, self.run.settings.ranks.shard(sequences).start, sequences)

    def skip(self) -> None:
        """Move the dense stream over a block whose pruned weights are known already, before they are written."""
        if self.dense is not None:
            self.dense.advance()
        self._differ = True

    def reconstruct(self, step: Step, settings: Reconstruction) -> tuple[float, float] | None:
        """Train what a step has pruned against the dense stream, which has moved on behind the block already."""
        if self.dense is None or step.linears[0] is self.run.parts.head:
            return None
        block = self.run.parts.blocks[self.pruned.index].module
        target, ranks = self.dense.hidden, self.run.settings.ranks
        return reconstruct_block(block, step.linears, self.pruned, target, settings=settings, ranks=ranks)

    def _collect_head(self, statistics: Statistics) -> None:
        tail = [self.run.resident.model.get_submodule(name) for name in self.run.parts.tail]
        for (hidden, mask), texts in zip(self.pruned.batches(), self._texts(), strict=True):
            for module in tail:
                hidden = module(hidden)
            tokens = hidden.reshape(-1, hidden.shape[-1])
            statistics.add(tokens if mask is None else tokens[mask], texts)


def sweep(run: Run, state: PruneState | None) -> tuple[list[LayerReport], list[BlockReport]]:
    """Prune the selected layers of a model in place, block after block.

    Args:
        run: what to do.
        state: finished blocks; None keeps none.

    Returns:
        Reports of layers and blocks, in running order.
    """
    settings, steps = run.settings, run.selection.steps
    resumed = [state is not None and state.has(number) for number in range(len(steps))]
    to_solve = [number for number, step in enumerate(steps) if step.linears and not resumed[number]]
    streams = _Streams(run) if to_solve and run.calibration is not None else None
    layers: list[LayerReport] = []
    blocks: list[BlockReport] = []
    for number, step in enumerate(steps):
        clock = _Clock()
        place = run.place(number)
        run.resident.load(*place)
        ahead = streams is not None and number < to_solve[-1]
        statistics: dict[str, Statistics] = {}
        if streams is not None and number in to_solve:
            statistics = streams.collect(step)
        elif streams is not None and ahead:
            streams.skip()
        run.resident.trim()
        clock.lap("collect")
        if state is not None and resumed[number]:
            weights, reports = state.load(number)
        else:
            weights, reports = _solve_step(run, step, statistics)
        for linear in step.linears:
            linear.weight().copy_(weights.pop(linear.name))
        clock.lap("solve")
        losses = None
        if run.settings.reconstruct and streams is not None and number in to_solve:
            losses = streams.reconstruct(step, run.settings.reconstruct)
        clock.lap("reconstruct")
        if state is not None and number in to_solve and run.settings.ranks.rank == 0:
            state.save(number, {linear.name: linear.weight() for linear in step.linears}, reports)
        if streams is not None and ahead:
            streams.pruned.advance()
        if run.settings.output is not None:
            run.settings.output.write(*place)
        run.resident.release(*place)
        clock.lap("advance")
        layers += reports
        blocks.append(BlockReport(step.name, **clock.seconds, losses=losses))
        if settings.on_progress is not None:
            settings.on_progress(_progress(len(steps), blocks, resumed, reports))
    return layers, blocks


def _solve_step(
    run: Run, step: Step, statistics: dict[str, Statistics]
) -> tuple[dict[str, torch.Tensor], list[LayerReport]]:
    """Solve every group of a step, each on one process; all of them get all weights."""
    groups = step.groups()
    costs = [float(sum(ref.shape[0] for ref in refs) * refs[0].shape[1] ** 2) for refs in groups.values()]
    weights: dict[str, torch.Tensor | None] = {linear.name: None for linear in step.linears}
    reports: list[LayerReport] = []
    solves = list(zip(groups.items(), run.settings.ranks.owners(costs), strict=True))
    solves.sort(key=lambda solve: -solve[0][1][0].shape[1])  # the widest first: its sums weigh most
    with run.settings.ranks.section(f"solving {step.name}"):
        for (group, linears), owner in solves:
            known = statistics.pop(group, None)
            if owner != run.settings.ranks.rank:
                continue
            for alike in _by_pattern(step, linears):
                for linear, result, report in _solve_group(run, step.pattern_of(alike[0].name), alike, known):
                    weights[linear.name] = result.weight
                    reports.append(report)
    found = run.settings.ranks.exchange(weights)
    told = {report.name: report for part in run.settings.ranks.gather_objects(reports) for report in part}
    return found, [told[linear.name] for linear in step.linears]


def _by_pattern(step: Step, linears: Sequence[LinearRef]) -> list[list[LinearRef]]:
    parts: dict[str, list[LinearRef]] = {}
    for linear in linears:
        parts.setdefault(str(step.pattern_of(linear.name)), []).append(linear)
    return list(parts.values())


def _solve_group(
    run: Run, pattern: Pattern, linears: Sequence[LinearRef], statistics: Statistics | None
) -> Iterator[tuple[LinearRef, Pruned, LayerReport]]:
    """Prune linears that share input and pattern; their results and reports."""
    began = time.perf_counter()
    originals = [linear.weight() for linear in linears]
    dtype = torch.float64 if originals[0].dtype == torch.float64 else torch.float32
    moments, dead = None, 0
    damp: float | None = None
    if statistics is not None:
        moments = statistics.moments(dtype)
        dead = statistics.dead
        damp = statistics.damping(pattern, originals)
    solved = prune_group(
        originals,
        moments,
        pattern=pattern,
        method=run.settings.method,
        damp=damp or 0.0,
        options=run.settings.options,
        preserve=torch.cat([each == 0 for each in originals]) if run.settings.preserve_mask else None,
        name=linears[0].group,
    )
    seconds = time.perf_counter() - began
    rows = sum(linear.shape[0] for linear in linears)
    for linear, result in zip(linears, solved, strict=True):
        sparsity = result.mask.sum().item() / result.mask.numel()
        if run.settings.preserve_mask and sparsity > pattern.sparsity:
            warnings.warn(
                f"{linear.name}: {sparsity:.1%} are pruned where {pattern} was asked for: the zeros that were there "
                "already lie unevenly",
                stacklevel=2,
            )
        yield (
            linear,
            result,
            LayerReport(
                name=linear.name,
                shape=linear.shape,
                pattern=str(pattern),
                sparsity=sparsity,
                relative_error=result.relative_error,
                seconds=seconds * linear.shape[0] / rows,
                dead_inputs=dead,
                damp=damp,
            ),
        )


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


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"{name}_seconds"] = now - self._last
        self._last = now
