# SPDX-License-Identifier: Apache-2.0
"""The residual stream of some sequences, moved through a model one block at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import FAMILIES
from .spill import Spill
from .taps import Seen, Tap, TapError
from .walk import ModelMap

BATCH_TOKENS = 4096
# With these inputs alone, what the model passes to its blocks beside the hidden states is the same for all.
_ALIKE = {"input_ids", "pixel_values"}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (dropout off) for a while; each module's own mode comes back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Stop(Exception):
    """Leaves a forward pass whose remaining work is not needed."""


@dataclass(frozen=True)
class _Call:
    """The arguments beside the hidden states with which the model calls one block on one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockStream:
    """Hidden states of all sequences in front of one block, and the model's own way of calling each block.

    The model is run once per batch with every block replaced by a recorder that passes its input on: rotary
    embeddings, masks and per-layer attention types come out exactly as the model makes them, for the price of
    an embedding look-up. Without padding these arguments depend on the batch size only and are kept once.

    Args:
        model: transformers model in eval mode.
        parts: its map, from `describe`.
        inputs: tensors that the model is called with (`input_ids`, `pixel_values`, ...), each [S, ...]; an
            `attention_mask` [S, T] among them is non-zero where a token is real.
        batch: sequences per forward pass; None: as many as make about 4096 tokens (faster than more: the
            activations of a block stay near the caches).
        spill: keeps the hidden states in files instead of in memory; None: in memory.

    Example:
        >>> stream = BlockStream(model, describe(model), {"input_ids": ids})    # doctest: +SKIP
        >>> stream.advance()                                        # doctest: +SKIP
        >>> stream.hidden.shape                                     # doctest: +SKIP
        torch.Size([64, 1024, 576])
    """

    def __init__(
        self,
        model: nn.Module,
        parts: ModelMap,
        inputs: Mapping[str, torch.Tensor],
        *,
        batch: int | None = None,
        spill: Spill | None = None,
    ) -> None:
        self.parts = parts
        self._spill = spill
        self.index = 0
        self.hidden: torch.Tensor  # [S, T, d], inputs of block `index`
        if batch is not None and batch < 1:
            raise ValueError(f"batch must be at least 1 sequence, got {batch}")
        if any(module.training for module in model.modules()):
            raise ValueError("the model is in training mode; call model.eval() first")
        given = dict(inputs)
        mask = given.pop("attention_mask", None)
        self._mask = None if mask is None else mask.bool()
        self._torn = False
        self._calls: list[list[_Call]] = []
        self._bounds: list[tuple[int, int]] = []
        self._record(model, given, batch)

    @property
    def tokens(self) -> int:
        """Real (unpadded) tokens in the stream."""
        return (
            int(self._mask.sum()) if self._mask is not None else self.hidden.shape[0] * self.hidden.shape[1]
        )

    def inputs(
        self, groups: Sequence[str], *, advance: bool = False, shares: Mapping[str, float] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Run the current block batch by batch and show what its linears read.

        Args:
            groups: names of groups of the current block (`LinearRef.group`).
            advance: run each batch to its end and keep the outputs: when the iterator is exhausted, the
                stream stands in front of the next block. Without it a batch ends behind the last tap needed.
            shares: of routed groups: instead of the tokens that the router sends there, this share of all tokens,
                evenly spread.

        Yields:
            For each batch, group name -> its input tokens [N, C], real tokens only, in token order; valid
            until the next step of the iterator.

        Raises:
            ValueError: a group that the current block does not have.
            RuntimeError: a module was not called once per token.
        """
        block = self.parts.blocks[self.index]
        asked = set(groups)
        taps = {tap: [group for group in tap.groups if group in asked] for tap in block.taps}
        unknown = asked.difference(*taps.values())
        if unknown:
            raise ValueError(f"{block.name} has no group {min(unknown)!r}; it has {', '.join(self.groups())}")
        needed = {tap: wanted for tap, wanted in taps.items() if wanted}
        return self._inputs(needed, advance=advance, shares=shares or {})

    def groups(self) -> list[str]:
        """Names of the groups of the current block, in running order."""
        return [group for tap in self.parts.blocks[self.index].taps for group in tap.groups]

    @torch.no_grad()
    def _inputs(
        self, taps: dict[Tap, list[str]], *, advance: bool, shares: Mapping[str, float]
    ) -> Iterator[dict[str, torch.Tensor]]:
        complete = not advance
        following = self.hidden
        try:
            for number, (low, high) in enumerate(self._bounds):
                shown: dict[str, torch.Tensor] = {}
                out = self._tapped(number, taps, shown, stop=not advance, shares=shares)
                yield shown
                # Behind the yield: an input may be a view of the hidden states (post-norm blocks).
                if out is not None:
                    if following.dtype != out.dtype:  # Mamba adds in float32 whatever the embedding's type
                        following = self._empty(self.hidden.shape, out)
                    following[low:high] = out
                self._drop(low, high)
            complete = True
        finally:
            self._torn = self._torn or not complete
        self.hidden = following
        if advance:
            for calls in self._calls:
                calls[self.index] = _Call((), {})
            self.index += 1

    def _tapped(
        self,
        number: int,
        taps: dict[Tap, list[str]],
        shown: dict[str, torch.Tensor],
        *,
        stop: bool,
        shares: Mapping[str, float],
    ) -> torch.Tensor | None:
        """Run one batch with hooks that put what the taps read into `shown`; None when it was cut short."""
        if stop and not taps:
            return None
        low, high = self._bounds[number]
        count = (high - low) * self.hidden.shape[1]
        real = None if self._mask is None else self._mask[low:high].reshape(-1)

        def show(tap: Tap, args: tuple[Any, ...], output: Any) -> None:
            wanted = taps[tap]
            if wanted[0] in shown:
                raise RuntimeError(f"{wanted[0]} is called more than once in a forward pass of its block")
            try:
                shown.update(tap.read(Seen(args, output, count, real, shares), wanted))
            except TapError as error:
                raise RuntimeError(f"{wanted[0]} cannot be calibrated: {error}") from error
            if stop and len(shown) == sum(len(groups) for groups in taps.values()):
                raise _Stop

        handles = [
            tap.module.register_forward_hook(lambda _, args, output, tap=tap: show(tap, args, output))
            if tap.after
            else tap.module.register_forward_pre_hook(lambda _, args, tap=tap: show(tap, args, None))
            for tap in taps
        ]
        try:
            out = self._forward(number)
        except _Stop:
            return None
        finally:
            for handle in handles:
                handle.remove()
        missing = [group for groups in taps.values() for group in groups if group not in shown]
        if missing:
            raise RuntimeError(f"{missing[0]} was never called in the forward pass of its block")
        return out

    def advance(self) -> None:
        """Replace the hidden states by the current block's outputs and move to the next block."""
        for _ in self.inputs((), advance=True):
            pass

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The hidden states batch by batch, each with its mask of real tokens [B * T] or None."""
        for low, high, real in self.bounds():
            yield self.hidden[low:high], real

    @property
    def batch_count(self) -> int:
        """How many batches the sequences make."""
        return len(self._bounds)

    def bounds(self) -> Iterator[tuple[int, int, torch.Tensor | None]]:
        """First and last sequence (exclusive) of each batch, and its mask of real tokens [B * T] or None."""
        for low, high in self._bounds:
            yield low, high, None if self._mask is None else self._mask[low:high].reshape(-1)

    def call(self, number: int, block: Callable[..., Any]) -> torch.Tensor:
        """Call something in the place of the current block on one batch, with the model's own arguments."""
        if self._torn:
            raise RuntimeError("an advancing pass was left half way: the hidden states are of two blocks")
        low, high = self._bounds[number]
        call = self._calls[number][self.index]
        out = block(self.hidden[low:high], *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _forward(self, number: int) -> torch.Tensor:
        return self.call(number, self.parts.blocks[self.index].module)

    @torch.no_grad()
    def _record(self, model: nn.Module, given: dict[str, torch.Tensor], batch: int | None) -> None:
        base = model.get_submodule(self.parts.base)
        sequences = _common_length(given if self._mask is None else {**given, "attention_mask": self._mask})
        if batch is None:
            tokens = self._recorded(base, given, 0, 1)[0].shape[1]
            batch = max(1, BATCH_TOKENS // tokens)
        self._bounds = [(low, min(low + batch, sequences)) for low in range(0, sequences, batch)]
        by_size: dict[int, list[_Call]] = {}
        for low, high in self._bounds:
            hidden, calls = self._recorded(base, given, low, high)
            if low == 0:
                self.hidden = self._empty((sequences, *hidden.shape[1:]), hidden)
            self.hidden[low:high] = hidden
            self._drop(low, high)
            alike = self._mask is None and given.keys() <= _ALIKE
            self._calls.append(by_size.setdefault(high - low, calls) if alike else calls)

    def _empty(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(shape) if self._spill is None else self._spill.empty(shape, like.dtype)

    def _drop(self, low: int, high: int) -> None:
        if self._spill is not None:
            self._spill.drop(self.hidden[low:high])

    def _recorded(
        self, base: nn.Module, given: dict[str, torch.Tensor], low: int, high: int
    ) -> tuple[torch.Tensor, list[_Call]]:
        """The first block's input for some sequences, and how the model calls each block on them."""
        inputs: dict[str, Any] = {name: tensor[low:high] for name, tensor in given.items()}
        if self._mask is not None:
            inputs["attention_mask"] = self._mask[low:high].long()
        if "use_cache" in inspect.signature(base.forward).parameters:
            inputs["use_cache"] = False
        with self._recorders() as (hidden, calls):
            try:
                base(**inputs)
            except _Stop:
                return hidden[0], calls
        called = f"{len(calls)} of {len(self.parts.blocks)} blocks"
        raise RuntimeError(f"{type(base).__name__} called {called} in one forward pass")

    @contextmanager
    def _recorders(self) -> Iterator[tuple[list[torch.Tensor], list[_Call]]]:
        hidden: list[torch.Tensor] = []
        calls: list[_Call] = []
        modules = [block.module for block in self.parts.blocks]
        returns_tuple = FAMILIES[self.parts.family].returns_tuple

        def record(*args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor]:
            states, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if not hidden:
                hidden.append(states)
            calls.append(_Call(args, kwargs))
            if len(calls) == len(modules):
                raise _Stop
            return (states,) if returns_tuple else states

        # An instance attribute shadows the class's method; one that was there before (accelerate) comes back.
        before = [module.__dict__.get("forward") for module in modules]
        for module in modules:
            module.forward = record
        try:
            yield hidden, calls
        finally:
            for module, forward in zip(modules, before):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def _common_length(inputs: Mapping[str, torch.Tensor]) -> int:
    lengths = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            f"inputs must be tensors with the same number of sequences, one or more, got {lengths}"
        )
    return next(iter(lengths.values()))
