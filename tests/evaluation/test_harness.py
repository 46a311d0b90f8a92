# SPDX-License-Identifier: Apache-2.0
import sys
import types

import pytest

from lissom.evaluation import evaluate_tasks


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for lm_eval that keeps its arguments."""
    calls = {}

    class TaskManager:
        all_tasks = ("arc_easy", "mine")

        def __init__(self, include_path=None):
            calls["include_path"] = include_path

    def simple_evaluate(**arguments):
        calls.update(arguments)
        metrics = {"alias": "arc_easy", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.1}
        return {"results": {"arc_easy": {**metrics, "bleu_stderr,none": "N/A"}}}

    package, tasks = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")
    package.simple_evaluate, tasks.TaskManager = simple_evaluate, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return calls


def test_arguments_and_metrics(harness, tmp_path):
    found = evaluate_tasks(tmp_path, ["arc_easy"], limit=7, num_fewshot=2, include_path=tmp_path / "tasks")
    assert found == {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
    assert harness["model"] == "hf"
    assert harness["model_args"] == {"pretrained": str(tmp_path), "dtype": "auto", "trust_remote_code": False}
    assert harness["tasks"] == ["arc_easy"]
    assert (harness["limit"], harness["num_fewshot"], harness["device"]) == (7, 2, "cpu")
    assert harness["include_path"] == str(tmp_path / "tasks")


def test_unknown_task(harness):
    with pytest.raises(ValueError, match="lm-eval has no task arc_eazy"):
        evaluate_tasks("model", ["arc_easy", "arc_eazy"])


def test_no_task():
    with pytest.raises(ValueError, match="at least one task"):
        evaluate_tasks("model", [])


def test_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: pip install 'lissom\[eval\]'"):
        evaluate_tasks("model", ["arc_easy"])
