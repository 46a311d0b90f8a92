# SPDX-License-Identifier: Apache-2.0
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import lissom
from lissom.models.tiny import build_tiny
from lissom.pruning import prune_model

IDS = torch.randint(3, 97, (10, 24), generator=torch.Generator().manual_seed(0))
ARGUMENTS = {"pattern": "2:4", "method": "sparsegpt", "data": IDS}


def _model(**config):
    return build_tiny("llama", dtype=torch.bfloat16, num_hidden_layers=6, **config)


@pytest.fixture(scope="module")
def expected():
    model = _model()
    prune_model(model, **ARGUMENTS)
    return model.state_dict()


def _assert_same_bits(model, expected):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


class _Interrupted(Exception):
    pass


def _interrupt_after(blocks):
    def on_progress(progress):
        if progress.block == blocks:
            raise _Interrupted

    return on_progress


@pytest.mark.parametrize("blocks", [1, 4, 6])
def test_resumed_weights_are_bit_equal(tmp_path, expected, blocks):
    with pytest.raises(_Interrupted):
        prune_model(_model(), state_dir=tmp_path, on_progress=_interrupt_after(blocks), **ARGUMENTS)
    model, seen = _model(), []
    report = prune_model(model, state_dir=tmp_path, resume=True, on_progress=seen.append, **ARGUMENTS)
    _assert_same_bits(model, expected)
    assert [progress.resumed for progress in seen] == [True] * blocks + [False] * (6 - blocks)
    assert len(report.layers) == 42
    assert all(layer.sparsity == 0.5 and layer.relative_error > 0 for layer in report.layers)


def test_resume_without_a_state_begins_one(tmp_path, expected):
    model = _model()
    prune_model(model, state_dir=tmp_path / "new", resume=True, **ARGUMENTS)
    _assert_same_bits(model, expected)
    assert len(list((tmp_path / "new").glob("block-*.safetensors"))) == 6


def test_state_of_an_earlier_run_is_not_overwritten(tmp_path):
    prune_model(_model(), state_dir=tmp_path, **ARGUMENTS)
    with pytest.raises(FileExistsError, match="go on with resume=True"):
        prune_model(_model(), state_dir=tmp_path, **ARGUMENTS)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"pattern": "1:4"}, "the arguments changed .pattern was '2:4', is '1:4'"),
        ({"damp": 0.02}, "damp was None, is 0.02"),
        ({"exclude": ["re:.*q_proj"]}, "the arguments changed .layers was"),
        ({"data": IDS.flip(0)}, "the data changed .digest was"),
        ({"model": "other weights"}, "the model changed .digest was"),
    ],
)
def test_state_of_another_run_is_refused(tmp_path, change, sentence):
    with pytest.raises(_Interrupted):
        prune_model(_model(), state_dir=tmp_path, on_progress=_interrupt_after(1), **ARGUMENTS)
    change = dict(change)
    model = _model(seed=1) if change.pop("model", None) else _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        prune_model(model, state_dir=tmp_path, resume=True, **{**ARGUMENTS, **change})
    _assert_same_bits(model, before)


@pytest.mark.parametrize(
    "resume, kind, sentence",
    [
        (False, FileExistsError, "holds the state of an earlier run"),
        (True, ValueError, "block-00000.safetensors is there, but not prune.json.*remove the folder"),
    ],
)
def test_blocks_without_a_head_are_not_trusted(tmp_path, resume, kind, sentence):
    prune_model(_model(), state_dir=tmp_path, **ARGUMENTS)
    (tmp_path / "prune.json").unlink()
    with pytest.raises(kind, match=sentence):
        prune_model(_model(), state_dir=tmp_path, resume=resume, **{**ARGUMENTS, "pattern": "75%"})


def test_state_of_another_version_is_refused(tmp_path, monkeypatch):
    prune_model(_model(), state_dir=tmp_path, **ARGUMENTS)
    version = lissom.__version__
    monkeypatch.setattr(lissom, "__version__", "99.0")
    sentence = f"the version of lissom changed .was {re.escape(version)}, is 99.0"
    with pytest.raises(ValueError, match=sentence):
        prune_model(_model(), state_dir=tmp_path, resume=True, **ARGUMENTS)


def test_a_block_of_another_run_is_refused(tmp_path):
    for name, pattern in (("one", "2:4"), ("other", "1:4")):
        prune_model(_model(), state_dir=tmp_path / name, **{**ARGUMENTS, "pattern": pattern})
    shutil.copy(tmp_path / "other" / "block-00002.safetensors", tmp_path / "one")
    with pytest.raises(
        ValueError, match=r"block-00002.safetensors is of another run than .*prune.json: remove"
    ):
        prune_model(_model(), state_dir=tmp_path / "one", resume=True, **ARGUMENTS)


@pytest.mark.parametrize("size", [0, 5, 2000])
def test_a_truncated_block_is_named_and_can_be_removed(tmp_path, expected, size):
    prune_model(_model(), state_dir=tmp_path, **ARGUMENTS)
    block = tmp_path / "block-00003.safetensors"
    os.truncate(block, size)
    with pytest.raises(ValueError, match=r"block-00003.safetensors is damaged .*: remove it"):
        prune_model(_model(), state_dir=tmp_path, resume=True, **ARGUMENTS)
    block.unlink()
    model, seen = _model(), []
    prune_model(model, state_dir=tmp_path, resume=True, on_progress=seen.append, **ARGUMENTS)
    _assert_same_bits(model, expected)
    assert [progress.resumed for progress in seen].index(False) == 3


def test_a_damaged_head_is_named(tmp_path):
    prune_model(_model(), state_dir=tmp_path, **ARGUMENTS)
    (tmp_path / "prune.json").write_text("{")
    with pytest.raises(ValueError, match=r"prune.json is damaged"):
        prune_model(_model(), state_dir=tmp_path, resume=True, **ARGUMENTS)


def test_other_number_of_threads_is_told(tmp_path):
    with pytest.raises(_Interrupted):
        prune_model(_model(), state_dir=tmp_path, on_progress=_interrupt_after(1), **ARGUMENTS)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"with {threads + 1} threads what was begun with {threads}"):
            prune_model(_model(), state_dir=tmp_path, resume=True, **ARGUMENTS)
    finally:
        torch.set_num_threads(threads)


CHILD = """
import sys, time
import torch
from lissom.models.tiny import build_tiny
from lissom.pruning import prune_model

def on_progress(progress):
    print(progress.block, flush=True)
    time.sleep(0.02)

torch.set_num_threads(int(sys.argv[2]))
ids = torch.randint(3, 97, (10, 24), generator=torch.Generator().manual_seed(0))
model = build_tiny("llama", dtype=torch.bfloat16, num_hidden_layers=6)
prune_model(model, pattern="2:4", method="sparsegpt", data=ids, state_dir=sys.argv[1],
on_progress=on_progress)
"""


def test_killed_run_goes_on_to_the_same_bits(tmp_path, expected):
    draw = random.Random()
    block, delay = draw.randint(1, 4), draw.uniform(0, 0.04)
    print(f"killed after block {block} and {delay:.4f} s")  # shown by pytest when the test fails
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path, str(torch.get_num_threads())],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in child.stdout:
        if int(line) == block:
            time.sleep(delay)
            os.kill(child.pid, signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    finished = len(list(tmp_path.glob("block-*.safetensors")))
    assert block <= finished <= 6
    model = _model()
    prune_model(model, state_dir=tmp_path, resume=True, **ARGUMENTS)
    _assert_same_bits(model, expected)
