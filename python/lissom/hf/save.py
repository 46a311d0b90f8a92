# SPDX-License-Identifier: Apache-2.0
"""Writes models as folders that transformers reads: packed 2:4 weights, or ordinary ones with their zeros."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

import lissom
from lissom import ops
from lissom.hf.atomic import replacing_directory
from lissom.hf.card import CardFacts, render_card
from lissom.hf.quantizer import Sparse24Config, packed_modules
from lissom.hf.side import CARD_NAME, Ancestry, ancestry_of
from lissom.models import packing_obstacles
from lissom.models.walk import uncompiled
from lissom.nn import Sparse24Linear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SaveReport:
    """What :func:`save` wrote: total ``bytes``, the ``files`` by name, the ``format``, and the 2:4
    ``modules``.
    """

    bytes: int
    files: tuple[str, ...]
    format: str
    modules: tuple[str, ...]

    def __str__(self) -> str:
        gain = "any tool reads it, none is faster for it" if self.format == "dense" else "loads with lissom"
        return f"{self.bytes / 1e6:.1f} MB, {len(self.modules)} linears 2:4, {self.format}: {gain}"


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    format: Literal["packed", "dense"] = "packed",
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    card: CardFacts | Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> SaveReport:
    """Saves a model so that an interruption leaves either the folder as it was, or the complete new one.

    "packed" stores every linear that is 2:4 as values and metadata, whether the model holds it dense or
    packed; it needs lissom to load and runs fast. "dense" writes the zeros out; every tool reads that,
    none is faster for it. The model itself is not changed. Files in an existing folder that belong to no
    checkpoint are kept. Licence and notices of the folder that the model was loaded from go along.

    Args:
        model: a transformers model, perhaps compiled as a whole; adapters must be merged first.
        directory: the folder to write.
        format: "packed" or "dense".
        tokenizer: saved beside the model if given.
        overwrite: allow replacing a model that is already there.
        card: measured facts for the section in README.md; method and data come from ``model.config.lissom``.
        max_shard_size: weights above this size are split into several files.

    Returns:
        What was written.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: unknown format, unmerged adapters, compiled parts, or nothing to pack.
        FileExistsError: ``directory`` holds a model and ``overwrite`` is False.

    Example:
        >>> save(nn.Linear(4, 4), "out")
        Traceback (most recent call last):
        TypeError: lissom.save needs a transformers model, got Linear
    """
    model = cast("PreTrainedModel", uncompiled(model))
    _check_model(model)
    facts = card if isinstance(card, CardFacts) else CardFacts(**(card or {}))
    modules = _modules_to_pack(model, format)
    config = _config_to_save(model, format, modules)
    target = Path(directory)
    with replacing_directory(target, overwrite=overwrite) as folder:
        state = _packed_state(model) if format == "packed" else _dense_state(model)
        with _presented_with(model, config):
            model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        base = ancestry_of(model)
        for file in base.files if base else ():
            shutil.copyfile(file, folder / file.name)
        _write_card(folder, facts, config, len(modules), old=target / CARD_NAME, base=base)
        files = tuple(sorted(entry.name for entry in folder.iterdir()))
        size = sum((folder / name).stat().st_size for name in files)
    return SaveReport(bytes=size, files=files, format=format, modules=tuple(modules))


def _check_model(model: object) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        hint = ": merge its adapters first with lissom.hf.merge_lora" if hasattr(model, "peft_config") else ""
        raise TypeError(f"lissom.save needs a transformers model, got {type(model).__name__}{hint}")
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise ValueError(
            "lissom.save got a model with compiled parts, whose weights have other names: put the modules that "
            "torch.compile was given (._orig_mod) back first"
        )
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "lissom.save got a model with adapters in it: merge them first with lissom.hf.merge_lora"
        )


def _write_card(
    folder: Path,
    facts: CardFacts,
    config: PreTrainedConfig,
    packed_modules: int,
    *,
    old: Path,
    base: Ancestry | None,
) -> None:
    """Keeps what others wrote into the README that is about to be replaced."""
    existing = old.read_text(encoding="utf-8") if old.is_file() else None
    form = config.lissom["format"]
    text = render_card(
        facts, config.lissom, format=form, packed_modules=packed_modules, existing=existing, base=base
    )
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


def _modules_to_pack(model: nn.Module, format: str) -> list[str]:
    if format not in ("packed", "dense"):
        raise ValueError(f"format must be 'packed' or 'dense', got {format!r}")
    modules = [name for name, _ in two_four_linears(model)]
    if format == "packed" and not modules:
        raise ValueError(
            "no linear of this model is 2:4: prune it first (lissom.prune), or save with format='dense'"
        )
    return modules


def two_four_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the linears that are, or can be, packed, by name. A weight with two owners stays dense: both read it."""
    owners: dict[int, int] = {}
    for parameter in (p for m in model.modules() for p in m.parameters(recurse=False)):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    obstacles = packing_obstacles(model)
    for name, module in model.named_modules():
        if isinstance(module, Sparse24Linear):
            yield name, module
            continue
        weight = linear_weight(module)
        if (
            weight is None
            or name in obstacles
            or owners[id(module.weight)] > 1
            or weight.dtype not in _PACKABLE
        ):
            continue
        if weight.shape[1] % 4 == 0 and weight.numel() and ops.sparse24_check(weight)[0]:
            yield name, module


def linear_weight(module: nn.Module) -> torch.Tensor | None:
    """The ``[N, K]`` weight of a dense linear; GPT-2's Conv1D keeps it transposed. None for any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.weight.detach()
    if isinstance(module, Conv1D):
        return module.weight.detach().t().contiguous()
    return None


def _packed_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    for name, module in two_four_linears(model):
        if not isinstance(module, Sparse24Linear):
            weight = linear_weight(module)
            assert weight is not None
            values, meta = ops.sparse24_compress(weight)
            state[f"{name}.weight"], state[f"{name}.weight_meta"] = values, meta
    return state


def _dense_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    packed = packed_modules(model)
    transposed = _conv1d_names(model) if packed else set()
    for name, module in packed.items():
        weight = module.dense_weight()
        state[f"{name}.weight"] = weight.t().contiguous() if name in transposed else weight
        del state[f"{name}.weight_meta"]
    return state


def _conv1d_names(model: PreTrainedModel) -> set[str]:
    """Which modules of this architecture are Conv1D where no linear has been swapped."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    return {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}


def _config_to_save(model: PreTrainedModel, format: str, modules: list[str]) -> PreTrainedConfig:
    """A copy for this folder alone: an entry on a shared config would leak into every model made from it."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_is_quantized"):
        if hasattr(config, name):
            delattr(config, name)
    if format == "packed":
        config.quantization_config = Sparse24Config(modules=modules)
    provenance = dict(getattr(config, "lissom", None) or {})
    config.lissom = {"version": lissom.__version__} | provenance | {"format": format}
    if isinstance(model.get_output_embeddings(), Sparse24Linear):
        # Tying at load would put the embedding in the place of the packed head.
        config.tie_word_embeddings = False
    return config


@contextmanager
def _presented_with(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[None]:
    """Lets ``save_pretrained`` write this config and its state dict, whatever the model was loaded from."""
    own_config, quantizer = model.config, model.__dict__.pop("hf_quantizer", None)
    model.config = config
    try:
        yield
    finally:
        model.config = own_config
        if quantizer is not None:
            model.hf_quantizer = quantizer
