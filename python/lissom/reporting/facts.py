# SPDX-License-Identifier: Apache-2.0
"""What a report says of the machine and of a model, gathered without loading weights."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lissom.reporting.roofline import linear_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

Patterns = str | float | dict[str, str]  # of a recipe: one pattern, or one for each of some layers
SETTINGS = ("LISSOM_CPU_ISA", "LISSOM_AUTOLOAD", "LISSOM_TORCH_DIR")
_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pydantic", "peft", "lm_eval", "openvino")


def environment() -> dict[str, Any]:
    """Versions, CPU, kernels in use, settings.

    Returns:
        Plain values; packages that are not installed are left out.

    Example:
        >>> environment()["lissom"]
        '0.1.0'
    """
    import torch

    import lissom

    cpu = lissom.cpu_info()
    return {
        "lissom": lissom.__version__,
        "build": lissom.build_info(),
        "python": platform.python_version(),
        "packages": _versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu["model"],
        "core": cpu["core"],
        "core_measured": cpu["core_measured"],
        "detected_isa": cpu["detected_isa"],
        "isa": cpu["isa"],
        "kernels": {family: table for family, table in cpu.items() if isinstance(table, dict)},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "cuda": lissom.cuda_info(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "settings": {name: os.environ.get(name) for name in SETTINGS},
    }


def memory_bytes() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def model_folder(model: str | Path) -> Path:
    """The folder behind a model's name: itself, or a snapshot in the local Hugging Face cache.

    Raises:
        FileNotFoundError: neither is there.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"there is no model folder {str(model)!r} and no such model in the local Hugging Face "
            "cache: check the path, or download the model first"
        ) from error


def packed_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the packed linears of a folder, and of the same linears dense.

    Args:
        folder: in the packed format.

    Returns:
        `linears_source_bytes` and `linears_output_bytes`.
    """
    from lissom.hf.checkpoint import META_SUFFIX, check_format, read_config
    from lissom.models.shards import stored_tensors

    stored = stored_tensors(folder)
    modules = check_format(read_config(folder)["quantization_config"])
    values = sum(stored[f"{name}.weight"].size for name in modules)
    meta = sum(stored[name + META_SUFFIX].size for name in modules)
    return {"linears_source_bytes": 2 * values, "linears_output_bytes": values + meta}


def weight_file_bytes(folder: str | Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def skeleton(model: str | Path, *, dtype: str = "auto") -> nn.Module:
    """The model without its weights (meta device), for plans and inventories.

    Args:
        model: folder or cached name.
        dtype: type of the weights; "auto" is the checkpoint's.

    Returns:
        The model on the meta device; packed checkpoints come as their dense shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_folder(model), local_files_only=True, trust_remote_code=False)
    stored = getattr(config, "dtype", None) or torch.float32
    wanted = stored if dtype == "auto" else getattr(torch, dtype)
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted.removeprefix("torch."))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=wanted)


def inventory(
    model: str | Path,
    *,
    pattern: Patterns = "2:4",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
) -> dict[str, Any]:
    """Blocks, linears and parameters of a model, and what pruning could touch; no weight is read.

    Args:
        model: folder or cached name.
        pattern: what a prune would ask for.
        include: module names or "re:" patterns to take.
        exclude: module names or "re:" patterns to leave.

    Returns:
        Plain values: sizes, `linears` by kind, `prune` with what is touched, what is left and why,
        and the bytes after.

    Raises:
        UnsupportedModelError: an architecture that lissom does not know.
    """
    from transformers import PretrainedConfig

    from lissom.models.walk import describe

    folder = model_folder(model)
    raw, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
    quantization = raw.get("quantization_config") or {}
    net = skeleton(folder)
    parts = describe(net)
    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    for ref in parts.linears():
        key = (re.sub(r"^.*\.\d+\.", "", ref.name), ref.shape)
        kinds[key] = kinds.get(key, 0) + 1
    return {
        "model": str(model),
        "family": parts.family,
        "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
        "blocks": len(parts.blocks),
        "parameters": sum(p.numel() for p in net.parameters()),
        "file_bytes": weight_file_bytes(folder),
        "packed": quantization.get("quant_method") == "lissom",
        "quantization": quantization.get("quant_method"),
        "made_by": raw.get("lissom"),
        "linears": [
            {"kind": kind, "shape": list(shape), "count": count, "parameters": count * shape[0] * shape[1]}
            for (kind, shape), count in kinds.items()
        ],
        "prune": _reach(net, pattern, include, exclude),
    }


def _reach(
    net: nn.Module, pattern: Patterns, include: list[str] | None, exclude: list[str] | None
) -> dict[str, Any]:
    """What a prune would touch, and its bytes before and after packing."""
    from lissom.models.walk import describe
    from lissom.pruning.selection import read_pattern, select_linears

    parts, wanted = describe(net), read_pattern(pattern)
    selection = select_linears(parts, wanted, include=include, exclude=exclude, strict=False)
    element = next(net.parameters()).element_size()
    fits = {ref.name: selection.patterns[ref.name].fits_quads for ref in selection.linears()}
    dense, packed = (
        sum(
            linear_bytes(0, *ref.shape, element=element, sparse=packs and fits[ref.name])
            for ref in selection.linears()
        )
        for packs in (False, True)
    )
    return {
        "pattern": str(wanted),
        "touched": list(fits),
        "left": selection.left,
        "touched_parameters": selection.touched_parameters,
        "touched_share": selection.touched_parameters / sum(p.numel() for p in net.parameters()),
        "dense_bytes": dense,
        "packed_bytes": packed if any(fits.values()) else None,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of a short dense product on this machine: the yardstick of time estimates."""
    import torch

    left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    left @ right
    start = time.perf_counter()
    for _ in range(4):
        left @ right
    return 4 * 2 * 256 * 1024 * 1024 / (time.perf_counter() - start)
