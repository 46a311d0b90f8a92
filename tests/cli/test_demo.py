# SPDX-License-Identifier: Apache-2.0
import pytest

from lissom import assets


def test_without_the_real_model_the_plan_is_for_the_bundled_one(command, tmp_path):
    plan = command("demo", "--cache", tmp_path, "-o", tmp_path / "out", "--dry-run", "--json").json
    assert plan["recipe"]["model"] == str(assets.TINY_LLAMA)
    assert len(plan["steps"][0]["touched"]) == 28
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_demo_goes_on(command, tmp_path, monkeypatch):
    from lissom.cli import demo

    seen = []

    class Stop(Exception):
        pass

    def run_recipe(recipe, *, on_event, **given):
        def watch(event):
            on_event(event)
            if event["event"] == "progress":
                seen.append(event["resumed"])
                if len(seen) == 2:
                    raise Stop

        return run(recipe, on_event=watch, **given)

    run = demo.run_recipe
    monkeypatch.setattr(demo, "run_recipe", run_recipe)
    monkeypatch.setattr(demo, "_reload", lambda folder, prompt: {"text": prompt, "packed_linears": 28})
    quick = {"speed": False, "kernels": False, "windows": 1, "seq_len": 64}
    whole = demo._recipe
    monkeypatch.setattr(
        demo,
        "_recipe",
        lambda *given: {
            **whole(*given),
            "data": {"source": str(assets.CALIBRATION_TEXT), "samples": 2, "seq_len": 32},
            "evaluate": {"perplexity": str(assets.VALIDATION_TEXT), **quick},
        },
    )
    arguments = ["demo", "--tiny", "-o", tmp_path / "out", "--threads", 1, "--json"]
    assert command(*arguments).code == 1
    answer = command(*arguments)
    assert answer.code == 0, answer.err
    assert seen == [False, False, True, True, False, False]
    assert answer.json["reload"]["packed_linears"] == 28


@pytest.mark.slow
def test_demo_prunes_reloads_times_and_reports(command, tmp_path):
    answer = command("demo", "--tiny", "-o", tmp_path / "out", "--threads", 1, "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert "tiny model" in found["note"]
    assert found["reload"]["packed_linears"] == 28
    assert found["reload"]["text"].startswith("And it came to pass")
    assert {row["name"] for row in found["report"]["speed"]["variants"]} == {"dense", "onednn", "packed"}
    assert found["report"]["kernels"]["rows"]
    page = (tmp_path / "out/lissom-report.html").read_text(encoding="utf-8")
    assert "Roofline of the kernels" in page
    assert command("demo", "--tiny", "-o", tmp_path / "out", "--threads", 1).code == 0
