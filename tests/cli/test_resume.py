# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed or disturbed, and go on."""

import signal
import subprocess
import sys

import pytest
import yaml

from lissom.recipe import build_recipe
from lissom.run import RunError, compress, plan_recipe, run_recipe

KILLED = """
import os, signal, sys, yaml
from lissom.recipe import build_recipe
from lissom.run import run_recipe
recipe, moment = build_recipe(yaml.safe_load(sys.argv[1])), sys.argv[2]
def on_event(event):
    where = f"block {event['done']}" if event["event"] == "progress" else event.get("text", "").split()[0:1]
    if where == moment or where == [moment]:
        os.kill(os.getpid(), signal.SIGKILL)
run_recipe(recipe, on_event=on_event)
"""


@pytest.fixture
def values(tiny_model, calibration, validation, tmp_path):
    return {
        "model": str(tiny_model),
        "threads": 1,
        "data": {"source": str(calibration), "samples": 2, "seq_len": 32},
        "steps": [{"prune": {"method": "sparsegpt", "damp": 0.1}}],
        "evaluate": {
            "perplexity": str(validation),
            "windows": 1,
            "seq_len": 64,
            "speed": False,
            "kernels": False,
        },
        "output": {"dir": str(tmp_path / "out"), "report": False},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Weights of the same recipe run without a disturbance; made once."""
    kept = {}

    def weights(values):
        if not kept:
            folder = tmp_path_factory.mktemp("undisturbed") / "out"
            kept["weights"] = (
                compress(values["model"], recipe=values, output=folder).output / "model.safetensors"
            ).read_bytes()
        return kept["weights"]

    return weights


@pytest.mark.parametrize("moment", ["block 2", "saving"])
def test_after_kill_resume_gives_bit_equal_weights(values, undisturbed, tmp_path, moment):
    done = subprocess.run([sys.executable, "-c", KILLED, yaml.safe_dump(values), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    out, state = tmp_path / "out", tmp_path / "out.lissom-state"
    assert not out.exists()
    assert state.is_dir()
    recipe = build_recipe(values)
    with pytest.raises(RunError, match="--resume"):
        run_recipe(recipe)
    seen = []
    run_recipe(recipe, resume=True, on_event=lambda e: seen.append(e.get("resumed")))
    assert seen.count(True) == (2 if moment == "block 2" else 4)
    assert (out / "model.safetensors").read_bytes() == undisturbed(values)
    assert not state.exists()


def test_resume_refuses_another_recipe(values, tmp_path):
    class StopHere(Exception):
        pass

    def stop(event):
        if event.get("done") == 2:
            raise StopHere

    with pytest.raises(StopHere):
        run_recipe(build_recipe(values), on_event=stop)
    other = build_recipe({**values, "steps": [{"prune": {"method": "wanda"}}]})
    with pytest.raises(RunError, match="another recipe"):
        run_recipe(other, resume=True)
    run_recipe(other, overwrite=True)
    assert (tmp_path / "out/config.json").is_file()


def test_allocated_patterns_are_kept(values, tmp_path, monkeypatch):
    from lissom.pruning import allocate_model

    class StopHere(Exception):
        pass

    def stop(event):
        if event.get("done") == 1:
            raise StopHere

    prune = {"allocate": {"share": 0.75}, "method": "wanda", "refit": False}
    recipe = build_recipe({**values, "steps": [{"prune": prune}]})
    plan = plan_recipe(recipe)["steps"][0]
    assert len(plan["touched"]) == 28
    with pytest.raises(StopHere):
        run_recipe(recipe, on_event=stop)
    # A second choice might differ, for seconds are measured; it would also fail here.
    monkeypatch.setattr(allocate_model, "allocate_model", None)
    result = run_recipe(recipe, resume=True)
    prune = result.report["prunes"][0]
    assert {layer["pattern"] for layer in prune["layers"]} == {"2:4"}
    # Three quarters stay when half of the weights go 2:4.
    assert 0.5 <= prune["touched_parameters"] / plan["touched_parameters"] <= 0.51


def test_a_run_that_fails_before_its_first_block_leaves_nothing(values, tmp_path):
    values["data"] = {**values["data"], "seq_len": 10**7}  # longer than the text
    with pytest.raises(ValueError, match="token"):
        run_recipe(build_recipe(values))
    assert list(tmp_path.iterdir()) == []


def test_the_current_folder_is_refused(values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values["output"]["dir"] = "."
    with pytest.raises(RunError, match="is the current folder"):
        run_recipe(build_recipe(values))


def test_compress_takes_the_place_of_model_and_output(values, tmp_path):
    seen = []
    result = compress(values.pop("model"), recipe=values, output=tmp_path / "there", on_event=seen.append)
    assert result.output == tmp_path / "there"
    assert result.report["quality"]["after"]["tokens"] == 63
    assert seen[0]["event"] == "start"
    with pytest.raises(RunError, match="already holds a model"):
        compress(result.recipe.model, recipe=values, output=tmp_path / "there")
