# SPDX-License-Identifier: Apache-2.0
"""Safetensors files read and written one tensor at a time, so that memory never holds a whole file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from ..hf.checkpoint import INDEX_NAME, WEIGHTS_NAME, CheckpointError, find_weight_files, read_tensors

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
_SHARD = 5_000_000_000  # bytes of copied tensors to a file, as transformers splits


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


class ShardWriter:
    """Writes a checkpoint into a folder, one file for each call, and names the files at the end.

    Args:
        folder: an existing folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = ShardWriter(Path(folder))
        ...     shards.add({"a": torch.ones(2, 3)})
        ...     shards.finish()
        ...     sorted(stored_tensors(Path(folder)))
        ['a']
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[list[str]] = []  # names of the tensors, by file
        self._bytes = 0

    @property
    def names(self) -> set[str]:
        """The tensors written so far."""
        return {name for part in self._parts for name in part}

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors to a file of their own.

        Args:
            tensors: by name; on the CPU, of a type that safetensors knows.

        Raises:
            ValueError: a tensor of this name was written before.
        """
        entries = [
            (name, _NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
            for name, tensor in tensors.items()
        ]
        with self._part(entries) as stream:
            for tensor in tensors.values():
                stream.write(_buffer(tensor.detach().contiguous()))

    def copy(self, tensors: Iterable[Copied]) -> None:
        """Write tensors that come byte by byte, about 5 GB to a file.

        Args:
            tensors: where they lie, or what makes them; asked for their bytes in this order.

        Raises:
            ValueError: a tensor of this name was written before.
        """
        shard: list[Copied] = []
        size = 0
        for tensor in tensors:
            if shard and size + tensor.size > _SHARD:
                self._copy(shard)
                shard, size = [], 0
            shard.append(tensor)
            size += tensor.size
        if shard:
            self._copy(shard)

    def finish(self) -> None:
        """Give the files their final names and write the index where there are several."""
        count = len(self._parts)
        names = [WEIGHTS_NAME]
        if count != 1:
            names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
            weight_map = {name: file for file, part in zip(names, self._parts) for name in part}
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for number, name in enumerate(names, 1):
            os.replace(self._folder / _part_name(number), self._folder / name)

    def _copy(self, tensors: list[Copied]) -> None:
        with self._part([(each.name, each.dtype, each.shape, each.size) for each in tensors]) as stream:
            for tensor in tensors:
                stream.writelines(tensor.chunks())

    def _part(self, entries: list[tuple[str, str, tuple[int, ...], int]]) -> BinaryIO:
        """Open the next file, its header written: 8 bytes of length, JSON padded to a multiple of 8."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin, before = 0, self.names
        for name, dtype, shape, size in entries:
            if name in before:
                raise ValueError(f"{name} was written before: a checkpoint holds each tensor once")
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
            begin += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._parts.append([name for name, *_ in entries])
        self._bytes += begin
        stream = open(self._folder / _part_name(len(self._parts)), "wb")  # noqa: SIM115 (the caller closes it)
        stream.write(len(text).to_bytes(8, "little") + text)
        return stream


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"


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
