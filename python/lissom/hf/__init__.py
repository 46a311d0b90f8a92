# SPDX-License-Identifier: Apache-2.0
"""Everything that knows transformers: saving, loading, model cards, LoRA adapters, foreign checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lissom.hf.card import CardFacts as CardFacts
    from lissom.hf.checkpoint import CheckpointError as CheckpointError
    from lissom.hf.checkpoint import check_folder as check_folder
    from lissom.hf.compressed_tensors import from_compressed_tensors as from_compressed_tensors
    from lissom.hf.convert import ConvertReport as ConvertReport
    from lissom.hf.convert import convert_folder as convert_folder
    from lissom.hf.convert import plan_conversion as plan_conversion
    from lissom.hf.loading import load_model as load_model
    from lissom.hf.loading import load_tokenizer as load_tokenizer
    from lissom.hf.lora import merge_lora as merge_lora
    from lissom.hf.save import SaveReport as SaveReport

_HOMES = {
    "CardFacts": "card",
    "CheckpointError": "checkpoint",
    "ConvertReport": "convert",
    "SaveReport": "save",
    "check_folder": "checkpoint",
    "convert_folder": "convert",
    "from_compressed_tensors": "compressed_tensors",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "merge_lora": "lora",
    "plan_conversion": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
