# SPDX-License-Identifier: Apache-2.0
"""Interrupted saves."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lissom.hf import atomic
from lissom.hf.atomic import replacing_directory
from lissom.hf.checkpoint import check_folder

REPLACE = """
import sys, torch
from safetensors.torch import save_file
from pathlib import Path
from lissom.hf.atomic import replacing_directory
print("ready", flush=True)
for turn in range(10**6):
    with replacing_directory(Path(sys.argv[1]), overwrite=True) as folder:
        for shard in range(3):
            save_file({"weight": torch.full((100_000,), turn)}, folder / f"model-{shard}.safetensors")
        (folder / "config.json").write_text(str(turn))
"""
SAVE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from lissom.hf.save import save
sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
print("ready", flush=True)
for turn in range(10**6):
    for parameter in model.parameters():
        parameter.data.fill_(turn)
        parameter.data.view(-1, 4)[:, 1:3] = 0
    save(model, sys.argv[1], overwrite=True, max_shard_size="20KB")
"""


def write_model(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "deep" / "model"


@pytest.fixture
def old_model(target):
    with replacing_directory(target, overwrite=False) as folder:
        write_model(folder, "old")
    return target


def test_creates(old_model):
    assert contents(old_model) == {"config.json": "old", "model.safetensors": "old"}
    assert old_model.stat().st_mode & 0o777 == 0o777 & ~atomic._umask()


def test_replaces_whole_checkpoint_and_keeps_other_files(old_model):
    (old_model / "model-00002-of-00002.safetensors").write_text("stale shard")
    (old_model / "notes").mkdir()
    (old_model / "notes" / "mine.txt").write_text("mine")
    (old_model / "link").symlink_to("notes")
    with open(old_model / "log.jsonl", "a") as log, replacing_directory(old_model, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        log.write("still open")
    assert (old_model / "config.json").read_text() == "new"
    assert (old_model / "notes" / "mine.txt").read_text() == "mine"
    assert (old_model / "log.jsonl").read_text() == "still open"
    assert os.readlink(old_model / "link") == "notes"
    assert not list(old_model.glob("*.safetensors"))
    assert [entry.name for entry in old_model.parent.iterdir()] == ["model"]


def test_carries_files_over_without_hard_links(old_model, monkeypatch):
    def refuse(source, copy):
        raise OSError(errno.EPERM, "no hard links here")

    (old_model / "notes.txt").write_text("mine")
    monkeypatch.setattr(os, "link", refuse)
    with replacing_directory(old_model, overwrite=True) as folder:
        write_model(folder, "new")
    assert contents(old_model) == {"config.json": "new", "model.safetensors": "new", "notes.txt": "mine"}


def save_half(target: Path) -> None:
    with replacing_directory(target, overwrite=True) as folder:
        (folder / "config.json").write_text("half")
        raise RuntimeError("disk full")


def test_failure_in_the_body_changes_nothing(old_model):
    with pytest.raises(RuntimeError, match="disk full"):
        save_half(old_model)
    assert contents(old_model) == {"config.json": "old", "model.safetensors": "old"}
    assert [entry.name for entry in old_model.parent.iterdir()] == ["model"]


def test_folder_without_a_model_receives_the_files(target):
    target.mkdir(parents=True)
    (target / "recipe.yaml").write_text("steps: []")
    with replacing_directory(target, overwrite=False) as folder:
        write_model(folder, "new")
    assert contents(target) == {"config.json": "new", "model.safetensors": "new", "recipe.yaml": "steps: []"}


def test_refuses_to_overwrite(old_model, tmp_path):
    with (
        pytest.raises(FileExistsError, match="already holds a model"),
        replacing_directory(old_model, overwrite=False),
    ):
        pytest.fail("must refuse before the body runs")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(FileExistsError, match="is not a folder"),
        replacing_directory(tmp_path / "file", overwrite=True),
    ):
        pytest.fail("must refuse before the body runs")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.json").write_text("mine")
    with (
        pytest.raises(FileExistsError, match=r"already has vocab\.json"),
        replacing_directory(tmp_path / "other", overwrite=False) as folder,
    ):
        (folder / "vocab.json").write_text("new")
    assert contents(tmp_path / "other") == {"vocab.json": "mine"}


def test_follows_a_link_to_the_folder(old_model, tmp_path):
    (tmp_path / "link").symlink_to(old_model)
    with replacing_directory(tmp_path / "link", overwrite=True) as folder:
        write_model(folder, "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(old_model) == {"config.json": "new", "model.safetensors": "new"}


def test_without_exchange_the_old_folder_is_put_back_on_failure(old_model, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    with replacing_directory(old_model, overwrite=True) as folder:
        write_model(folder, "new")
    assert contents(old_model)["config.json"] == "new"

    rename = os.rename

    def fail_on_the_new(source, goal):
        if Path(goal) == old_model and ".old" not in str(source):
            raise OSError("no")
        rename(source, goal)

    monkeypatch.setattr(os, "rename", fail_on_the_new)
    with pytest.raises(OSError, match="no"), replacing_directory(old_model, overwrite=True) as folder:
        write_model(folder, "newer")
    assert contents(old_model)["config.json"] == "new"
    assert [entry.name for entry in old_model.parent.iterdir()] == ["model"]


def kill_while_writing(code: str, target: Path, chance: random.Random) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.4))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def turns_in(target: Path) -> set[int]:
    tensors = [tensor for file in target.glob("*.safetensors") for tensor in load_file(file).items()]
    assert tensors
    return {
        int(value)
        for name, tensor in tensors
        if not name.endswith("meta")
        for value in tensor.unique()
        if value
    }


@pytest.mark.parametrize(
    ("code", "kills"), [(REPLACE, 5), pytest.param(SAVE, 5, marks=pytest.mark.slow)], ids=["replace", "save"]
)
def test_kill_at_any_moment_leaves_a_complete_model(code, kills, tmp_path):
    target, chance = tmp_path / "model", random.Random(0)
    seen = set()
    for _ in range(kills):
        kill_while_writing(code, target, chance)
        turns = turns_in(target)
        assert len(turns) <= 1, f"the folder mixes several saves: {turns}"
        if code == SAVE:
            check_folder(target)
        seen |= turns
    assert max(seen) > 1, "no save was overwritten before the kill"
