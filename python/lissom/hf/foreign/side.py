# SPDX-License-Identifier: Apache-2.0
"""Files of a model folder beside its weights: which go along, and which links may be followed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lissom.hf.checkpoint import CONFIG_NAME, CheckpointError

CARD_NAME = "README.md"
_TAKEN = (
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.vocab",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
)
# What tells of the old weights, or is written anew.
_LEFT = (CONFIG_NAME, "*.index.json", "quantize_config.json", CARD_NAME, "lissom-*", "recipe.*")


def side_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Split the files beside the weights.

    Args:
        folder: a model folder.

    Returns:
        Files to take along, and names of entries that stay behind.

    Raises:
        CheckpointError: a file to take along is a link that leads nowhere.
    """
    found = {file for pattern in _TAKEN for file in folder.glob(pattern)}
    taken = sorted(file for file in found if not any(file.match(pattern) for pattern in _LEFT))
    for file in taken:
        if file.is_symlink() and not file.exists():
            raise CheckpointError(
                f"{file} is a symbolic link that leads nowhere: copy its target here, or remove it"
            )
    taken = [file for file in taken if file.is_file()]
    folders = {file.parent for file in taken}
    left = [
        entry.name
        for entry in folder.iterdir()
        if entry not in taken
        and entry not in folders
        and entry.suffix != ".safetensors"
        and entry.name not in (CONFIG_NAME, CARD_NAME)
        and not entry.name.endswith(".index.json")
        and not entry.name.startswith(".")
    ]
    return taken, sorted(left)


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Refuse files that are links out of the folder: they could bring anything of this machine into the copy.

    The cache of the Hugging Face hub is made of links from `snapshots/REVISION` to `blobs`: these are followed.

    Args:
        folder: a model folder.
        files: files in it.

    Raises:
        CheckpointError: a link that leads nowhere or out of the folder.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for file in files:
        if not file.is_symlink() and not file.parent.is_symlink():
            continue
        real = file.resolve()
        if not real.exists():
            raise CheckpointError(
                f"{file} is a symbolic link that leads nowhere: copy its target here, or remove it"
            )
        if not any(real.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{file} is a symbolic link to {real}, out of the model folder: copy that file here if it belongs to "
                "the model"
            )
