# SPDX-License-Identifier: Apache-2.0
"""`torchrun -m lissom prune`: processes that share a run."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file


@pytest.fixture
def together():
    """Runs the command in two processes, as torchrun does; gives code, stdout and stderr."""

    def run(*arguments, environment=None):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "-m",
                "lissom",
            ]
            + [str(argument) for argument in arguments],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def flags(tiny_model, calibration, validation):
    data = ["--data", calibration, "--samples", 6, "--seq-len", 64, "--threads", 1, "--format", "dense"]
    return ["prune", tiny_model, *data, "--eval-text", validation, "--windows", 1, "--json"]


def test_two_processes_do_what_one_does(command, together, flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    # So that rounding stays rounding: no held-out tokens (another half of them), no mask that is searched for.
    flags += ["--dtype", "float32", "--damp", 0.1, "--method", "wanda"]
    alone = command(*flags, "-o", one)
    assert alone.code == 0, alone.err
    code, out, err = together(*flags, "-o", two)
    assert code == 0, err
    report = json.loads(out)  # fails when both processes speak
    assert report["prunes"][0]["refit"] is True
    assert err.count("prune: 4 of 4") == 1
    assert {entry.name for entry in two.iterdir()} == {entry.name for entry in one.iterdir()}
    assert not (tmp_path / "two.lissom-state").exists()
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        # Sums in another order may tip a mask over where two choices are as good; the whole row then changes with it.
        alike = (found[name] != 0) == (weight != 0)
        assert alike.float().mean() > 0.998, name
        rows = alike.reshape(len(weight), -1).all(1)
        assert (found[name] - weight)[rows].norm() < 0.02 * weight.norm(), name
    errors = [[layer["relative_error"] for layer in r["prunes"][0]["layers"]] for r in (alone.json, report)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    perplexities = [r["quality"]["after"]["perplexity"] for r in (alone.json, report)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=2e-3)


DIES = """
import os, sys
from lissom.pruning import driver, state
if os.environ["RANK"] == os.environ["DYING"]:
    if os.environ["DYING"] == "0":
        save = state.PruneState.save
        def dying(self, block, *given):
            if block == 2:
                raise OSError("the disk is full")
            save(self, block, *given)
        state.PruneState.save = dying
    else:
        from lissom.pruning import sweep
        def failing(*given, **more):
            raise ValueError("bad luck")
        sweep.prune_group = failing
"""


@pytest.fixture
def dying(tmp_path):
    """Environment in which one of the processes fails."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"import os\nif 'RANK' in os.environ:\n    exec({DIES!r})\n"
    )
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return lambda rank: {"PYTHONPATH": os.pathsep.join(paths), "DYING": str(rank)}


@pytest.mark.slow
def test_resume_goes_on_from_what_the_first_process_kept(together, flags, dying, tmp_path):
    out, state = tmp_path / "out", tmp_path / "out.lissom-state"
    code, text, err = together(*flags, "-o", out, environment=dying(0))
    assert code != 0
    assert "error: the disk is full" in err
    assert json.loads(text)["error"]["message"] == "the disk is full"
    assert len(list(state.rglob("block-*.safetensors"))) == 2
    assert json.loads(next(state.rglob("prune.json")).read_text())["arguments"]["processes"] == 2
    code, text, err = together(*flags, "-o", out)
    assert code != 0
    assert err.count("holds an interrupted run: go on with --resume") == 1
    code, text, err = together(*flags, "-o", out, "--resume")
    assert code == 0, err
    uninterrupted = together(*flags, "-o", tmp_path / "whole")
    assert uninterrupted[0] == 0, uninterrupted[2]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_a_failure_of_another_process_ends_all_with_a_sentence(together, flags, dying, tmp_path):
    code, _, err = together(*flags, "-o", tmp_path / "out", environment=dying(1))
    assert code != 0
    assert "process 1: error: bad luck" in err
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("out")] == []
