# SPDX-License-Identifier: Apache-2.0
"""What a run knows about the inputs of the layers that it is about to solve."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..models.stream import BlockStream
from ..models.walk import LinearRef
from .damping import FEW_TOKENS_DAMP, choose_damp, usual_damp
from .gram import CrossGram, Gram
from .parallel import Ranks
from .pattern import Pattern
from .settings import Settings
from .solver import Moments

# Tokens whose inputs differ between the dense and the pruned model by as many times the median of their sequence.
_OUTLYING = 100.0


@dataclass(frozen=True)
class Texts:
    """Which sequences the tokens of a batch are of.

    Attributes:
        lengths: real tokens of each sequence.
        first: bool [N], tokens of the first half of the calibration.
    """

    lengths: list[int]
    first: torch.Tensor


class Statistics:
    """Second moments of the input of one group of linears.

    With few tokens (fewer than 2 per input) two halves of them are kept apart, so that a damping can be
    chosen by how a solution for one half does on the other.

    Args:
        linears: of the group.
        settings: of the run.
        tokens: that the run calibrates on, in all processes.
        device: where the sums live.
    """

    def __init__(
        self, linears: Sequence[LinearRef], settings: Settings, tokens: int, device: torch.device
    ) -> None:
        first = linears[0]
        columns = first.shape[1]
        self.gram = Gram(columns, first.group, device=device)
        self.routed = first.routed
        self.pool = first.pool
        self.half: Gram | None = None
        self.dead = 0  # inputs that were zero on every token; known with the moments
        self._settings = settings
        blended = settings.target_blend > 0 and not first.routed
        self._cross = CrossGram(columns, device=device) if blended else None
        few = tokens < 2 * columns and not first.routed
        if few and settings.damp is None and settings.compensates:
            self.half = Gram(columns, first.group, device=device)
        self._crossed = False
        self._moments: Moments | None = None

    @property
    def missing(self) -> int:
        """Tokens short of 2 per input."""
        return max(0, 2 * len(self.gram) - self.gram.tokens)

    def add(self, tokens: torch.Tensor, texts: Texts, dense: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            tokens: [N, C], what the group reads in the pruned model.
            texts: where they are from.
            dense: [N, C], what it reads in the dense one; None where both are the same.
        """
        if len(tokens) == 0:
            return
        self.gram.add(tokens)
        if self.half is not None:
            self.half.add(tokens[texts.first])
        if self._cross is not None and dense is not None:
            self._cross.add(_within_reach(dense, tokens, texts.lengths), tokens)
            self._crossed = True

    def sum_over(self, ranks: Ranks) -> None:
        """Add up what all processes have seen."""
        self.gram.sum_over(ranks)
        if self.half is not None:
            self.half.sum_over(ranks)
        if self._cross is not None:
            self._cross.sum_over(ranks)

    def moments(self, dtype: torch.dtype) -> Moments:
        """What the solver wants. The sums give their memory back, unless a damping must be chosen on them."""
        if self._moments is None:
            self.dead = int((self.gram.diagonal() == 0).sum())
            cross = self._cross.matrix(dtype) if self._cross is not None and self._crossed else None
            self._moments = Moments(self.gram.matrix(dtype), cross, self._settings.target_blend)
            self._cross = None
            if self.half is None:
                self.gram.clear()
        return self._moments

    def damping(self, pattern: Pattern, weights: Sequence[torch.Tensor]) -> float:
        """The damping asked for, or the one that suits the number of tokens."""
        gram, asked = self.gram, self._settings.damp
        if not self._settings.compensates or gram.tokens >= 2 * len(gram):
            return usual_damp(len(gram), gram.tokens) if asked is None else asked
        few = f"{gram.name}: {gram.tokens} calibration tokens for {len(gram)} inputs (fewer than 2 per input)"
        if asked is not None:
            warnings.warn(f"{few}; more tokens, or damp=None, would generalise better", stacklevel=2)
            return asked
        if self.half is None or not 0 < self.half.tokens < gram.tokens:
            warnings.warn(f"{few}, none to hold out: damp {FEW_TOKENS_DAMP:g}", stacklevel=2)
            return FEW_TOKENS_DAMP
        damp = choose_damp(weights, gram, self.half, pattern)
        warnings.warn(f"{few}; chosen on held-out ones: damp {damp:g}", stacklevel=2)
        return damp


def _within_reach(dense: torch.Tensor, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The dense model's inputs, but the pruned model's own for tokens at which both differ out of all proportion.

    A few tokens (the first of a text) carry activations thousands of times larger than the rest. Where pruning
    has changed those, their difference would be all that a least-squares target sees.
    """
    outlying = []
    for left, right in zip(dense.split(lengths), tokens.split(lengths)):
        apart = (left - right).float().square().sum(-1)
        if len(apart):
            outlying.append(apart > _OUTLYING * apart.median())
    return torch.where(torch.cat(outlying)[:, None], tokens, dense)


def read_texts(stream: BlockStream, start: int, sequences: int) -> Iterator[Texts]:
    """Where the real tokens of each batch are from; the first half of a calibration is every other sequence.

    Whole sequences, because tokens of one text resemble each other; counted over all processes, so that the
    halves do not depend on how many there are. Of a single sequence, the first half of its tokens.

    Args:
        stream: this process's share.
        start: number of its first sequence in the whole calibration.
        sequences: of the whole calibration.

    Yields:
        One for each batch.
    """
    length, device = stream.hidden.shape[1], stream.hidden.device
    for low, high, real in stream.bounds():
        count = high - low
        lengths = [length] * count if real is None else real.view(count, length).sum(1).tolist()
        if sequences == 1:
            first = torch.arange(lengths[0]) < (lengths[0] + 1) // 2
        else:
            first = (torch.arange(start + low, start + high) % 2 == 0).repeat_interleave(
                torch.tensor(lengths)
            )
        yield Texts(lengths, first.to(device))


def borrow(found: Mapping[str, Statistics], stream: BlockStream, tokens: int, ranks: Ranks) -> None:
    """Show experts that saw few tokens some that the router sent elsewhere.

    The tokens run through the expert's own weights: the hidden channels of two experts have nothing in common, so
    sums of what other experts read in front of down_proj would say nothing about this one.

    Args:
        found: statistics of a step, by group, added up over all processes.
        stream: the pruned model in front of the step's block.
        tokens: that the run calibrates on, in all processes.
        ranks: the processes.
    """
    pools: dict[str, int] = {}
    shares: dict[str, float] = {}
    for group, each in found.items():
        if each.pool is not None and each.missing:
            pools[each.pool] = pools.get(each.pool, 0) + 1
            shares[group] = min(1.0, each.missing / max(tokens, 1))
    if not shares:
        return
    for pool, short in pools.items():
        members = sum(each.pool == pool for each in found.values())
        warnings.warn(
            f"{pool}: {short} of {members} experts saw fewer than 2 tokens per input; tokens that the router sent "
            "elsewhere fill them up",
            stacklevel=2,
        )
    device = stream.hidden.device
    added = {group: Gram(len(found[group].gram), group, device=device) for group in shares}
    for shown in stream.inputs(list(shares), shares=shares):
        for group, borrowed in shown.items():
            added[group].add(borrowed)
    for group, gram in added.items():
        gram.sum_over(ranks)
        found[group].gram.merge(gram)
