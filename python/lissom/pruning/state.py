# SPDX-License-Identifier: Apache-2.0
"""Finished blocks on disk, so that a run killed at any block goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .report import LayerReport

_FORMAT = 1


class PruneState:
    """A folder with one safetensors file for each finished block and one JSON file that says whose they are.

    Every file is written under a temporary name and renamed, so a file that is there is complete. Nothing is
    trusted by its name alone: the JSON holds digests of the model's weights, of the calibration tokens and of
        all
    arguments, and a run with others is refused.

    Args:
        folder: where the state lives; made when absent.
        fingerprint: digests and arguments of this run, as `fingerprint` makes them.
        resume: go on from what is there; otherwise the folder must hold no state.

    Raises:
        FileExistsError: the folder holds a state and `resume` is False.
        ValueError: the state belongs to another model, other data or other arguments.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        head = self.folder / "prune.json"
        if head.exists():
            if not resume:
                raise FileExistsError(
                    f"{self.folder} holds the state of an earlier run: go on with resume=True, or remove it"
                )
            self._check(json.loads(head.read_text(encoding="utf-8")), fingerprint)
        else:
            text = json.dumps({"format": _FORMAT, **fingerprint}, indent=1)
            _write_atomically(head, text.encode())

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
        from safetensors import safe_open

        with safe_open(self._path(block), framework="pt") as file:
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

        metadata = {"layers": json.dumps([asdict(layer) for layer in layers])}
        tensors = {name: weight.contiguous().cpu() for name, weight in weights.items()}
        _write_atomically(self._path(block), save(tensors, metadata=metadata))

    def load_orders(self) -> dict[str, torch.Tensor] | None:
        """The orders of channels that the run began with, or None."""
        from safetensors.torch import load_file

        path = self.folder / "orders.safetensors"
        return load_file(path) if path.exists() else None

    def save_orders(self, orders: Mapping[str, torch.Tensor]) -> None:
        """Keep the orders of channels.

        Args:
            orders: int64 tensors by the name of the channels.
        """
        from safetensors.torch import save

        _write_atomically(self.folder / "orders.safetensors", save(dict(orders)))

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if found.get("format") != _FORMAT:
            raise ValueError(
                f"{self.folder} has state format {found.get('format')!r}, this version reads {_FORMAT}"
            )
        wanted = json.loads(json.dumps(wanted))
        for part in ("model", "data", "arguments"):
            if found.get(part) != wanted[part]:
                difference = _difference(found.get(part), wanted[part])
                raise ValueError(
                    f"{self.folder} cannot be resumed: the {part} changed ({difference}); "
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
    data = hashlib.sha256()
    for name, tensor in inputs.items():
        data.update(f"{name} {tuple(tensor.shape)}".encode())
        data.update(_bytes(tensor))
    return {
        "model": weights,
        "data": data.hexdigest(),
        "arguments": dict(arguments),
        "threads": torch.get_num_threads(),
    }


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in wanted if found.get(key) != wanted[key]]
        return ", ".join(f"{key} was {_brief(found.get(key))}, is {_brief(wanted[key])}" for key in keys)
    return f"digest was {str(found)[:12]}, is {str(wanted)[:12]}"


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
