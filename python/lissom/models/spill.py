# SPDX-License-Identifier: Apache-2.0
"""Tensors that lie in a file, for activations that need not stay in memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence

import torch


class Spill:
    """Makes tensors on shared file mappings: the kernel writes them out when memory is short, and `drop` gives
    their pages back at once.

    Each file is nameless from the start (it has no entry in the folder), so nothing is left behind when the
    process is killed; its space is free again once the tensor is gone.

    Args:
        folder: on a disk, made if it is not there; a memory file system (often the folder of temporary files)
            would gain nothing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hidden = Spill(folder).empty((2, 3), torch.float32)
        >>> hidden.fill_(1).sum().item()
        6.0
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder
        os.makedirs(folder, exist_ok=True)
        self._maps: list[tuple[int, weakref.ref[mmap.mmap]]] = []  # address of the first byte, mapping

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with unspecified values in a new file.

        Args:
            shape: of the tensor.
            dtype: of the tensor.

        Returns:
            Contiguous CPU tensor; keeps its mapping alive.

        Raises:
            OSError: the disk has not the room, or the folder cannot be written to.
        """
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(*shape, dtype=dtype)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            _reserve(file.fileno(), size)
            mapping = mmap.mmap(file.fileno(), size)
        tensor = torch.frombuffer(mapping, dtype=dtype).reshape(*shape)
        self._maps = [(address, alive) for address, alive in self._maps if alive() is not None]
        self._maps.append((tensor.data_ptr(), weakref.ref(mapping)))
        return tensor

    def drop(self, tensor: torch.Tensor) -> None:
        """Take the pages of a tensor out of this process; they come back from the file when they are used.

        Args:
            tensor: one that `empty` made, or a contiguous part of it; others are left alone.
        """
        for address, alive in self._maps:
            mapping, low = alive(), tensor.data_ptr() - address
            if mapping is not None and 0 <= low < len(mapping):
                # Of a shared mapping MADV_DONTNEED loses nothing: changed pages stay in the file's cache.
                start = low - low % mmap.PAGESIZE
                mapping.madvise(mmap.MADV_DONTNEED, start, low + tensor.nbytes - start)


def _reserve(descriptor: int, size: int) -> None:
    """Take the room on the disk now: a page that finds it full later would kill the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)
