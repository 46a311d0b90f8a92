# SPDX-License-Identifier: Apache-2.0
"""Files of a model folder beside its weights: which go along, what they say of rights, which links may be followed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
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
    "additional_chat_templates/*.jinja",
)
# What tells of the old weights, or is written anew.
_RIGHTS = re.compile(r"(un)?licen[cs]e|notice|copying|copyright|use_policy", re.IGNORECASE)
_LEFT = (CONFIG_NAME, "*.index.json", "quantize_config.json", CARD_NAME, "lissom-*", "recipe.*")


@dataclass(frozen=True)
class Ancestry:
    """What a model says of the one it was made from.

    Attributes:
        name: of that model: `owner/model` where it is known, else the name of its folder.
        files: its licence, notices and the like.
        fields: lines of its card's front matter on licence and language, as they stand there.
    """

    name: str
    files: tuple[Path, ...] = ()
    fields: tuple[str, ...] = ()

    @property
    def front_matter(self) -> list[str]:
        """Lines for the new model's card."""
        plain = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.name)
        return [*self.fields, f"base_model: {self.name if plain else json.dumps(self.name)}"]


def ancestry(source: Path) -> Ancestry:
    """What goes from a model folder into every model that is made from it.

    Args:
        source: a model folder, also one in the cache of the Hugging Face hub.

    Returns:
        Name, files and fields.
    """
    files = sorted(file for file in source.iterdir() if file.is_file() and _RIGHTS.match(file.name))
    return Ancestry(_name_of(source), tuple(files), tuple(_fields(source / CARD_NAME)))


def ancestry_of(model: object) -> Ancestry | None:
    """As `ancestry`, of what a model in memory was loaded from, as far as that is still there.

    Args:
        model: a transformers model.

    Returns:
        Name, files and fields; None where the model says nothing of its origin.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        return None
    if Path(name).is_dir():
        return ancestry(Path(name))
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, CONFIG_NAME)
    except ValueError:  # no name that the hub could have
        return None
    return ancestry(Path(config).parent) if isinstance(config, str) else Ancestry(name)


def _name_of(folder: Path) -> str:
    real = folder.resolve()
    owner, _, model = real.parent.parent.name.removeprefix("models--").partition("--")
    return f"{owner}/{model}" if model and real.parent.name == "snapshots" else real.name


def _fields(card: Path) -> list[str]:
    """The lines are copied as they stand: no reader of YAML takes `language: no` for Norwegian."""
    if not card.is_file():
        return []
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return []
    kept: list[str] = []
    taking = False
    for line in lines[1:]:
        if line.rstrip() in ("---", "..."):
            return kept
        if not line.startswith((" ", "\t", "-", "#")):
            taking = bool(re.match(r"(license\w*|language)\s*:", line))
        if taking and line.strip():
            kept.append(line.rstrip())
    return []  # it does not end: no front matter


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what `side_files` finds, without the links.

    Args:
        source: a model folder.
        target: a folder.

    Raises:
        CheckpointError: as for `side_files`.
    """
    for file in side_files(source)[0]:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


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
    found |= {file for file in folder.iterdir() if _RIGHTS.match(file.name)}
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
