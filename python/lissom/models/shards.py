# SPDX-License-Identifier: Apache-2.0
"""Safetensors files read and written one tensor at a time, so that memory never holds a whole file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ..hf.checkpoint import INDEX_NAME, WEIGHTS_NAME, CheckpointError, find_weight_files, read_tensors

SHARD_BYTES = 5_000_000_000  # tensors in a file, as transformers splits
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 16 << 20  # bytes copied at a time
_HEAD = 40  # bytes of a header that do not depend on the tensors
_ENTRY = 100  # bytes of its entry for a tensor beside the name, for a matrix and offsets of ten digits


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file.

    Attributes:
        name: as in the file.
        dtype: as the header spells it.
        shape: of the tensor.
        file: where it lies.
        start: offset of its first byte in the file.
        size: bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def meta(self) -> torch.Tensor:
        """A tensor of this type and shape without values.

        Raises:
            CheckpointError: a type that cannot be a parameter.
        """
        return torch.empty(self.shape, dtype=self._dtype(), device="meta")

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own: no page of the file stays mapped.

        Raises:
            CheckpointError: the file is shorter than its header said when it was opened.
        """
        tensor = torch.empty(self.shape, dtype=self._dtype())
        if self.size:
            with open(self.file, "rb") as stream:
                stream.seek(self.start)
                if stream.readinto(_buffer(tensor)) != self.size:
                    raise CheckpointError(f"{self.file} ends inside {self.name}: it was cut off or replaced")
        return tensor

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, piece by piece.

        Raises:
            CheckpointError: as for `read`.
        """
        left = self.size
        with open(self.file, "rb") as stream:
            stream.seek(self.start)
            while left:
                piece = stream.read(min(left, _CHUNK))
                if not piece:
                    raise CheckpointError(f"{self.file} ends inside {self.name}: it was cut off or replaced")
                left -= len(piece)
                yield piece

    def _dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.name} is stored as {self.dtype}, a model's weights must be one of {', '.join(DTYPES)}"
            )
        return DTYPES[self.dtype]


class Copied(Protocol):
    """A tensor whose bytes come piece by piece: `Stored` is one, or something that makes them on the way."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    def chunks(self) -> Iterator[bytes | memoryview]: ...


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Lists the tensors of a model folder without reading their values.

    Args:
        folder: with `model.safetensors`, or an index and its shards.

    Returns:
        Every tensor by name.

    Raises:
        CheckpointError: files are missing, damaged or not safetensors, or two tensors have one name.

    Example:
        >>> from lissom import assets
        >>> stored_tensors(assets.TINY_LLAMA)["model.norm.weight"].dtype
        'BF16'
    """
    infos = read_tensors(find_weight_files(folder))
    starts = {file: _starts(file) for file in {info.file for info in infos.values()}}
    return {
        name: Stored(name, info.dtype, info.shape, info.file, *starts[info.file][name])
        for name, info in infos.items()
    }


@dataclass
class _Part:
    """A file in the making: room for a header, then the tensors."""

    file: Path
    room: int
    header: dict[str, object] = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})
    header_bytes: int = _HEAD
    bytes: int = 0


class ShardWriter:
    """Writes a checkpoint into a folder, tensor by tensor, and names the files at the end.

    A file begins with its header, which is known when the file is full: room for it is left free, and what it does not
    need stays blank, as the format allows.

    Args:
        folder: an existing folder.
        names: of the tensors that may come, which say how much room a header gets; where it does not do, another
            file begins.
        shard_bytes: tensors in a file, about; a larger one gets a file of its own.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = ShardWriter(Path(folder), ["a"])
        ...     shards.add({"a": torch.ones(2, 3)})
        ...     shards.finish()
        ...     sorted(stored_tensors(Path(folder)))
        ['a']
    """

    def __init__(self, folder: Path, names: Iterable[str], *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard = shard_bytes
        self._room = _HEAD + sum(len(json.dumps(name)) + _ENTRY for name in names)
        self._bytes = 0
        self._parts: list[_Part] = []
        self._names: set[str] = set()

    @property
    def names(self) -> set[str]:
        """The tensors written so far."""
        return set(self._names)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors that are in memory.

        Args:
            tensors: by name; on the CPU, of a type that safetensors knows.

        Raises:
            ValueError: a tensor of this name was written before.
        """
        for name, tensor in tensors.items():
            held = _buffer(tensor.detach().contiguous())
            self._append(name, _NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, (held,))

    def copy(self, tensors: Iterable[Copied]) -> None:
        """Write tensors that come byte by byte.

        Args:
            tensors: where they lie, or what makes them; asked for their bytes in this order.

        Raises:
            ValueError: a tensor of this name was written before.
        """
        for each in tensors:
            self._append(each.name, each.dtype, each.shape, each.size, each.chunks())

    def finish(self) -> None:
        """Write the headers, give the files their final names, and an index where there are several."""
        count = len(self._parts)
        names = [WEIGHTS_NAME]
        if count != 1:
            names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
            weight_map = {
                name: file
                for file, part in zip(names, self._parts)
                for name in part.header
                if name in self._names
            }
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for name, part in zip(names, self._parts):
            with open(part.file, "r+b") as stream:
                stream.write(part.room.to_bytes(8, "little") + _json(part.header).ljust(part.room))
            os.replace(part.file, self._folder / name)

    def _append(
        self, name: str, dtype: str, shape: tuple[int, ...], size: int, chunks: Iterable[bytes | memoryview]
    ) -> None:
        if name in self._names:
            raise ValueError(f"{name} was written before: a checkpoint holds each tensor once")
        entry_bytes = len(_json({name: _entry(dtype, shape, self._bytes, size)}))
        part = self._parts[-1] if self._parts else None
        if part is None or part.bytes + size > self._shard or part.header_bytes + entry_bytes > part.room:
            part = self._begin(max(self._room, _HEAD + entry_bytes))
        part.header[name] = _entry(dtype, shape, part.bytes, size)
        part.header_bytes += entry_bytes
        part.bytes += size
        self._bytes += size
        self._names.add(name)
        with open(part.file, "ab") as stream:
            stream.writelines(chunks)

    def _begin(self, room: int) -> _Part:
        part = _Part(self._folder / f"part-{len(self._parts):05d}.safetensors", (room + 7) // 8 * 8)
        with open(part.file, "xb") as stream:
            stream.truncate(8 + part.room)
        self._parts.append(part)
        return part


def _entry(dtype: str, shape: tuple[int, ...], begin: int, size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}


def _json(header: Mapping[str, object]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _starts(file: Path) -> dict[str, tuple[int, int]]:
    """Offset and bytes of each tensor; that they fit the file, safetensors has checked."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = (8 + length + begin, end - begin)
    return found


def _buffer(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor as bytes."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data
