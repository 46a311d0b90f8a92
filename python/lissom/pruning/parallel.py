# SPDX-License-Identifier: Apache-2.0
"""Several processes that prune one model: they share the calibration tokens out, and the weights to solve."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

_PANEL_BYTES = 8 << 20  # of a sum that travel at a time


class RankError(RuntimeError):
    """Another process of the run failed, or was not heard of for too long."""


class Ranks:
    """The processes of a run; made without `join` it is one process that talks to nobody.

    What one rank sends, all ranks must expect: every method that says "all ranks" is called by all of them, in the
    same order. Tensors travel over gloo, through the memory of the CPU.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.

    Example:
        >>> ranks = Ranks()
        >>> ranks.shard(10), ranks.owners([3.0, 1.0])
        (slice(0, 10, None), [0, 0])
    """

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self._group: Any = None
        self._ours = False
        self._timeout = 0.0

    @classmethod
    def join(cls, *, timeout: float = 3600.0) -> Ranks:
        """Join the processes that torchrun started, or those of a process group that is set up already.

        Use it as a context (`with Ranks.join() as ranks`), so that the others learn of a failure at once.

        Args:
            timeout: seconds that a rank waits for the slowest one before it gives up. It must be longer than the
                longest solve of one rank.

        Returns:
            This process's view of the run; that of one process where neither is there.

        Raises:
            RankError: the others did not come.
            ValueError: WORLD_SIZE is set, but not what belongs to it.
        """
        import torch.distributed as dist

        ranks = cls()
        ranks._timeout = timeout
        waiting = timedelta(seconds=timeout)
        if dist.is_available() and dist.is_initialized():
            if dist.get_world_size() > 1:
                # A group of our own: its timeout is ours, and gloo takes CPU tensors whatever the default does.
                ranks._group = dist.new_group(backend="gloo", timeout=waiting)
        elif _world_size() > 1:
            absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if absent:
                raise ValueError(
                    f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {absent[0]} is not set: start the processes "
                    "with torchrun, or unset WORLD_SIZE"
                )
            ranks.rank = int(os.environ["RANK"])
            with ranks._talk("joining"):
                dist.init_process_group("gloo", timeout=waiting)
            ranks._group, ranks._ours = dist.group.WORLD, True
        if ranks._group is not None:
            ranks.rank, ranks.size = dist.get_rank(), dist.get_world_size()
        return ranks

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(None if self._ours else self._group)
            self._group = None

    def shard(self, count: int) -> slice:
        """This rank's part of some samples: neighbours, in rank order, no part more than one longer than another.

        Args:
            count: how many samples there are.

        Returns:
            The part; empty on the last ranks when there are fewer samples than ranks.
        """
        share, rest = divmod(count, self.size)
        low = self.rank * share + min(self.rank, rest)
        return slice(low, low + share + (self.rank < rest))

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Share out work: the dearest piece first, each to the rank with the least so far.

        Args:
            costs: of each piece, in any unit; the same on all ranks.

        Returns:
            The rank that does each piece; the same on all ranks.

        Source:
            Graham, "Bounds on Multiprocessing Timing Anomalies", 1969 (longest processing time first).
        """
        loads = [0.0] * self.size
        owners = [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
            owners[piece] = loads.index(min(loads))
            loads[owners[piece]] += costs[piece]
        return owners

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all ranks, in place, in rank order: every rank gets the same bits.

        Floating tensors are added in float64, others in int64. A panel of 8 MiB travels at a time.

        Args:
            tensor: of one shape and dtype on all ranks.

        Returns:
            The tensor.

        Raises:
            ValueError: shapes or dtypes differ between ranks.
            RankError: another rank is gone.
        """
        if self.size == 1:
            return tensor
        self.same("the tensor to add up", f"{list(tensor.shape)} {tensor.dtype}")
        wide = torch.float64 if tensor.is_floating_point() else torch.int64
        rows = tensor if tensor.dim() > 1 else tensor.reshape(-1, 1)
        step = max(1, _PANEL_BYTES // (8 * max(1, rows[:1].numel())))
        with torch.no_grad():
            for number, low in enumerate(range(0, len(rows), step)):
                panel = rows[low : low + step]
                total = self._total(panel.to(wide).cpu().contiguous(), number % self.size)
                panel.copy_(total)
        return tensor

    def exchange(self, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Give every rank what one rank has.

        Args:
            tensors: the same names on all ranks; a tensor (of any shape and dtype) on the rank that has it, None
                on the others.

        Returns:
            Every tensor; the rank's own as they are, those of others on the CPU.

        Raises:
            ValueError: the names differ between ranks, or a tensor is on no rank or on several.
            RankError: another rank is gone.
        """
        forms = self.gather_objects(
            {
                name: None if each is None else (tuple(each.shape), each.dtype)
                for name, each in tensors.items()
            }
        )
        if any(form.keys() != forms[0].keys() for form in forms):
            raise ValueError("exchange needs the same names on all ranks")
        found = {}
        for name in forms[0]:
            holders = [rank for rank, form in enumerate(forms) if form[name] is not None]
            if len(holders) != 1:
                raise ValueError(f"{name} must be on one rank, it is on {len(holders)} of {self.size}")
            shape, dtype = forms[holders[0]][name]
            own = tensors[name]
            found[name] = torch.empty(shape, dtype=dtype) if own is None else own
            if self.size > 1:
                self._broadcast(found[name], holders[0])
        return found

    def gather_objects(self, value: Any) -> list[Any]:
        """What each rank has to say, on all ranks.

        Args:
            value: anything that can be pickled.

        Returns:
            One value of each rank, in rank order.

        Raises:
            RankError: another rank is gone.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self._talk("exchanging values"):
            dist.all_gather_object(found, value, group=self._group)
        return found

    def same(self, what: str, value: Any) -> None:
        """Make sure that all ranks have the same.

        Args:
            what: its name, for the message.
            value: a tensor, or plain values as for JSON.

        Raises:
            ValueError: on all ranks, when two of them differ.
            RankError: another rank is gone.
        """
        found = self.gather_objects((_digest(value), _brief(value)))
        for rank, (digest, text) in enumerate(found):
            if digest != found[0][0]:
                raise ValueError(
                    f"{what} must be the same on all ranks: rank 0 has {found[0][1]}, rank {rank} has {text}; start "
                    "all of them with the same arguments and files"
                )

    def barrier(self) -> None:
        """Wait until all ranks are here.

        Raises:
            RankError: one does not come; the sentence says which.
        """
        if self.size > 1:
            import torch.distributed as dist

            with self._talk("waiting"):
                dist.monitored_barrier(self._group, timedelta(seconds=self._timeout))

    @contextmanager
    def section(self, what: str) -> Iterator[None]:
        """Work of its own on every rank, at whose end all ranks meet; when one fails, all do.

        Args:
            what: its name, for the message. Inside, nothing that needs all ranks may be called.

        Raises:
            RankError: another rank failed; the sentence says which, and with what.
        """
        try:
            yield
        except Exception as error:
            with suppress(RankError):  # the error that is under way says more
                self.gather_objects(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self.gather_objects(None)):
            if failure is not None:
                raise RankError(f"{what}: rank {rank} failed with {failure}")

    def _total(self, panel: torch.Tensor, owner: int) -> torch.Tensor:
        """The sum of a panel over ranks, added up by one of them."""
        import torch.distributed as dist

        parts = [torch.empty_like(panel) for _ in range(self.size)] if owner == self.rank else None
        with self._talk("adding up"):
            dist.gather(panel, parts, dst=owner, group=self._group)
            if parts is not None:
                panel = parts[0]
                for part in parts[1:]:
                    panel += part
            dist.broadcast(panel, src=owner, group=self._group)
        return panel

    def _broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Fill a tensor with the owner's bytes: gloo does not know every dtype."""
        import torch.distributed as dist

        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            with self._talk("handing out weights"):
                dist.broadcast(flat, src=owner, group=self._group)

    @contextmanager
    def _talk(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RankError(
                f"rank {self.rank}, {doing}: another rank failed or was more than {self._timeout:g} s late; its own "
                f"message says why ({reason})"
            ) from error


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit():
        raise ValueError(f"WORLD_SIZE must be the number of processes, got {text!r}")
    return int(text)


def _digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        found = hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode())
        if flat.numel():
            found.update(flat.view(torch.uint8).numpy().data)
        return found.hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _brief(value: Any) -> str:
    text = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
