# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import subprocess
import sys

import pytest

from lissom.recipe import build_recipe

EVERY_VERB = ["info", "inspect", "prune", "eval", "generate", "run", "report", "demo", "selftest", "convert"]


def test_help_lists_every_verb(command):
    out = command("--help").out
    assert all(verb in out for verb in [*EVERY_VERB, "bench"])


@pytest.mark.parametrize(
    "verb",
    [[v] for v in EVERY_VERB] + [["bench", name] for name in ("sparse24", "tune", "generation", "predict")],
)
def test_every_verb_speaks_json_and_plans(command, verb):
    out = command(*verb, "--help").out
    assert all(flag in out for flag in ("--json", "--dry-run", "--quiet", "--verbose"))


def test_info_as_json_and_as_table(command):
    facts = command("info", "--json").json
    assert facts["isa"] in ("portable", "avx2", "avx512", "avx512x", "amx")
    assert set(facts["settings"]) == {"LISSOM_CPU_ISA", "LISSOM_AUTOLOAD", "LISSOM_TORCH_DIR"}
    assert facts["cpu"] in " ".join(command("info").out.split())


def test_inspect_counts_what_pruning_could_touch(command, tiny_model):
    found = command("inspect", tiny_model, "--exclude", "re:.*mlp.*", "--json").json
    assert found["blocks"] == 4
    assert len(found["prune"]["touched"]) == 16
    linears = {row["kind"]: row["parameters"] for row in found["linears"]}
    assert found["prune"]["touched_parameters"] == sum(n for kind, n in linears.items() if "attn" in kind)
    # bf16: 16 bytes a quad pair become 9
    assert found["prune"]["packed_bytes"] / found["prune"]["dense_bytes"] == pytest.approx(9 / 16)


def test_dry_run_prints_the_recipe_and_writes_nothing(command, tiny_model, few, tmp_path):
    out = tmp_path / "out"
    plan = command("prune", tiny_model, "-o", out, *few, "--dry-run", "--json").json
    assert build_recipe(plan["recipe"]).to_dict() == plan["recipe"]
    usual = {"method": "alps", "refit": True, "blocksize": 128, "act_order": False}
    step = {"pattern": "2:4", **usual, "strict": True, "preserve_mask": False}
    assert plan["recipe"]["steps"] == [{"prune": step}]
    assert len(plan["steps"][0]["touched"]) == 28
    assert plan["peak_bytes"] > 3_900_000
    assert plan["estimated_seconds"] > 0
    assert f"{out}/recipe.yaml" in plan["writes"]
    assert list(tmp_path.iterdir()) == []


def test_prune_writes_model_recipe_report_and_log(command, tiny_model, few, validation, tmp_path):
    out = tmp_path / "out"
    score = ["--eval-text", validation, "--windows", 1, "--no-speed"]
    answer = command("prune", tiny_model, "-o", out, *few, *score, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    names = {entry.name for entry in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "log.jsonl"} <= names
    assert {"lissom-report.json", "lissom-report.html"} <= names
    assert json.loads((out / "lissom-report.json").read_text()) == report
    assert [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()][-1] == "done"
    assert not (tmp_path / "out.lissom-state").exists()
    assert report["size"]["output_bytes"] < 0.7 * report["size"]["source_bytes"]
    assert report["quality"]["after"]["perplexity"] > report["quality"]["before"]["perplexity"]
    assert len(report["prunes"][0]["layers"]) == 28
    assert "2 of" not in answer.out
    assert "prune: 4 of 4" in answer.err

    again = command("prune", tiny_model, "-o", out, *few, "--no-speed")
    assert again.code == 1
    assert "already holds a model" in again.err
    recipe = command("run", out / "recipe.yaml", "-o", tmp_path / "again", "--json")
    assert recipe.code == 0, recipe.err
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

    scored = command("eval", out, "--perplexity", validation, "--windows", 1, "--json").json
    assert scored["perplexity"] == pytest.approx(report["quality"]["after"]["perplexity"], rel=1e-3)
    (out / "lissom-report.html").unlink()
    assert command("report", out).code == 0
    assert (out / "lissom-report.html").is_file()
    assert command("inspect", out, "--json").json["packed"]


def test_every_setting_reaches_the_library(command, tiny_model, few, tmp_path, monkeypatch):
    from lissom import pruning

    class Reached(Exception):
        pass

    def prune_model(model, **given):
        asked.update(given)
        raise Reached("far enough")

    asked = {}
    monkeypatch.setattr(pruning, "prune_model", prune_model)
    flags = {
        "--pattern": "1:4",
        "--pattern-for": "re:.*=x.*=dense",
        "--method": "mrp",
        "--refit": "exact",
        "--variant": "SM",
        "--blend": 0.25,
        "--damp": 0.2,
        "--reconstruct": 2,
        "--reconstruct-lr": 1e-3,
    }
    arguments = [part for pair in flags.items() for part in pair]
    answer = command("prune", tiny_model, "-o", tmp_path / "out", *few, *arguments, "--permute")
    assert "far enough" in answer.err
    assert asked["pattern"] == {"re:.*=x.*": "dense", "re:.*": "1:4"}
    assert asked["options"] == pruning.Options(refit="exact", variant="SM")
    assert asked["reconstruct"] == pruning.Reconstruction(passes=2, learning_rate=1e-3)
    assert (asked["method"], asked["blend"], asked["damp"]) == ("mrp", 0.25, 0.2)
    assert asked["permute"] is True
    asked.clear()
    command("prune", tiny_model, "-o", tmp_path / "out", *few, "--refit", "off")
    assert asked["options"] == pruning.Options(refit=False)
    assert asked["reconstruct"] is None
    assert "permute" not in asked


def test_patterns_for_some_layers_and_trained_blocks_are_told(command, tiny_model, few, tmp_path):
    out = tmp_path / "out"
    some = [
        "--pattern-for",
        "re:.*self_attn.*=dense",
        "--pattern-for",
        "re:.*down_proj=1:4",
        "--reconstruct",
        1,
    ]
    answer = command("prune", tiny_model, "-o", out, *few, *some, "--no-speed")
    assert answer.code == 0, answer.err
    told = " ".join(answer.out.split())
    assert "2:4 in 8 and 1:4 in 4 of 12 layers by ALPS with refit" in told
    assert "4 blocks trained: relative error" in told
    found = command("inspect", out, "--json").json
    assert (
        found["made_by"]["pattern"]
        == '{"re:.*self_attn.*": "dense", "re:.*down_proj": "1:4", "re:.*": "2:4"}'
    )
    page = (out / "lissom-report.html").read_text(encoding="utf-8")
    assert "All 4 blocks" in page
    assert "4 blocks trained" in page


def test_dense_format_says_that_nothing_is_gained(command, tiny_model, tmp_path):
    arguments = ["--method", "magnitude", "--pattern", "50%", "--format", "dense", "--threads", 1]
    answer = command("prune", tiny_model, "-o", tmp_path / "out", *arguments)
    assert answer.code == 0, answer.err
    assert "You gain nothing" in answer.out


def test_prune_takes_the_licence_along(command, tiny_model, tmp_path):
    source, out = tmp_path / "tiny", tmp_path / "out"
    shutil.copytree(tiny_model, source)
    (source / "NOTICE").write_text("made here")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n")
    answer = command("prune", source, "-o", out, "--method", "magnitude", "--threads", 1)
    assert answer.code == 0, answer.err
    assert (out / "NOTICE").read_text() == "made here"
    header = (out / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert header.endswith("license: apache-2.0\nlanguage: en\nbase_model: tiny\n")


def test_generate_prints_text_as_json_or_plain(command, tiny_model):
    found = command("generate", tiny_model, "In the beginning", "--max-new-tokens", 3, "--json").json
    assert found["new_tokens"] <= 3
    plain = command("generate", tiny_model, "In the beginning", "--max-new-tokens", 3)
    assert plain.out.strip() == found["text"].strip()


def test_recipe_of_looking_steps_needs_no_output(command, tiny_model, validation, tmp_path):
    file = tmp_path / "look.yaml"
    file.write_text(
        f"model: {tiny_model}\nsteps:\n- inspect: {{}}\n"
        f"- eval: {{perplexity: {validation}, windows: 1, seq_len: 64}}\n"
    )
    results = command("run", file, "--json").json
    assert [result["verb"] for result in results] == ["inspect", "eval"]
    assert "perplexity" in command("run", file).out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prune"], 2, "Missing argument"),
        (["frobnicate"], 2, "No such command"),
        (["prune", "m", "-o", "x", "--samples", "0"], 2, "--samples"),
        (["prune", "m", "-o", "x", "--method", "magnitud"], 2, "method must be one of magnitude"),
        (["prune", "m", "-o", "x", "--pattern", "4:2", "--method", "magnitude"], 2, "keeps n of m weights"),
        (["prune", "m", "-o", "x", "--pattern-for", "2:4", "--method", "magnitude"], 2, "is NAME=PATTERN"),
        (["prune", "m", "-o", "x", "--pattern-for", "re:(=2:4", "--method", "magnitude"], 2, "re:("),
        (["prune", "m", "-o", "x", "--pattern-for", "q=50%", "--method", "magnitude"], 2, "got 'q': '50%'"),
        (["prune", "m", "-o", "x", "--variant", "XY", "--method", "magnitude"], 2, "variant must be SS, SM"),
        (["prune", "m", "-o", "x", "--refit", "perhaps"], 2, "--refit"),
        (["prune", "m", "-o", "x", "--blend", "2", "--method", "magnitude"], 2, "blend"),
        (
            ["prune", "m", "-o", "x", "--reconstruct", "2", "--reconstruct-lr", "7"],
            2,
            "learning_rate must lie",
        ),
        (["prune", "m", "-o", "x"], 2, "needs calibration text"),
        (["prune", "m", "-o", "x", "--data", "d", "--dtype", "int3"], 2, "dtype"),
        (["eval", "m"], 2, "nothing to evaluate"),
        (["inspect", "no/such/model"], 1, "no model folder 'no/such/model'"),
        (["eval", "no/such/model", "--perplexity", "t.txt"], 1, "there is no text file t.txt"),
        (["prune", "MODEL", "-o", "x", "--data", "no.txt"], 1, "there is no calibration text no.txt"),
        (["run", "no-such-recipe.yaml"], 1, "no-such-recipe.yaml"),
        (["report", "no-such-folder"], 1, "there is no report"),
        (["bench", "generation"], 2, "needs a model"),
    ],
)
def test_errors_are_one_sentence_with_a_code(
    command, tiny_model, tmp_path, monkeypatch, arguments, code, words
):
    monkeypatch.chdir(tmp_path)
    answer = command(*[tiny_model if argument == "MODEL" else argument for argument in arguments])
    assert answer.code == code
    assert words in " ".join(answer.err.split())
    assert "Traceback" not in answer.err
    assert answer.out == ""
    assert list(tmp_path.iterdir()) == []


def test_errors_are_json_too_and_tracebacks_are_for_the_verbose(command):
    quiet, loud = (command("inspect", "no/such/model", "--json", *more) for more in ([], ["-v"]))
    assert quiet.json["error"]["type"] == "FileNotFoundError"
    assert "Traceback" in loud.err
    assert loud.json == quiet.json


def test_the_models_own_folder_is_never_written_to(command, tiny_model):
    before = sorted(entry.name for entry in tiny_model.iterdir())
    answer = command("prune", tiny_model, "-o", tiny_model, "--method", "magnitude", "--overwrite")
    assert answer.code == 1
    assert "model's own folder" in answer.err
    assert sorted(entry.name for entry in tiny_model.iterdir()) == before


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "lissom", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0.1.0\n"


def test_bench_passes_its_flags_on_and_prints_the_rows(command, monkeypatch):
    from lissom.benchmark import sparse24

    row = {
        "dtype": "float32", "M": 4, "N": 64, "K": 64, "threads": 2, "ours_us": 1.0, "peers": {"a": 3.0, "b": 2.0},
        "ratio_best": 2.0, "gflops": 9.0, "gbps": 8.0, "roofline_share": 0.5,
    }  # fmt: skip
    asked = {}
    monkeypatch.setattr(sparse24, "run", lambda **given: asked.update(given) or [row])
    flags = ["--quick", "--dtype", "float32", "--rows", 4, "--threads", 2]
    assert command("bench", "sparse24", *flags, "--json").json == [row]
    assert asked == {"quick": True, "dtypes": ["float32"], "tokens": [4], "threads": 2}
    assert "2.00×" in command("bench", "sparse24", *flags).out
    monkeypatch.setattr(sparse24, "run_capped", lambda isa, **given: [{**row, "isa": isa}])
    assert command("bench", "sparse24", "--isa", "avx2", "--json").json[0]["isa"] == "avx2"
    found = {
        "rows": [{"dtype": "float32", "M": 8, "permuted_us": 1.0, "lanes_us": 2.0}],
        "from": {"float32": 32},
    }
    monkeypatch.setattr(sparse24, "tune", lambda threads: found)
    assert command("bench", "tune", "--json").json == found
    assert "float32: lanes from M = 32" in command("bench", "tune").out
