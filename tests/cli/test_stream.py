# SPDX-License-Identifier: Apache-2.0
"""`lissom prune --stream`: from folder to folder, one block of the model in memory at a time."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lissom.hf import check_folder
from lissom.nn import Sparse24Linear
from lissom.recipe import RecipeError, build_recipe
from lissom.reporting import facts
from lissom.run import plan_recipe, run_recipe


@pytest.fixture
def streamed(command, tiny_model, few):
    def call(output, *more):
        form = [] if "--format" in more else ["--format", "dense"]
        return command("prune", tiny_model, "-o", output, *few, *form, *more)

    return call


def _tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_same_model_as_one_in_memory(streamed, tmp_path, monkeypatch):
    import lissom.hf

    assert streamed(tmp_path / "whole").code == 0
    monkeypatch.setattr(lissom.hf, "load_model", lambda *_, **__: pytest.fail("the whole model was loaded"))
    assert streamed(tmp_path / "out", "--stream").code == 0
    whole, out = _tensors(tmp_path / "whole"), _tensors(tmp_path / "out")
    assert whole.keys() == out.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in whole.items())
    reports = [
        json.loads((tmp_path / name / "lissom-report.json").read_text(encoding="utf-8"))
        for name in ("whole", "out")
    ]
    for key in ("model", "quality"):
        assert reports[0][key] == reports[1][key]
    cards = [(tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("whole", "out")]
    assert cards[0] == cards[1]
    assert "| 2:4 linears | 28 |" in cards[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_packed_as_the_whole_model_is(streamed, tmp_path):
    packed = ("--format", "packed", "--no-speed")
    assert streamed(tmp_path / "whole", *packed).code == 0
    answer = streamed(tmp_path / "out", "--stream", "--format", "packed")
    assert answer.code == 0
    assert "lissom bench generation" in answer.err, "the model was never in memory: nothing can be timed"
    whole, out = _tensors(tmp_path / "whole"), _tensors(tmp_path / "out")
    assert sum(name.endswith(".weight_meta") for name in out) == 28
    assert whole.keys() == out.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in whole.items())
    configs, sizes, cards = [], [], []
    for folder in (tmp_path / "whole", tmp_path / "out"):
        configs.append(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        sizes.append(json.loads((folder / "lissom-report.json").read_text(encoding="utf-8"))["size"])
        cards.append((folder / "README.md").read_text(encoding="utf-8"))
    for key in ("lissom", "quantization_config"):
        assert configs[0][key] == configs[1][key]
    assert cards[0] == cards[1]
    assert sizes[0]["linears_output_bytes"] == sizes[1]["linears_output_bytes"]
    assert sizes[0]["linears_source_bytes"] == sizes[1]["linears_source_bytes"]
    check_folder(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, Sparse24Linear) for module in model.modules()) == 28


def test_dense_now_and_packed_later_is_the_same(streamed, command, tmp_path):
    assert streamed(tmp_path / "dense", "--stream").code == 0
    assert streamed(tmp_path / "packed", "--stream", "--format", "packed").code == 0
    assert command("convert", tmp_path / "dense", tmp_path / "converted").code == 0
    packed, converted = _tensors(tmp_path / "packed"), _tensors(tmp_path / "converted")
    assert packed.keys() == converted.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in packed.items())
    configs = [
        json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        for name in ("packed", "converted")
    ]
    for config in configs:
        config["quantization_config"]["modules"].sort()
    assert configs[0] == configs[1]


def test_a_taken_folder_is_left_alone_without_overwrite(streamed, tmp_path):
    assert streamed(tmp_path / "out", "--stream", "--method", "wanda").code == 0
    before = _tensors(tmp_path / "out")
    answer = streamed(tmp_path / "out", "--stream")
    assert answer.code == 1
    assert "already holds a model" in answer.err
    assert all(torch.equal(tensor, before[name]) for name, tensor in _tensors(tmp_path / "out").items())
    assert streamed(tmp_path / "out", "--stream", "--overwrite").code == 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in _tensors(tmp_path / "out").items())


def test_an_interrupted_run_goes_on(streamed, few, tmp_path, tiny_model, calibration):
    values = {
        "model": str(tiny_model),
        "threads": 1,
        "data": {"source": str(calibration), "samples": 2, "seq_len": 32},
        "steps": [{"prune": {}}],
        "output": {"dir": str(tmp_path / "out"), "format": "dense", "stream": True, "report": False},
    }

    def stop(event):
        if event.get("done") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="fewer than 2 per input"):
        run_recipe(build_recipe(values), on_event=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.lissom-state"]
    seen = []
    run_recipe(build_recipe(values), resume=True, on_event=seen.append)
    assert [event["resumed"] for event in seen if event["event"] == "progress"] == [True, True, False, False]
    assert streamed(tmp_path / "whole").code == 0
    whole = _tensors(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in _tensors(tmp_path / "out").items())


def test_magnitude_streams_without_data(command, tiny_model, tmp_path):
    flags = ["--method", "magnitude", "--refit", "off", "--format", "dense", "--stream"]
    assert command("prune", tiny_model, "-o", tmp_path / "out", *flags).code == 0
    assert "| 2:4 linears | 28 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_plan_counts_one_block(streamed, tmp_path):
    plans = [
        streamed(tmp_path / "out", "--dry-run", "--json", *more).json["steps"][0]
        for more in ([], ["--stream"])
    ]
    assert plans[0]["touched"] == plans[1]["touched"]
    assert plans[0]["peak_bytes"] - plans[1]["peak_bytes"] > 2e6  # the bundled model has 4 MB
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": [{"prune": {"permute": True}}]}, "permute orders the channels of the whole model"),
        ({"steps": [{"prune": {"allocate": {"share": 0.5}}}]}, "allocate measures the whole model"),
        ({"steps": [{"prune": {}}, {"prune": {}}]}, "one prune step and no other"),
        ({"steps": [{"inspect": {}}]}, "one prune step and no other"),
        ({"evaluate": {"perplexity": "t.txt"}}, "run 'lissom eval' on the result"),
        ({"evaluate": {"tasks": ["arc_easy"]}}, "run 'lissom eval' on the result"),
    ],
)
def test_what_needs_the_whole_model_is_refused(change, words):
    output = {"dir": "out", "format": "dense", "stream": True, **change.pop("output", {})}
    values = {"model": "m", "data": {"source": "c.txt"}, "steps": [{"prune": {}}], "output": output, **change}
    with pytest.raises(RecipeError, match=words):
        build_recipe(values)


def test_a_streamed_plan_knows_its_recipe(tiny_model, tmp_path):
    values = {
        "model": str(tiny_model),
        "steps": [{"prune": {"method": "magnitude", "refit": False}}],
        "output": {"dir": str(tmp_path / "out"), "format": "dense", "stream": True},
    }
    assert plan_recipe(build_recipe(values))["recipe"]["output"]["stream"] is True


def test_a_model_larger_than_memory_is_not_loaded(streamed, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "memory_bytes", lambda: 1_000_000)
    plan = streamed(tmp_path / "out", "--dry-run")
    assert "more than the 1.00 MB of memory here: --stream keeps one block" in " ".join(plan.out.split())
    answer = streamed(tmp_path / "out")
    assert answer.code == 2
    assert "this machine has 0.0 GB of memory: 'lissom prune --stream'" in " ".join(answer.err.split())
    assert list(tmp_path.iterdir()) == []
    assert streamed(tmp_path / "out", "--stream", "--method", "wanda").code == 0
