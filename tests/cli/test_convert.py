# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lissom.hf import load_model


@pytest.fixture
def old(tiny_model, tmp_path):
    """The bundled model in `sparse-24-bitmask`, its linears cut by magnitude, and the dense one that it stands for."""
    folder, dense = tmp_path / "old", tmp_path / "dense"
    state = load_file(tiny_model / "model.safetensors")
    stored = {}
    for name, weight in state.items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        kept = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool)
        kept.scatter_(1, weight.abs().view(-1, 4).topk(2, 1).indices, True)
        kept = kept.view_as(weight)
        state[name] = weight * kept
        bits = (kept.view(len(weight), -1, 8) * 2 ** torch.arange(8)).sum(-1).byte()
        parts = {"shape": torch.tensor(weight.shape)[:, None], "bitmask": bits}
        parts["compressed"] = weight[kept].view(len(weight), -1)
        stored |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
    config = json.loads((tiny_model / "config.json").read_text())
    sparsity = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    entry = {"quant_method": "compressed-tensors", "version": "0.9.4", "sparsity_config": sparsity}
    for place, tensors, more in ((folder, stored, {"quantization_config": entry}), (dense, state, {})):
        place.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
            (place / name).write_bytes((tiny_model / name).read_bytes())
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config | more))
    return folder


def test_converts_and_the_model_goes_on_talking(command, old, validation, tmp_path):
    answer = command("convert", old, tmp_path / "new")
    assert answer.code == 0, answer.err
    told = " ".join(answer.out.split())
    assert "mlp.up_proj sparse-24-bitmask" in told
    assert "2:4 packed BF16 4" in told
    assert "copied bit for bit:" in told
    assert f"model {tmp_path / 'new'}" in told
    for verb in (
        ["inspect"],
        ["generate", "In the beginning", "--max-new-tokens", "8"],
        ["eval", "--perplexity", validation, "--windows", 1, "--seq-len", 64],
    ):
        new, dense = (command(verb[0], tmp_path / place, *verb[1:], "--json") for place in ("new", "dense"))
        assert new.code == dense.code == 0, new.err
        if verb[0] == "inspect":
            assert new.json["packed"]
            assert new.json["made_by"]["method"] == "converted from sparse-24-bitmask"
        elif verb[0] == "generate":
            assert (
                new.json["new_tokens"] == dense.json["new_tokens"]
            )  # tests/hf/foreign compares them one by one
        else:
            assert new.json["perplexity"] == pytest.approx(dense.json["perplexity"], rel=1e-2)


def test_json_is_the_report(command, old, tmp_path):
    report = command("convert", old, tmp_path / "new", "--json", "--threads", 1).json
    assert len(report["layers"]) == 28
    assert {layer["format"] for layer in report["layers"]} == {"sparse-24-bitmask"}
    assert report["output_bytes"] < 0.75 * sum(
        tensor.nbytes for tensor in load_file(tmp_path / "dense" / "model.safetensors").values()
    )
    assert "tokenizer.json" in report["files"]
    assert report["seconds"] > 0
    load_model(tmp_path / "new")


def test_dry_run_writes_nothing(command, old, tmp_path):
    before = sorted(tmp_path.iterdir())
    plan = command("convert", old, tmp_path / "new", "--dry-run", "--json").json
    assert plan["target"] is None
    assert f"{tmp_path / 'new'}/config.json" in plan["writes"]
    assert "would need about" in command("convert", old, tmp_path / "new", "--dry-run").out
    assert sorted(tmp_path.iterdir()) == before


def test_overwrite_is_asked_for(command, old, tmp_path):
    assert command("convert", old, tmp_path / "new", "-q").code == 0
    again = command("convert", old, tmp_path / "new")
    assert again.code == 1
    assert "already holds a model" in again.err
    assert "--overwrite" in again.err
    assert command("convert", old, tmp_path / "new", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["OLD"], 2, "Missing argument"),
        (
            ["OLD", "new", "--dtype", "int3"],
            2,
            "--dtype must be one of auto, float16, bfloat16, float32, got 'int3'",
        ),
        (["OLD", "new", "--scales", "odd"], 2, "--scales must be one of auto, kernel, plain, got 'odd'"),
        (["OLD", "OLD"], 1, "is the source itself"),
        (["no/such", "new"], 1, "there is no such folder; lissom convert reads local folders"),
        (["TINY", "new"], 1, "nothing to convert"),
    ],
)
def test_errors_are_one_sentence_with_a_code(
    command, old, tiny_model, tmp_path, monkeypatch, arguments, code, words
):
    monkeypatch.chdir(tmp_path)
    places = {"OLD": old, "TINY": tiny_model}
    before = sorted(tmp_path.iterdir())
    answer = command("convert", *[places.get(argument, argument) for argument in arguments])
    assert answer.code == code
    assert words in " ".join(answer.err.split())
    assert "Traceback" not in answer.err
    assert sorted(tmp_path.iterdir()) == before


def test_an_interruption_is_told_and_leaves_nothing(command, old, tmp_path, monkeypatch):
    from lissom.hf import convert

    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.ShardWriter, "copy", interrupt)
    answer = command("convert", old, tmp_path / "new")
    assert answer.code == 1
    assert "interrupted;" in answer.err
    assert "--resume" not in answer.err
    assert not (tmp_path / "new").exists()
