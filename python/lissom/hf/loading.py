# SPDX-License-Identifier: Apache-2.0
"""Loads models and tokenizers strictly: local files, safetensors, no code from the checkpoint, nothing left
random.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lissom.hf.checkpoint import CheckpointError, check_folder, read_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# What is made of a model takes these along.
_RIGHTS = ["README.md", "LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*"]


def load_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, local_files_only: bool = True
) -> PreTrainedModel:
    """Loads a causal language model, packed or ordinary, and refuses a checkpoint that does not fill it
    completely.

    Args:
        path: a model folder, or the name of a model that is in the local Hugging Face cache.
        dtype: type of the weights; as stored if None.
        local_files_only: False allows a download.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        CheckpointError: there is no such model here, or it is damaged, incomplete or of an unknown kind.

    Example:
        >>> load_model("/nowhere")
        Traceback (most recent call last):
        lissom.hf.checkpoint.CheckpointError: /nowhere is not a model folder: there is no such folder
    """
    from transformers import AutoModelForCausalLM

    from lissom.hf.quantizer import register

    register()
    folder = _local_folder(path, local_files_only)
    check_folder(folder)
    _refuse_retired(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto" if dtype is None else dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of its model, the first is {missing[0]}")
    return model


def load_tokenizer(path: str | os.PathLike[str], *, local_files_only: bool = True) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that lies in a model folder.

    Args:
        path: a model folder, or the name of a model that is in the local Hugging Face cache.
        local_files_only: False allows a download.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: there is no such model here.
        OSError: the folder has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    folder = _local_folder(path, local_files_only)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _refuse_retired(folder: Path) -> None:
    """A 2:4 format that transformers knew once: what it says of it now does not help."""
    from lissom.hf.foreign.declared import declared_format

    try:
        form = declared_format(read_config(folder)).format
    except CheckpointError:
        return  # another format, which transformers may know
    if form:
        raise CheckpointError(
            f"{folder} is stored as {form}, which transformers no longer reads: convert it first (lissom convert "
            f"{folder} NEW)"
        )


def _local_folder(path: str | os.PathLike[str], local_files_only: bool) -> Path:
    name = str(path)
    if _names_a_folder(name):
        return _existing_folder(name)
    # Given a name, transformers asks the network for an adapter even where local_files_only forbids it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        wanted = [*_MODEL_FILES, *_RIGHTS]
        return Path(snapshot_download(name, local_files_only=local_files_only, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{name} is neither a folder nor a model in the local cache") from error


def _names_a_folder(name: str) -> bool:
    """A hub name is "model" or "owner/model"; anything else, and anything that exists, is a path."""
    return os.path.exists(name) or name.count("/") > 1 or name.startswith((".", "/", "~"))


def _existing_folder(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        state = "it is a file" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{name} is not a model folder: {state}")
    return folder
