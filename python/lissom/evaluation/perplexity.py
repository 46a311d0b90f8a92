# SPDX-License-Identifier: Apache-2.0
"""Perplexity and bits per byte of a causal language model on a text."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.stream import evaluating
from .data import leading_token, read_texts, tokenize

_LOSS_ROWS = 256  # tokens whose logits are widened to float32 at a time


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of the mean loss per scored token.
        nats_per_token: mean loss.
        bits_per_byte: total loss in bits over the UTF-8 bytes of the scored tokens; comparable across
            tokenizers.
        tokens: scored tokens.
        seconds: time of the forward passes.
    """

    perplexity: float
    nats_per_token: float
    bits_per_byte: float
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return asdict(self)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | PathLike[str],
    *,
    windows: int = 8,
    seq_len: int = 1024,
    stride: int | None = None,
    batch: int = 1,
) -> PerplexityResult:
    """Perplexity on a text, over a few windows spread evenly or over all of it with a sliding window.

    By default `windows` windows begin at i * floor((N - seq_len) / (windows - 1)) and the first token of each
    is not scored. With `stride`, windows advance by `stride` over the whole text and each token is scored
    once, with at least seq_len - stride tokens in front of it (fewer only at the beginning of the text).
    Where the tokenizer begins every text with a special token (Gemma), that token takes the place of the
    first, unscored one.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        text: the text itself, or a Path to a .txt or .jsonl file.
        windows: number of windows; ignored with `stride`.
        seq_len: tokens per window.
        stride: tokens between sliding windows, 1 <= stride < seq_len.
        batch: windows per forward pass.

    Returns:
        Perplexity, nats per token, bits per byte.

    Raises:
        ValueError: a text shorter than one window, or sizes out of range.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1 window, got {batch}")
    texts = [text] if isinstance(text, str) else read_texts(text)[0]
    stream = tokenize(texts, tokenizer)
    spans = _spans(len(stream), windows, seq_len, stride)
    start = leading_token(tokenizer)
    began = time.perf_counter()
    total, scored, size = 0.0, 0, 0
    with evaluating(model):
        for at in range(0, len(spans), batch):
            rows = spans[at : at + batch]
            ids = torch.stack([stream[span.low : span.low + seq_len] for span in rows])
            if start is not None:
                ids[:, 0] = start
            for span, losses in zip(rows, token_losses(model, ids)):
                total += losses[span.first - span.low - 1 :].sum(dtype=torch.float64).item()
                tokens = stream[span.first : span.low + seq_len]
                scored += len(tokens)
                size += len(tokenizer.decode(tokens).encode())
    nats = total / scored
    return PerplexityResult(
        perplexity=math.exp(nats) if nats < 700 else math.inf,
        nats_per_token=nats,
        bits_per_byte=total / math.log(2) / size,
        tokens=scored,
        seconds=time.perf_counter() - began,
    )


@torch.inference_mode()
def token_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token after the first, in float32 whatever the model's dtype.

    Args:
        model: a transformers causal language model; run in eval mode.
        ids: LongTensor [B, T].

    Returns:
        Float32 tensor [B, T - 1], in nats, on the CPU.
    """
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:]
    losses = [
        nn.functional.cross_entropy(
            logits[:, low : low + _LOSS_ROWS].float().flatten(0, 1),
            targets[:, low : low + _LOSS_ROWS].flatten(),
            reduction="none",
        ).view(len(ids), -1)
        for low in range(0, targets.shape[1], _LOSS_ROWS)
    ]
    return torch.cat(losses, dim=1).cpu()


class _Span(NamedTuple):
    """A window that begins at token `low` and scores its tokens from `first` on."""

    low: int
    first: int


def _spans(length: int, windows: int, seq_len: int, stride: int | None) -> list[_Span]:
    if windows < 1 or seq_len < 2:
        raise ValueError(f"perplexity needs windows >= 1 and seq_len >= 2, got {windows} and {seq_len}")
    if length < seq_len:
        raise ValueError(
            f"the text has {length} tokens, fewer than one window of {seq_len}; pass a smaller seq_len"
        )
    if stride is None:
        step = (length - seq_len) // (windows - 1) if windows > 1 else 0
        return [_Span(index * step, index * step + 1) for index in range(windows)]
    if not 1 <= stride < seq_len:
        raise ValueError(f"stride must be at least 1 and below seq_len = {seq_len}, got {stride}")
    spans = [_Span(0, 1)]
    while (end := spans[-1].low + seq_len) < length:
        # The last window ends with the text, so that it has the full context like the others.
        spans.append(_Span(min(spans[-1].low + stride, length - seq_len), end))
    return spans
