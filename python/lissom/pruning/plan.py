# SPDX-License-Identifier: Apache-2.0
"""What a pruning run would touch, need and take, without computing it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.stream import BATCH_TOKENS
from ..models.walk import Block, LinearRef, ModelMap, describe
from .driver import read_settings
from .permute import WINDOW
from .reconstruct import Reconstruction
from .report import PrunePlan
from .selection import Selection, read_pattern, select_linears
from .settings import Settings
from .shifted import BAND
from .solver import COMPENSATING

_PANEL = 512  # rows of a panel of a Gram matrix, as `Gram` keeps it
_PROCESS_BYTES = 380 << 20  # Python, torch and transformers before the first weight; measured
_BYTE_SECONDS = 1.25e-10  # of one thread in an elementwise operation on large tensors; measured
# Operations on a C x C matrix, over C^3, as if they ran at the speed of a product of matrices; measured.
_BANDED, _INVERSE, _CHOLESKY = 5, 3, 2
_THIN = 3  # times as slow are products as narrow as the band; measured
_ORDER_SECONDS = (
    1e-10  # of one thread, to compare two columns in one row when channels are put in order; measured
)
_ORDER_TOKENS = 8192
_ADMM_ITERATIONS, _REFIT_ITERATIONS, _REFIT_AFTER_ADMM, _REFIT_TO_CHOOSE = 28, 11, 6, 30


def plan_prune(model: nn.Module, *, streamed: bool = False, **arguments: Any) -> PrunePlan:
    """Say what `prune_model` with these arguments would touch, and estimate its memory and time.

    Args:
        model: a transformers model; may live on the meta device.
        streamed: by `prune_folder`, which has one block of the model in memory at a time.
        **arguments: as for `prune_model`. Calibration data is not read; leave it out, or say `data=None` for a
            run without.

    Returns:
        The plan. Nothing is computed but a few short matmuls, whose speed gives the estimate of the time.

    Raises:
        UnsupportedModelError: an unknown architecture.
        ValueError: arguments that cannot be used, or nothing to prune.

    Example:
        >>> from lissom.models.tiny import build_tiny
        >>> len(plan_prune(build_tiny("llama"), pattern="2:4").touched)
        21
    """
    settings = read_settings({"data": "", **arguments})
    parts, wanted = describe(model), read_pattern(settings.pattern)
    selection = select_linears(
        parts, wanted, include=settings.include, exclude=settings.exclude, strict=settings.strict
    )
    job = _Job(settings, parts, selection, _routed(model))
    return PrunePlan(
        method=settings.method,
        pattern=str(wanted),
        touched=[linear.name for linear in selection.linears()],
        left=selection.left,
        touched_parameters=selection.touched_parameters,
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        peak_bytes=_PROCESS_BYTES + _peak_bytes(model, job, streamed=streamed),
        estimated_seconds=_seconds(job, _Rates.measure(job.first.parameter.dtype)),
    )


@dataclass(frozen=True)
class _Job:
    """What decides how long a run takes and how much memory it needs; `routed` is experts per token."""

    settings: Settings
    parts: ModelMap
    selection: Selection
    routed: int

    @property
    def tokens(self) -> int:
        """Calibration tokens of one process."""
        settings = self.settings
        return -(-settings.samples // settings.ranks.size) * settings.seq_len if self.calibrated else 0

    @property
    def calibrated(self) -> bool:
        """Whether the run reads data."""
        return self.settings.data is not None

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass."""
        batch = self.settings.batch
        if self.reconstruct and batch is None:
            batch = self.reconstruct.sequences
        tokens = batch * self.settings.seq_len if batch else max(self.settings.seq_len, BATCH_TOKENS)
        return min(self.tokens, tokens)

    @property
    def blend(self) -> bool:
        """Whether targets come from the dense model as well."""
        return self.settings.target_blend > 0

    @property
    def reconstruct(self) -> Reconstruction | None:
        """How blocks are trained."""
        return self.settings.reconstruct if self.calibrated else None

    @property
    def streams(self) -> int:
        """Hidden states of all tokens that are kept: the pruned model's, and the dense one's for targets."""
        return 2 if self.blend or self.reconstruct else 1

    @property
    def first(self) -> LinearRef:
        """The first linear: it reads hidden states, and its weight has the model's type."""
        return self.parts.linears()[0]

    def load(self, linear: LinearRef) -> float:
        """Share of the tokens that reach a linear."""
        return min(1.0, self.routed / len(linear.parameter)) if linear.routed else 1.0

    def blends(self, routed: bool) -> bool:
        """Whether a layer's target comes from the dense model as well: never that of a routed expert, to which
        the dense model may send other tokens."""
        return self.blend and not routed

    def few_tokens(self, columns: int, routed: bool = False) -> bool:
        """Whether a damping is chosen by halves of the tokens."""
        settings = self.settings
        few = self.tokens < 2 * columns and not routed
        return few and settings.damp is None and settings.compensates

    def borrows(self, linear: LinearRef) -> bool:
        """Whether an expert is shown tokens that the router sends elsewhere."""
        return linear.routed and 0 < self.tokens * self.load(linear) < 2 * linear.shape[1]

    def problems(self) -> Iterator[tuple[int, int, bool]]:
        """Rows, columns and whether it is a routed expert of every problem: linears that share input and pattern."""
        for step in self.selection.steps:
            for group in step.groups().values():
                rows: dict[str, int] = {}
                for linear in group:
                    text = str(self.selection.patterns[linear.name])
                    rows[text] = rows.get(text, 0) + linear.shape[0]
                yield from ((count, group[0].shape[1], group[0].routed) for count in rows.values())


@dataclass(frozen=True)
class _Rates:
    """Speed of this machine: operations per second, and seconds per byte of an elementwise operation."""

    model: float
    solve: float
    gram: float
    byte: float
    itemsize: int
    threads: int

    @classmethod
    def measure(cls, dtype: torch.dtype) -> _Rates:
        model, solve, threads = _matmul_rate(dtype), _matmul_rate(torch.float32), torch.get_num_threads()
        # Sums of products of bfloat16 inputs in float32 run at a good fifth of the model's own products.
        gram = max(solve, 0.22 * model) if dtype == torch.bfloat16 else solve
        return cls(model, solve, gram, _BYTE_SECONDS / threads, dtype.itemsize, threads)


def _routed(model: Any) -> int:
    """Experts that each token reaches."""
    return getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1


def _peak_bytes(model: nn.Module, job: _Job, *, streamed: bool) -> int:
    """Of the model, and of the work; what is outside the blocks of a streamed model is needed before the work."""
    whole, work = _module_bytes(model), _work_bytes(job)
    if not streamed:
        return whole + work
    blocks = [_module_bytes(block.module) for block in job.parts.blocks]
    return max(whole - sum(blocks), max(blocks) + work)


def _module_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _work_bytes(job: _Job) -> int:
    """Memory at the peak beside the process and the model."""
    size = job.first.parameter.element_size()
    hidden = job.streams * job.tokens * job.first.shape[1] * size if job.settings.spill_dir is None else 0
    forward = collected = lent = trained = 0
    for block in job.parts.blocks if job.tokens else ():
        # One batch inside a block: about every linear's input and output, and one input widened to float32.
        activations = sum(sum(linear.shape) * job.load(linear) for linear in block.linears) * size
        widened = 4 * max((linear.shape[1] for linear in block.linears), default=0)
        # The dense model's inputs of all groups wait for the pruned model's.
        inputs = {linear.group: linear.shape[1] * job.load(linear) for linear in block.linears}
        waiting = size * sum(inputs.values()) * (job.streams - 1)
        forward = max(forward, int(job.batch_tokens * (activations + widened + waiting)))
    for step in job.selection.steps:
        firsts = [group[0] for group in step.groups().values()]
        collected = max(collected, sum(_statistics_bytes(job, linear) for linear in firsts))
        # What experts borrow is summed up apart from what they saw.
        lent = max(lent, sum(_gram_bytes(linear.shape[1]) for linear in firsts if job.borrows(linear)))
        weights = sum(linear.shape[0] * linear.shape[1] for linear in step.linears)
        if job.reconstruct:
            # Weights in float32, their gradients and Adam's two moments; what autograd keeps of a batch.
            trained = max(trained, weights * (16 + size) + 3 * forward)
    solved = max((_solve_bytes(job, *problem) for problem in job.problems()), default=0)
    return hidden + max(collected + lent + forward, collected + solved, trained)


def _gram_bytes(columns: int) -> int:
    """A sum in float64, of which panels of 512 rows hold what lies on and above the diagonal."""
    return 8 * sum(min(_PANEL, columns - low) * (columns - low) for low in range(0, columns, _PANEL))


def _statistics_bytes(job: _Job, first: LinearRef) -> int:
    """Sums over the inputs of the group of a linear; the one against the dense model's inputs is a whole matrix."""
    if not job.tokens:
        return 0
    columns, routed = first.shape[1], first.routed
    whole = 8 * columns**2 * job.blends(routed)
    return whole + _gram_bytes(columns) * (1 + job.few_tokens(columns, routed))


def _solve_bytes(job: _Job, rows: int, columns: int, routed: bool = False) -> int:
    """Copies in float32 of a problem's matrices that are alive at once."""
    if not job.tokens:
        return 4 * 3 * rows * columns
    squares = {"alps": 5, "sparsegpt": 4, "mrp": 4}.get(job.settings.method, 3) + 2 * job.blends(routed)
    return 4 * (squares * columns**2 + 8 * rows * columns)


def _seconds(job: _Job, rates: _Rates) -> float:
    if not job.tokens:
        return 0.0
    seconds = 0.0
    for step, block in zip(job.selection.steps, job.parts.blocks):
        forward = job.tokens * _forward_seconds(job, block, rates)
        # The dense stream's pass, the pruned one's for the statistics, and its pass through the pruned block.
        seconds += (1 + job.streams + any(map(job.borrows, step.linears))) * forward
        if job.reconstruct and step.linears:
            weights = sum(linear.shape[0] * linear.shape[1] for linear in step.linears)
            updates = job.reconstruct.passes * job.tokens / job.batch_tokens
            # A pass forward and two backward over all tokens; Adam touches about 110 bytes of each weight.
            seconds += 3 * job.reconstruct.passes * forward + 110 * updates * weights * rates.byte
    for step in job.selection.steps:
        for first, *_ in step.groups().values():
            tokens = job.tokens * job.load(first)
            if job.borrows(first):
                tokens = min(job.tokens, 2 * first.shape[1])
            seconds += tokens * _statistics_seconds(job, first, rates)
    if job.settings.permute:
        seconds += _order_seconds(job, rates)
    return seconds + sum(_solve_seconds(job, rates, *problem) for problem in job.problems())


def _order_seconds(job: _Job, rates: _Rates) -> float:
    """Of the search for an order of the channels: a pass of some tokens, scores of all weights, exchanges."""
    tokens = min(job.tokens, _ORDER_TOKENS)
    seconds = tokens * sum(_forward_seconds(job, block, rates) for block in job.parts.blocks)
    for rows, columns, _ in job.problems():
        comparisons = rows * columns * min(columns, WINDOW)
        seconds += comparisons * _ORDER_SECONDS / rates.threads + 160 * rows * columns * rates.byte
    return seconds


def _forward_seconds(job: _Job, block: Block, rates: _Rates) -> float:
    """Of one token through one block."""
    shapes = [(linear.shape, job.load(linear)) for linear in block.linears]
    # A block's products reach three quarters of the rate of large ones, attention an eighth; norms, gates and
    # residuals read and write each linear's input and output about five times.
    products = 2 * sum(load * rows * columns for (rows, columns), load in shapes) / (0.75 * rates.model)
    attention = 2 * job.settings.seq_len * job.first.shape[1] / (0.13 * rates.model)
    entries = sum(load * (rows + columns) for (rows, columns), load in shapes)
    passes = 5 * entries * rates.itemsize * rates.byte
    return products + attention + passes


def _statistics_seconds(job: _Job, first: LinearRef, rates: _Rates) -> float:
    """Of one token in the sums over the inputs of the group of a linear."""
    columns = first.shape[1]
    operations = columns**2 + 512 * columns + 2 * columns**2 * job.blends(first.routed)
    return operations / rates.gram + 2 * columns * rates.itemsize * rates.byte


def _solve_seconds(job: _Job, rates: _Rates, rows: int, columns: int, routed: bool = False) -> float:
    """Of one problem: target, mask and weights, refit, and the error that is reported."""
    method, options = job.settings.method, job.settings.options
    product, cube = 2 * rows * columns**2, columns**3
    sweep = 4 * rows * columns * rates.byte  # one read or write of the weights
    work: float = (_CHOLESKY * cube + 2 * product) * (1 + job.blends(routed))
    seconds = 100 * columns**2 * rates.byte + 15 * sweep  # checks, casts, mask
    refit = product / rates.solve + 4 * sweep  # one iteration
    iterations = _REFIT_AFTER_ADMM if method == "alps" else _REFIT_ITERATIONS
    if method == "alps":
        if rows > columns:
            work += _ADMM_ITERATIONS * (_INVERSE * cube + product)
        else:
            inside = _THIN * 4 * BAND * rows * columns
            work += _BANDED * cube + _ADMM_ITERATIONS * (2 * product + inside)
        seconds += 8 * _ADMM_ITERATIONS * sweep
    elif method in COMPENSATING:
        work += 2 * _CHOLESKY * cube + product / 2
        width = min(options.blocksize, columns)
        # Inside a block of columns: a rank-1 update for each (sparsegpt), or a small system for each row (mrp).
        joint = method == "mrp" and options.variant != "SS"
        seconds += rows * columns * (width**2 / 4 * 1.5e-11 if joint else width / 2 * 0.2e-9)
    if job.few_tokens(columns, routed):
        # Five dampings, each fitted to either half of the tokens.
        seconds += 10 * (_REFIT_TO_CHOOSE * refit + (_CHOLESKY * cube + 4 * product) / rates.solve)
    if options.refit == "exact":
        work += rows * (columns / 2) ** 3 / 3 / 0.2
    elif options.refit:
        work += 2 * product
        seconds += iterations * refit
    return seconds + work / rates.solve


def _matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of a matmul of two 1024 x 1024 matrices, here and now."""
    left = torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best
