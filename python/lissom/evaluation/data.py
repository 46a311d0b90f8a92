# SPDX-License-Identifier: Apache-2.0
"""Inputs of a model for calibration: windows of tokens from text, or tensors as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

_MAIN = ("input_ids", "pixel_values")
_LONGEST_PATH, _SHOWN = (
    200,
    80,
)  # characters: what is longer may be a whole text, of which a message shows so many

# Texts of up to _WHOLE characters (a good second, 0.4 GB), or _PER_TOKEN for each token wanted, are tokenized whole; of
# longer ones as many characters in pieces of _PIECE.
_WHOLE, _PER_TOKEN, _PIECE = 1 << 22, 8, 1 << 16

Source = str | PathLike[str] | Sequence[str] | torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """Calibration inputs and where they come from.

    Attributes:
        inputs: what the model is called with: `input_ids` [S, T] or `pixel_values` [S, ...], and perhaps
            `attention_mask` [S, T] (only where there is padding) and others, all [S, ...].
        source_sha256: digest of the file, of the texts or of the tensors.
        seed: of the draw from text; None for ready-made tensors.
    """

    inputs: dict[str, torch.Tensor]
    source_sha256: str
    seed: int | None

    @property
    def tokens(self) -> torch.Tensor:
        """LongTensor [S, T]; only text has it."""
        return self.inputs["input_ids"]

    @property
    def mask(self) -> torch.Tensor | None:
        """[S, T], non-zero where a token is real; None without padding."""
        return self.inputs.get("attention_mask")

    def provenance(self) -> dict[str, Any]:
        """What a model's config keeps about its calibration."""
        main = next(self.inputs[name] for name in _MAIN if name in self.inputs)
        size = {"seq_len": main.shape[1]} if "input_ids" in self.inputs else {"size": list(main.shape[1:])}
        return {"source_sha256": self.source_sha256, "samples": len(main), **size, "seed": self.seed}


def calibration_windows(
    data: Source,
    tokenizer: Any = None,
    *,
    samples: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    field: str = "text",
) -> torch.Tensor:
    """Windows of tokens drawn at random from a text.

    The text is cut into windows at a random offset and `samples` of them are drawn without repetition; only a
    text that is too short for that is sampled at random starts, where windows overlap. Of texts of more than 4
    million characters (and 8 for each token wanted) pieces of up to 65,536 are drawn first, so that a corpus of any
    size takes a second to tokenize. The first token of a
    window is replaced by the beginning-of-text token when the tokenizer puts one in front of every text
    (Gemma, Llama).

    Args:
        data: path to .txt (one text) or .jsonl (one text per line), list of texts, or LongTensor [S, T] as it
            is.
        tokenizer: the model's tokenizer; not needed for tokens.
        samples: windows, S.
        seq_len: tokens per window, T.
        seed: of the draw.
        field: key of the text in .jsonl lines.

    Returns:
        LongTensor [S, T].

    Raises:
        ValueError: unreadable or too short a text, a missing tokenizer, tokens of another shape.
    """
    return read_calibration(data, tokenizer, samples=samples, seq_len=seq_len, seed=seed, field=field).tokens


def read_calibration(
    data: Source,
    tokenizer: Any = None,
    *,
    samples: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    field: str = "text",
) -> Calibration:
    """As `calibration_windows`, with padding mask and provenance; also takes a mapping of model inputs.

    Args:
        data: as for `calibration_windows`, or a mapping with `input_ids` [S, T] or `pixel_values` [S, ...], and
            perhaps `attention_mask` [S, T] and whatever else the model is called with, each [S, ...].
        tokenizer, samples, seq_len, seed, field: as for `calibration_windows`.

    Returns:
        Inputs of the model and their provenance.

    Raises:
        ValueError: as for `calibration_windows`.
    """
    if isinstance(data, torch.Tensor):
        data = {"input_ids": data}
    if isinstance(data, Mapping):
        inputs = dict(data)
        _check_inputs(inputs)
        if "attention_mask" in inputs and bool(inputs["attention_mask"].all()):
            del inputs["attention_mask"]
        return Calibration(inputs, _digest(inputs), None)
    if samples < 1 or seq_len < 2:
        raise ValueError(f"calibration needs samples >= 1 and seq_len >= 2, got {samples} and {seq_len}")
    if tokenizer is None:
        raise ValueError("calibration text needs the model's tokenizer; pass tokenizer=")
    texts, digest = read_texts(data, field=field)
    stream = tokenize(_pieces(texts, max(_WHOLE, _PER_TOKEN * samples * seq_len), seed), tokenizer)
    windows = _draw(stream, samples, seq_len, seed)
    start = leading_token(tokenizer)
    if start is not None:
        windows[:, 0] = start
    return Calibration({"input_ids": windows}, digest, seed)


def read_texts(data: str | PathLike[str] | Sequence[str], *, field: str = "text") -> tuple[list[str], str]:
    """The texts of a file or a list, and their sha256.

    Args:
        data: path to .txt or .jsonl, or list of texts.
        field: key of the text in .jsonl lines.

    Returns:
        Texts and digest.

    Raises:
        ValueError: an unknown kind of file, a line without the field, or no text at all.
        FileNotFoundError: the file does not exist.
    """
    if not isinstance(data, (str, PathLike)):
        texts = list(data)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("a list of texts must hold at least one text and nothing but text")
        return texts, hashlib.sha256("\0".join(texts).encode()).hexdigest()
    path = Path(fspath(data))
    if path.suffix not in (".txt", ".jsonl"):
        text = str(path)
        shown = text if len(text) <= _LONGEST_PATH and "\n" not in text else f"{text[:_SHOWN]!r}..."
        raise ValueError(
            f"{shown}: calibration text must be a .txt or .jsonl file; a text itself goes into a list: [text]"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if path.suffix == ".txt":
        texts = [content.decode("utf-8")]
    else:
        texts = [_field(line, field, f"{path}:{number}") for number, line in _lines(content.decode("utf-8"))]
    if not any(texts):
        raise ValueError(f"{path} holds no text")
    return texts, digest


def tokenize(texts: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """One stream of tokens; texts are joined by the end-of-text token where the tokenizer has one.

    Args:
        texts: one or more texts.
        tokenizer: a transformers tokenizer.

    Returns:
        LongTensor [N].
    """
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        if stream and end is not None:
            stream.append(end)
        # verbose=False: a stream longer than the model's context is what is wanted here, not a mistake.
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(stream, dtype=torch.long)


def leading_token(tokenizer: Any) -> int | None:
    """The beginning-of-text token if the tokenizer puts it in front of every text, else None."""
    first = tokenizer("a")["input_ids"][:1]
    return first[0] if first and first[0] == tokenizer.bos_token_id else None


def _pieces(texts: Sequence[str], limit: int, seed: int) -> list[str]:
    """Texts of up to `limit` characters as they are; of more, as many pieces of them at random, in their order."""
    if sum(map(len, texts)) <= limit:
        return list(texts)
    cut = [piece for text in texts for piece in _cut(text)]
    drawn, taken = [], 0
    for place in torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed)).tolist():
        drawn.append(place)
        taken += len(cut[place])
        if taken >= limit:
            break
    return [cut[place] for place in sorted(drawn)]


def _cut(text: str) -> Iterator[str]:
    """Pieces of a text that end with a line, or with a word where a line is very long."""
    low = 0
    while len(text) - low > _PIECE:
        half, high = low + _PIECE // 2, low + _PIECE
        end = text.rfind("\n", half, high) + 1 or text.rfind(" ", half, high) + 1 or high
        yield text[low:end]
        low = end
    if low < len(text):
        yield text[low:]


def _draw(stream: torch.Tensor, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    length = len(stream)
    if length < seq_len:
        raise ValueError(f"the calibration text has {length} tokens, fewer than one window of {seq_len}")
    generator = torch.Generator().manual_seed(seed)
    whole = length // seq_len
    if whole >= samples:
        offset = torch.randint(length - whole * seq_len + 1, (1,), generator=generator)
        starts = offset + seq_len * torch.randperm(whole, generator=generator)[:samples]
    else:
        starts = torch.randint(length - seq_len + 1, (samples,), generator=generator)
    return stream[starts[:, None] + torch.arange(seq_len)]


def _check_inputs(inputs: Mapping[str, torch.Tensor]) -> None:
    if not any(name in inputs for name in _MAIN):
        raise ValueError(f"calibration inputs must hold one of {', '.join(_MAIN)}, got {list(inputs)}")
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            got = "a single number" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"calibration inputs must be tensors [S, ...], got {got} for {name}; a tokenizer makes tensors "
                "with return_tensors='pt'"
            )
    lengths = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"calibration inputs must be equally many, got {lengths}")
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if tokens is not None and (tokens.dim() != 2 or tokens.dtype != torch.long or tokens.numel() == 0):
        raise ValueError(
            f"calibration tokens must be a LongTensor [S, T], got {list(tokens.shape)} {tokens.dtype}"
        )
    if tokens is not None and mask is not None and mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask must be {list(tokens.shape)} like input_ids, got {list(mask.shape)}"
        )
    if mask is not None and not mask.any():
        raise ValueError("attention_mask leaves no calibration token: everything is padding")


def _digest(inputs: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(inputs):
        if name != "attention_mask":
            digest.update(inputs[name].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _lines(content: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _field(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no text under {field!r} (it has: {keys}); name the field")
    return record[field]
