# SPDX-License-Identifier: Apache-2.0
"""Packs each linear of a checkpoint when its two tensors have come, so that only one exists in both forms.

transformers sets the tensors of a checkpoint one by one, in the order of their names, and by then has mapped
the whole file. What is read of a mapped file counts as memory of the process until it is unmapped, and the
tensors that are used as they are stored keep it mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from lissom.hf.checkpoint import META_SUFFIX, CheckpointError
from lissom.nn import Sparse24Linear

_MADV_DONTNEED = 4  # Linux


class ArrivingLinear(Sparse24Linear):
    """A ``Sparse24Linear`` on the empty skeleton of a model; :meth:`finish` makes it an ordinary one.

    Made by :func:`expect`. Setting the second of ``weight`` and ``weight_meta`` packs, if both bear the mark
    ``_is_hf_initialized`` by which transformers tells tensors of the checkpoint from fresh ones.
    """

    dtype_when_packed: torch.dtype | None
    _name: str
    _own: bool

    def __setattr__(self, name: str, value: Any) -> None:
        # Once all is loaded, transformers gives fresh memory to every buffer that no checkpoint holds.
        if name == "packed" and value is not None and self.packed is not None:
            return
        super().__setattr__(name, value)
        if name in ("weight", "weight_meta") and self.packed is None and self._has_arrived():
            self._pack_arrived()

    def _has_arrived(self) -> bool:
        return all(getattr(part, "_is_hf_initialized", False) for part in (self.weight, self.weight_meta))

    def _pack_arrived(self) -> None:
        values, meta = self.weight.data, self.weight_meta
        assert meta is not None
        self._convert_and_pack()
        assert self.packed is not None
        self.packed._is_hf_initialized = True  # type: ignore[attr-defined]
        if self._own:
            for part in (values, meta):
                release_pages(part)

    def _convert_and_pack(self) -> None:
        if self.packed is None:
            self.weight.data = self.weight.data.to(dtype=self.dtype_when_packed)
        self.weight.requires_grad_(False)
        try:
            self.pack_()
        except ValueError as error:
            raise CheckpointError(f"{self._name}{META_SUFFIX} is corrupt: {error}") from error

    def finish(self) -> None:
        """Turns the layer into a ``Sparse24Linear``; packs it if nothing has done so yet.

        Raises:
            CheckpointError: corrupt metadata.
        """
        self._convert_and_pack()
        del self.dtype_when_packed, self._name, self._own
        self.__class__ = Sparse24Linear  # type: ignore[assignment]


def expect(layer: Sparse24Linear, name: str, *, own: bool) -> ArrivingLinear:
    """Turns an empty layer into one that packs itself when its tensors are set.

    Args:
        layer: on the meta device.
        name: its name in the model, for messages.
        own: the tensors that will come belong to nobody else: their memory may be emptied once packed.

    Returns:
        The same object.

    Example:
        >>> type(expect(Sparse24Linear(8, 4, device="meta"), "up", own=True)).__name__
        'ArrivingLinear'
    """
    layer.__class__ = ArrivingLinear
    assert isinstance(layer, ArrivingLinear)
    layer.dtype_when_packed, layer._name, layer._own = None, name, own
    return layer


def release_pages(tensor: Tensor) -> None:
    """Gives back to the system memory whose content nobody will read again; does nothing outside Linux.

    Only pages that lie wholly inside the tensor are given back. Those of a mapped file would be read from
    the file again, others would be zero.

    Args:
        tensor: any; one that has gaps, or is not in the memory of the CPU, is left alone.

    Example:
        >>> release_pages(torch.ones(3))
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if first < last:
        # It only saves memory: where the system declines (locked pages), nothing else changes.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
