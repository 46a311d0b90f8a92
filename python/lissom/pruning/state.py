# SPDX-License-Identifier: Apache-2.0
"""Finished blocks on disk, so that a run killed at any block goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .report import LayerReport

_FORMAT = 2
_PARTS = {"lissom": "version of lissom", "model": "model", "data": "data", "arguments": "arguments"}


class PruneState:
    """A folder with one safetensors file for each finished block and one JSON file that says whose they are.

    Every file is written under a temporary name and renamed, so a file that is there is complete. Nothing is
    trusted by its name alone: the JSON holds lissom's version and digests of the model's weights, of the
    calibration tokens and of all arguments, every other file holds the digest of all these, and a run with
    others is refused.

    Args:
        folder: where the state lives; made when absent.
        fingerprint: digests and arguments of this run, as `fingerprint` makes them.
        resume: go on from what is there; otherwise the folder must hold no state.

    Raises:
        FileExistsError: the folder holds a state, or a part of one, and `resume` is False.
        ValueError: the state belongs to another version, model, data or arguments, or a file is damaged.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._digest = _digest(fingerprint)
        head = self.folder / "prune.json"
        kept = sorted(self.folder.glob("*.safetensors"))
        if (head.exists() or kept) and not resume:
            raise FileExistsError(
                f"{self.folder} holds the state of an earlier run: go on with resume=True, or remove it"
            )
        if head.exists():
            self._check(_read_head(head), fingerprint)
        elif kept:
            raise ValueError(
                f"{self.folder} cannot be resumed: {kept[0].name} is there, but not {head.name}, which says "
                "whose it is; remove the folder, or start in another one"
            )
        else:
            text = json.dumps({"format": _FORMAT, **fingerprint}, indent=1)
            _write_atomically(head, text.encode())
        for path in kept:
            with self._open(path):
                pass

    def has(self, block: int) -> bool:
        """Whether a block is finished."""
        return self._path(block).exists()

    def load(self, block: int) -> tuple[dict[str, torch.Tensor], list[LayerReport]]:
        """The pruned weights and reports of a finished block.

        Args:
            block: index of the block.

        Returns:
            Weights [out, in] by layer name, and the layers' reports.
        """
        with self._open(self._path(block)) as file:
            reports = json.loads(file.metadata()["layers"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return weights, [LayerReport(**{**report, "shape": tuple(report["shape"])}) for report in reports]

    def save(self, block: int, weights: Mapping[str, torch.Tensor], layers: list[LayerReport]) -> None:
        """Keep a finished block.

        Args:
            block: index of the block.
            weights: pruned weights [out, in] by layer name.
            layers: the layers' reports.
        """
        from safetensors.torch import save

        metadata = {"run": self._digest, "layers": json.dumps([asdict(layer) for layer in layers])}
        tensors = {name: weight.contiguous().cpu() for name, weight in weights.items()}
        _write_atomically(self._path(block), save(tensors, metadata=metadata))

    def load_orders(self) -> dict[str, torch.Tensor] | None:
        """The orders of channels that the run began with, or None."""
        path = self.folder / "orders.safetensors"
        if not path.exists():
            return None
        with self._open(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def save_orders(self, orders: Mapping[str, torch.Tensor]) -> None:
        """Keep the orders of channels.

        Args:
            orders: int64 tensors by the name of the channels.
        """
        from safetensors.torch import save

        content = save(dict(orders), metadata={"run": self._digest})
        _write_atomically(self.folder / "orders.safetensors", content)

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        """A file of this run, by its header; safetensors refuses one that is shorter than its header says."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                owner = (file.metadata() or {}).get("run")
                if owner != self._digest:
                    raise ValueError(
                        f"{path} is of another run than {self.folder / 'prune.json'}: remove {path.name}, and what "
                        "it held is computed again"
                    )
                yield file
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it, and what it held is computed again"
            ) from error

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if found.get("format") != _FORMAT:
            raise ValueError(
                f"{self.folder} has state format {found.get('format')!r}, this version reads {_FORMAT}"
            )
        wanted = json.loads(json.dumps(wanted))
        for part, what in _PARTS.items():
            if found.get(part) != wanted[part]:
                difference = _difference(found.get(part), wanted[part])
                raise ValueError(
                    f"{self.folder} cannot be resumed: the {what} changed ({difference}); "
                    "repeat the first run's call, or start in another folder"
                )
        if found.get("threads") != wanted["threads"]:
            warnings.warn(
                f"resuming with {wanted['threads']} threads what was begun with {found.get('threads')}: "
                "the last bits of the remaining blocks may differ",
                stacklevel=4,
            )


def fingerprint(
    weights: str, inputs: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """What two runs must have in common for one to go on where the other stopped.

    Args:
        weights: digest of the unpruned model's weights.
        inputs: what the model is calibrated with, by name.
        arguments: everything else that decides the result, as plain values.

    Returns:
        Digests and arguments, ready for JSON.
    """
    import lissom

    data = hashlib.sha256()
    for name, tensor in inputs.items():
        data.update(f"{name} {tuple(tensor.shape)}".encode())
        data.update(_bytes(tensor))
    return {
        "lissom": lissom.__version__,
        "model": weights,
        "data": data.hexdigest(),
        "arguments": dict(arguments),
        "threads": torch.get_num_threads(),
    }


def _digest(fingerprint: Mapping[str, Any]) -> str:
    """Of what decides the result; the number of threads may change."""
    parts = {part: fingerprint[part] for part in _PARTS}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove {path.parent}, or start in another folder"
        ) from error
    if not isinstance(head, dict):
        raise ValueError(f"{path} is damaged: remove {path.parent}, or start in another folder")
    return head


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in wanted if found.get(key) != wanted[key]]
        return ", ".join(f"{key} was {_brief(found.get(key))}, is {_brief(wanted[key])}" for key in keys)
    kind = "digest " if len(str(wanted)) == 64 else ""
    return f"{kind}was {str(found)[:12]}, is {str(wanted)[:12]}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
