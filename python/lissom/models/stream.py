# SPDX-License-Identifier: Apache-2.0
"""The residual stream of some sequences, moved through a model one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .walk import ModelMap

Hook = Callable[[torch.Tensor, torch.Tensor | None], None]


BATCH_TOKENS = 4096


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
        input_ids: LongTensor [S, T].
        attention_mask: [S, T], non-zero where a token is real; None when there is no padding.
        batch: sequences per forward pass; None: as many as make about 4096 tokens (faster than more: the
            activations of a block stay near the caches).

    Example:
        >>> stream = BlockStream(model, describe(model), ids)       # doctest: +SKIP
        >>> stream.advance()                                        # doctest: +SKIP
        >>> stream.hidden.shape                                     # doctest: +SKIP
        torch.Size([64, 1024, 576])
    """

    def __init__(
        self,
        model: nn.Module,
        parts: ModelMap,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        batch: int | None = None,
    ) -> None:
        self.parts = parts
        self.index = 0
        self.hidden: torch.Tensor  # [S, T, d], inputs of block `index`
        if batch is not None and batch < 1:
            raise ValueError(f"batch must be at least 1 sequence, got {batch}")
        batch = batch or max(1, BATCH_TOKENS // input_ids.shape[1])
        self._bounds = [(low, min(low + batch, len(input_ids))) for low in range(0, len(input_ids), batch)]
        self._mask = None if attention_mask is None else attention_mask.bool()
        self._calls: list[list[_Call]] = []
        self._record(model, input_ids)

    @property
    def tokens(self) -> int:
        """Real (unpadded) tokens in the stream."""
        return (
            int(self._mask.sum()) if self._mask is not None else self.hidden.shape[0] * self.hidden.shape[1]
        )

    @torch.inference_mode()
    def observe(self, hooks: dict[nn.Module, Hook]) -> None:
        """Run the current block on its inputs and show chosen modules' inputs, without moving on.

        A batch ends as soon as every hook was called: what lies behind the last observed module is not
            computed.

        Args:
            hooks: module of the block -> function of (its input [..., C], mask of real tokens or None).

        Raises:
            RuntimeError: a module was never called during the block's forward pass.
        """
        for number in range(len(self._bounds)):
            waiting = set(hooks)
            low, high = self._bounds[number]
            mask = None if self._mask is None else self._mask[low:high].reshape(-1)

            def show(module: nn.Module, args: tuple[Any, ...], waiting=waiting, mask=mask) -> None:
                hooks[module](args[0], mask)
                waiting.discard(module)
                if not waiting:
                    raise _Stop

            handles = [module.register_forward_pre_hook(show) for module in hooks]
            try:
                self._forward(number)
            except _Stop:
                continue
            finally:
                for handle in handles:
                    handle.remove()
            names = {
                id(module): name for name, module in self.parts.blocks[self.index].module.named_modules()
            }
            missing = ", ".join(names.get(id(module), "?") for module in waiting)
            raise RuntimeError(
                f"{self.parts.blocks[self.index].name}: {missing} was never called in its forward pass"
            )

    @torch.inference_mode()
    def advance(self) -> None:
        """Replace the hidden states by the current block's outputs and move to the next block."""
        for number, (low, high) in enumerate(self._bounds):
            self.hidden[low:high] = self._forward(number)
        for calls in self._calls:
            calls[self.index] = _Call((), {})
        self.index += 1

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The hidden states batch by batch, each with its mask of real tokens [B * T] or None."""
        for low, high in self._bounds:
            yield self.hidden[low:high], None if self._mask is None else self._mask[low:high].reshape(-1)

    def _forward(self, number: int) -> torch.Tensor:
        low, high = self._bounds[number]
        call = self._calls[number][self.index]
        out = self.parts.blocks[self.index].module(self.hidden[low:high], *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.inference_mode()
    def _record(self, model: nn.Module, input_ids: torch.Tensor) -> None:
        base = model.get_submodule(self.parts.base)
        first = []
        by_size: dict[int, list[_Call]] = {}
        for low, high in self._bounds:
            inputs = {"input_ids": input_ids[low:high], "use_cache": False}
            if self._mask is not None:
                inputs["attention_mask"] = self._mask[low:high].long()
            with self._recorders() as (hidden, calls):
                try:
                    base(**inputs)
                except _Stop:
                    first.append(hidden[0])
            self._calls.append(calls if self._mask is not None else by_size.setdefault(high - low, calls))
        self.hidden = torch.cat(first)

    @contextmanager
    def _recorders(self) -> Iterator[tuple[list[torch.Tensor], list[_Call]]]:
        hidden: list[torch.Tensor] = []
        calls: list[_Call] = []
        modules = [block.module for block in self.parts.blocks]

        def record(*args: Any, **kwargs: Any) -> torch.Tensor:
            states, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if not hidden:
                hidden.append(states)
            calls.append(_Call(args, kwargs))
            if len(calls) == len(modules):
                raise _Stop
            return states

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
