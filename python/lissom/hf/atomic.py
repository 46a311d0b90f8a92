# SPDX-License-Identifier: Apache-2.0
"""Replaces a model folder so that an interruption at any moment leaves either the old one or the new one."""

from __future__ import annotations

import ctypes
import errno
import filecmp
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lissom.hf.checkpoint import CONFIG_NAME

# What an earlier save wrote and a new one replaces; everything else in the folder is the user's and stays.
_CHECKPOINT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    CONFIG_NAME,
    "generation_config.json",
)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a fresh folder beside ``target`` to write into, and puts it in the place of ``target`` at the
    end.

    When the body raises, the fresh folder is removed and ``target`` is as before. A folder that holds a
    checkpoint is swapped as a whole, files in it that belong to no checkpoint are carried over. A folder
    without a checkpoint receives the new files one by one, config.json last.

    Args:
        target: the folder to create or replace.
        overwrite: allow replacing a checkpoint, or files of the same name.

    Yields:
        The folder to write into, on the same file system as ``target``.

    Raises:
        FileExistsError: ``target`` is not a folder, or has content to be replaced and ``overwrite`` is False.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with replacing_directory(Path(root) / "model", overwrite=False) as folder:
        ...         _ = (folder / "config.json").write_text("{}")
        ...     print(os.listdir(Path(root) / "model"))
        ['config.json']
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a folder: choose another output folder")
    if _has_checkpoint(target) and not overwrite:
        raise FileExistsError(
            f"{target} already holds a model: pass overwrite=True, or choose another output folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
    try:
        fresh.chmod(0o777 & ~_umask())
        yield fresh
        for file in fresh.rglob("*"):  # safetensors writes files that only their owner may read
            if file.is_file():
                file.chmod(0o666 & ~_umask())
        _sync(fresh)
        if _has_checkpoint(target):
            _carry_over(target, fresh)
            _swap(fresh, target)
        elif target.exists() and any(target.iterdir()):
            _move_into(fresh, target, overwrite=overwrite)
        else:
            os.rename(fresh, target)
        _sync_directory(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _has_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and ((folder / CONFIG_NAME).exists() or any(folder.glob("*.safetensors")))


def _carry_over(old: Path, new: Path) -> None:
    """Links what is not part of the old checkpoint into the new folder; links share the file, so open logs go
    on.
    """
    for entry in old.iterdir():
        copy = new / entry.name
        if any(entry.match(pattern) for pattern in _CHECKPOINT_FILES) or copy.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True, copy_function=_link)
        elif entry.is_symlink():
            copy.symlink_to(os.readlink(entry))
        else:
            _link(entry, copy)


def _link(source: str | Path, copy: str | Path) -> None:
    try:
        os.link(source, copy)
    except OSError:  # a file system without hard links
        shutil.copy2(source, copy)


def _move_into(fresh: Path, target: Path, *, overwrite: bool) -> None:
    taken = [
        entry.name
        for entry in fresh.iterdir()
        if entry.name != "README.md" and _differs(entry, target / entry.name)
    ]
    if taken and not overwrite:
        raise FileExistsError(
            f"{target} already has {taken[0]}: pass overwrite=True, or choose another output folder"
        )
    # config.json last: without it the folder is not yet a model.
    for entry in sorted(fresh.iterdir(), key=lambda entry: entry.name == CONFIG_NAME):
        os.replace(entry, target / entry.name)
    _sync_directory(target)


def _differs(new: Path, old: Path) -> bool:
    """Whether there is something else in the place of a new file; the same licence, say, is no obstacle."""
    return old.exists() and not (new.is_file() and old.is_file() and filecmp.cmp(new, old, shallow=False))


def _swap(fresh: Path, target: Path) -> None:
    """Exchanges two folders in one step; where the system cannot, in two, with the old one kept under another
    name.
    """
    if _exchange(fresh, target):
        return
    aside = target.with_name(f"{fresh.name}.old")
    os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    rename = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    )
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # old kernel, or a file system without exchange
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _sync(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as stream:
                os.fsync(stream.fileno())
        _sync_directory(Path(parent))


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
