# SPDX-License-Identifier: Apache-2.0
"""A model whose weights stay in its files and come into memory one block at a time."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import ops
from ..hf.atomic import replacing_directory
from ..hf.checkpoint import CONFIG_NAME, META_SUFFIX, VALUE_DTYPES, check_folder, packed_entry, read_config
from ..hf.side import CARD_NAME, ancestry, copy_side_files
from .origin import Origin, find_origins, load_buffers, skeleton, tie
from .shards import DTYPES, SHARD_BYTES, ShardWriter, Stored, stored_tensors
from .walk import UnsupportedModelError, packing_obstacles, uncompiled

if TYPE_CHECKING:
    from ..hf.card import CardFacts
    from ..hf.save import SaveReport


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone


class Resident:
    """A model and which of its weights are in memory.

    Made from a model, everything is in memory: `load` and `release` do nothing. `Resident.open` makes the same
    from a folder and leaves every parameter on the meta device until it is loaded; buffers (rotary frequencies
    and the like) are real from the start.

    Args:
        model: a transformers model in memory.

    Attributes:
        model: the model.
        folder: where its weights are; None when they are in memory.

    Example:
        >>> from lissom import assets
        >>> resident = Resident.open(assets.TINY_LLAMA)
        >>> layer = resident.model.model.layers[0]
        >>> with resident.block(layer):
        ...     print(layer.mlp.up_proj.weight.device)
        cpu
        >>> layer.mlp.up_proj.weight.device
        device(type='meta')
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = uncompiled(model)
        self.folder: Path | None = None
        self._stored: dict[str, Stored] = {}
        self._origins: dict[str, Origin] = {}
        self._index()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Resident:
        """Open a model folder; of its weights only headers are read.

        Args:
            folder: with config.json and dense safetensors weights, in one file or several.
            dtype: type of the weights in memory; None: as the config says, else as stored.

        Returns:
            The model in eval mode, its parameters on the meta device.

        Raises:
            CheckpointError: the folder is damaged or incomplete, or does not fit its config.
            UnsupportedModelError: packed or quantised weights.
        """
        folder = Path(folder)
        if read_config(folder).get("quantization_config") is not None:
            raise UnsupportedModelError(
                f"{folder} is quantised or packed (quantization_config): use the dense model"
            )
        check_folder(folder)
        stored = stored_tensors(folder)
        resident = cls(skeleton(folder, stored, dtype))
        resident.folder = folder
        resident._stored = stored
        resident._origins = find_origins(resident.model, stored)
        tie(resident.model, resident._origins)
        load_buffers(resident.model, resident._origins)
        resident._index()
        return resident

    @property
    def device(self) -> torch.device:
        """Where weights are once they are loaded."""
        return torch.device("cpu") if self.folder is not None else next(self.model.parameters()).device

    def load(self, *parts: str | nn.Module) -> list[str]:
        """Bring weights into memory; those that are there already stay as they are.

        Args:
            *parts: modules, or names of modules or parameters.

        Returns:
            Names of the parameters that were read.

        Raises:
            ValueError: the model has no such part.
            CheckpointError: a file changed since it was opened.
        """
        read: list[str] = []
        for name in self.names(*parts):
            if name in read or not self._get(name).is_meta:
                continue
            origin = next(self._origins[alias] for alias in self._aliases[name] if alias in self._origins)
            for target, tensor in origin.tensors(self.model, Stored.read).items():
                first = self._first[target]
                if self._get(first).is_meta:
                    self._put(first, nn.Parameter(tensor, requires_grad=False))
                    read.append(first)
        return read

    def release(self, *parts: str | nn.Module) -> None:
        """Forget weights that can be read again; changes that were not written to an output are lost.

        Args:
            *parts: as for `load`.

        Raises:
            ValueError: the model has no such part.
        """
        self._forget(self.names(*parts))
        self.trim()

    def trim(self) -> None:
        """Give freed memory back to the system where the model is read block by block.

        The allocator keeps freed pieces below 32 MB, activations and panels of sums, for later: as much again as
        what is in use.
        """
        if self.folder is not None and _malloc_trim is not None:
            _malloc_trim(0)

    @contextmanager
    def block(self, *parts: str | nn.Module) -> Iterator[None]:
        """Weights in memory for a while; those that were there before stay at the end.

        Args:
            *parts: as for `load`.
        """
        read = self.load(*parts)
        try:
            yield
        finally:
            self._forget(read)

    def names(self, *parts: str | nn.Module) -> list[str]:
        """The parameters of some parts, each once: a tied weight has one name.

        Args:
            *parts: as for `load`.

        Returns:
            Parameter names.

        Raises:
            ValueError: the model has no such part.
        """
        return list(dict.fromkeys(self._first[name] for name in self._inside(parts)))

    def rest(self, blocks: Iterable[nn.Module]) -> list[str]:
        """The parameters that are needed outside of some modules: embeddings and norms, given blocks and head.

        Args:
            blocks: modules of the model. A weight of theirs that is tied to one outside is needed, too.

        Returns:
            Parameter names.
        """
        inside = set(self._inside(tuple(blocks)))
        return list(dict.fromkeys(first for name, first in self._first.items() if name not in inside))

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all weights, as they are in the folder or in memory."""
        found = hashlib.sha256()
        for name, each in sorted(self._stored.items()):
            found.update(f"{name} {each.shape} {each.dtype}".encode())
            for chunk in each.chunks():
                found.update(chunk)
        if self.folder is None:
            for name, tensor in self.model.state_dict().items():
                found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    @contextmanager
    def saving(
        self,
        target: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        packed: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> Iterator[Output]:
        """Writes a changed copy of the folder, block by block, in place of `target` once it is complete.

        Every tensor keeps the name, shape and type that it has in the folder, except linears that are packed. What
        was not written in the body is copied, tokenizer, licence and other small files too. When the body raises,
        `target` is as it was before.

        Args:
            target: folder to write.
            overwrite: allow replacing a model that is there.
            packed: store linears that are written and 2:4 as values and metadata.
            shard_bytes: weights above this size are split into several files.

        Yields:
            The output, to write changed blocks to.

        Raises:
            ValueError: the model is in memory (`lissom.save` writes it), or nothing could be packed.
            UnsupportedModelError: transformers changes tensors of this model on loading and cannot change them
                back.
            FileExistsError: `target` holds a model and `overwrite` is False.
        """
        if self.folder is None:
            raise ValueError("saving needs a model opened from a folder; lissom.save writes one in memory")
        for origin in dict.fromkeys(self._origins.values()):
            origin.check_return(self.model)
        with replacing_directory(Path(target), overwrite=overwrite) as folder:
            output = Output(self, folder, Path(target), packed=packed, shard_bytes=shard_bytes)
            yield output
            output._finish()

    def stored(self, *parts: str | nn.Module) -> dict[str, torch.Tensor]:
        """Loaded weights under the names and in the types of the folder.

        Args:
            *parts: as for `load`; in memory.

        Returns:
            Tensors by stored name; they share memory with the model where nothing had to be converted.

        Raises:
            ValueError: a weight is not in memory.
        """
        wanted = set(self.names(*parts))
        origins = dict.fromkeys(
            origin for target, origin in self._origins.items() if self._first.get(target) in wanted
        )
        found: dict[str, torch.Tensor] = {}
        for origin in origins:
            targets = {target: self._get(target).detach() for target in origin.targets}
            absent = [target for target, tensor in targets.items() if tensor.is_meta]
            if absent:
                raise ValueError(f"{absent[0]} is not in memory: load the whole block before writing it")
            found |= origin.returned(self.model, targets)
        return found

    def _index(self) -> None:
        # remove_duplicate=False lists a tied Parameter under each of its names; the first stands for all.
        seen: dict[int, str] = {}
        self._first: dict[str, str] = {}
        self._aliases: dict[str, list[str]] = {}
        self._empty: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            first = self._first[name] = seen.setdefault(id(parameter), name)
            self._aliases.setdefault(first, []).append(name)
            self._empty.setdefault(first, parameter)

    def _inside(self, parts: Sequence[str | nn.Module]) -> Iterator[str]:
        """Every name of the parameters of some parts, tied ones under each of theirs."""
        modules = {id(module): name for name, module in self.model.named_modules()}
        for part in parts:
            prefix = modules.get(id(part)) if isinstance(part, nn.Module) else part
            if prefix is None or (prefix not in self._first and prefix not in modules.values()):
                what = prefix if isinstance(part, str) else type(part).__name__
                raise ValueError(f"{what} is no module or parameter of this {type(self.model).__name__}")
            for name in self._first:
                if not prefix or name == prefix or name.startswith(f"{prefix}."):
                    yield name

    def _get(self, name: str) -> torch.Tensor:
        parameter: torch.Tensor = self.model.get_parameter(name)
        return parameter

    def _put(self, first: str, parameter: nn.Parameter) -> None:
        for name in self._aliases[first]:
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, parameter)

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            if self._empty[name].is_meta:
                self._put(name, self._empty[name])


class Output:
    """A model folder in the making, from `Resident.saving`.

    Attributes:
        card: facts for the model card, if any.
        report: what was written; None until the folder is complete.
    """

    def __init__(
        self, resident: Resident, folder: Path, target: Path, *, packed: bool, shard_bytes: int
    ) -> None:
        self.card: CardFacts | None = None
        self.report: SaveReport | None = None
        self._resident = resident
        self._folder = folder
        self._target = target
        self._format = "packed" if packed else "dense"
        names = resident._stored.keys()
        metas = [f"{name.removesuffix('.weight')}{META_SUFFIX}" for name in names] if packed else []
        self._shards = ShardWriter(folder, [*names, *metas], shard_bytes=shard_bytes)
        self._two_four: list[str] = []  # modules, as the folder names them when packed
        self._dense = set(packing_obstacles(resident.model))

    def write(self, *parts: str | nn.Module) -> None:
        """Write weights as they are in memory now.

        Args:
            *parts: modules or names, as for `Resident.load`; each weight once in a run.

        Raises:
            ValueError: a weight is not in memory, or was written before.
        """
        from ..hf.save import two_four_linears

        tensors = self._resident.stored(*parts)
        modules = dict(self._resident.model.named_modules())
        names = {id(module): name for name, module in modules.items()}
        for part in parts:
            module = part if isinstance(part, nn.Module) else modules.get(part)
            for _, linear in two_four_linears(module) if module is not None else ():
                name = names[id(linear)]
                if name in self._dense:
                    continue
                if self._format == "dense":
                    self._two_four.append(name)
                else:
                    self._pack(name, linear, tensors)
        self._shards.add(tensors)

    def _pack(self, name: str, linear: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Put values and metadata in the place of a weight, where its tensor is nobody else's."""
        from ..hf.save import linear_weight

        target = f"{name}.weight"
        origin = self._resident._origins[target]
        stored = origin.stored[0][0]
        if origin.obstacle(self._resident.model, target) or stored.dtype not in VALUE_DTYPES:
            return
        module = stored.name.removesuffix(".weight")
        weight = linear_weight(linear)
        assert weight is not None
        values, meta = ops.sparse24_compress(weight.to(DTYPES[stored.dtype]))
        tensors[stored.name], tensors[f"{module}{META_SUFFIX}"] = values, meta
        self._two_four.append(module)

    def _finish(self) -> None:
        from ..hf.card import CardFacts, render_card
        from ..hf.save import SaveReport

        source = self._resident.folder
        assert source is not None
        if self._format == "packed" and not self._two_four:
            raise ValueError(
                "no linear that was written is 2:4 and has a tensor of its own in the folder: nothing can be packed; "
                "write format 'dense'"
            )
        done = self._shards.names
        self._shards.copy(each for name, each in self._resident._stored.items() if name not in done)
        self._shards.finish()
        copy_side_files(source, self._folder)
        config = self._config(source)
        (self._folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        old = self._target / CARD_NAME
        existing = old.read_text(encoding="utf-8") if old.is_file() else None
        facts = self.card or CardFacts()
        text = render_card(
            facts,
            config["lissom"],
            format=self._format,
            packed_modules=len(self._two_four),
            existing=existing,
            base=ancestry(source),
        )
        (self._folder / CARD_NAME).write_text(text, encoding="utf-8")
        if self._format == "packed":
            check_folder(self._folder)
        size = sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())
        names = tuple(sorted(entry.name for entry in self._folder.iterdir()))
        self.report = SaveReport(size, names, self._format, tuple(self._two_four))

    def _config(self, source: Path) -> dict[str, Any]:
        """The folder's own config.json, with what pruning left in `model.config.lissom`."""
        import lissom

        provenance = dict(getattr(self._resident.model.config, "lissom", None) or {})
        entry = {"version": lissom.__version__} | provenance | {"format": self._format}
        config = read_config(source) | {"lissom": entry}
        if self._format == "packed":
            config["quantization_config"] = packed_entry(self._two_four)
        return config
