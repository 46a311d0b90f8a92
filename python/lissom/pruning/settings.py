# SPDX-License-Identifier: Apache-2.0
"""Everything that a user may say about a pruning run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from ..evaluation.data import Source
from ..models.resident import Output
from .parallel import Ranks
from .pattern import Pattern
from .problem import Options
from .reconstruct import Reconstruction
from .report import BlockProgress
from .solver import COMPENSATING, check_damp, find_method

# The optimum is flat between a quarter and a third; full dense targets shrink every layer and wreck deep models.
USUAL_BLEND = 0.3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `prune_model`.

    Attributes:
        pattern: as for `prune_weight`, or a mapping of names or `re:<regex>` to patterns or "dense"; the first
            entry that matches decides.
        method, options: as for `prune_weight`.
        data, tokenizer, samples, seq_len, seed: calibration, as for `lissom.evaluation.calibration_windows`,
            or a mapping of what the model is called with, such as `input_ids` and `attention_mask` [S, T].
            Only magnitude can do without.
        include, exclude: module names or `re:<regex>`; exclude wins. Naming the output layer includes it.
        strict: raise for a chosen layer that cannot be pruned instead of leaving it.
        preserve_mask: weights that are exactly zero stay so and count towards the pattern: more is pruned around a
            mask that is there already.
        damp: share of mean(diag(H)) added to H; None: 0.3 C / T for T tokens, at least 0.01; for a layer with
            fewer than 2 C tokens, by what does best on held-out ones.
        blend: weight of the dense model's outputs in every layer's target, 0 to 1; the rest is the layer's own
            output on the inputs that the pruned model makes. None: 0.3 when weights are compensated.
        permute: put channels in an order that suits an n:m pattern first, folded into the neighbouring weights:
            the model computes the same, but its hidden states come out permuted and adapters of the dense model
            no longer fit.
        reconstruct: train each block's kept weights a little after it is solved; None: not at all.
        batch: sequences per forward pass; None: as many as make about 4096 tokens.
        state_dir: folder that keeps finished blocks.
        resume: go on from `state_dir` to the same bits that an uninterrupted run gives.
        ranks: processes that share tokens and solves (`Ranks.join()` under torchrun).
        spill_dir: folder for hidden states that need not stay in memory; None: in memory.
        output: folder in the making that takes every block when it is done (see `prune_folder`).
        on_progress: called after each block.
    """

    pattern: str | float | Pattern | Mapping[str, str | float | Pattern | None] = "2:4"
    method: str = "alps"
    options: Options = field(default_factory=Options)
    data: Source | None = None
    tokenizer: Any = None
    samples: int = 64
    seq_len: int = 1024
    seed: int = 0
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    strict: bool = True
    preserve_mask: bool = False
    damp: float | None = None
    blend: float | None = None
    permute: bool = False
    reconstruct: Reconstruction | None = None
    batch: int | None = None
    state_dir: str | PathLike[str] | None = None
    resume: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    spill_dir: str | PathLike[str] | None = None
    output: Output | None = None
    on_progress: Callable[[BlockProgress], None] | None = None

    def __post_init__(self) -> None:
        find_method(self.method)
        if self.damp is not None:
            check_damp(self.damp)
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise ValueError(f"blend must lie in [0, 1], got {self.blend!r}; {USUAL_BLEND} is usual")
        if self.data is None and self.method != "magnitude":
            raise ValueError(f"method {self.method!r} needs calibration data; got data=None")
        if self.preserve_mask and self.permute:
            raise ValueError("preserve_mask keeps zeros where they are, permute moves channels: choose one")
        if self.resume and self.state_dir is None:
            raise ValueError("resume=True needs state_dir, the folder of the run to go on with")

    @property
    def compensates(self) -> bool:
        """Whether kept weights make up for those that go."""
        return self.data is not None and (self.method in COMPENSATING or bool(self.options.refit))

    @property
    def target_blend(self) -> float:
        """The blend asked for, or the usual one; 0 where nothing is compensated."""
        if not self.compensates:
            return 0.0
        return USUAL_BLEND if self.blend is None else self.blend
