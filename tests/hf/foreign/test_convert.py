# SPDX-License-Identifier: Apache-2.0
"""Whole folders: what was stored in a retired format loads, runs and says the same as the dense model."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lissom.hf import CheckpointError, check_folder, convert_folder, load_model, plan_conversion
from lissom.hf import convert as conversion
from lissom.models import shards
from lissom.nn import Sparse24Linear

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin_24", "sym": True}
CASES = {
    "sparse-24-bitmask": {"form": "sparse-24-bitmask"},
    "sparse-24-bitmask bf16": {"form": "sparse-24-bitmask", "dtype": torch.bfloat16},
    "sparse-24-bitmask f16, undeclared": {"form": "sparse-24-bitmask", "dtype": torch.float16, "entry": {}},
    "sparse-bitmask": {"form": "sparse-bitmask"},
    "sparse-bitmask, names of tensors": {"form": "sparse-bitmask", "old_names": True},
    "dense": {"form": "dense"},
    "dense bf16": {"form": "dense", "dtype": torch.bfloat16},
    "dense, declared": {
        "form": "dense", "dtype": torch.float16,
        "entry": {
            "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}
        },
    },
    "marlin-24": {"form": "marlin-24", "dtype": torch.float16},
    "marlin-24 in a bf16 model": {"form": "marlin-24", "dtype": torch.bfloat16},
    "marlin-24 int8": {"form": "marlin-24", "dtype": torch.float16, "bits": 8},
    "marlin-24 by row": {"form": "marlin-24", "dtype": torch.float32, "group": None},
    "vLLM's GPTQ": {
        "form": "marlin-24", "names": "gptq", "dtype": torch.float16, "entry": {"quantization_config": GPTQ},
    },
    "Sparse-Marlin": {"form": "marlin-24", "names": "sparse-marlin", "dtype": torch.float16, "entry": {}},
}  # fmt: skip


def dense_model(made, folder):
    """The model that a foreign folder stands for, loaded without lissom."""
    shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = {key: value for key, value in made.config.items() if not key.endswith("_config")}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(made.dense, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder)


def raw(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_converts_loads_and_generates_the_same(case, write, tmp_path):
    made = write(**CASES[case])
    before = raw(made.folder)
    report = convert_folder(made.folder, tmp_path / "new")
    assert raw(made.folder) == before, "the source is never written to"
    assert [layer.name for layer in report.packed] == sorted(made.linears)
    left = {layer.name: layer.reason for layer in report.layers if not layer.packed}
    if made.form == "dense":
        assert left.pop("model.embed_tokens.weight") == "its place, Embedding, is no linear"
        assert left.pop("lm_head.weight").startswith("it is not 2:4 (row 0, columns ")
    assert not left

    stored = load_file(tmp_path / "new" / "model.safetensors")
    for name in made.dense.keys() - set(made.linears):
        assert torch.equal(stored[name].view(torch.uint8), made.dense[name].view(torch.uint8)), name
    model, dense = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "new"),
        dense_model(made, tmp_path / "dense"),
    )
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Sparse24Linear)}
    assert {f"{name}.weight" for name in packed} == set(made.linears)
    for name, module in packed.items():
        assert torch.equal(module.dense_weight(), made.dense[f"{name}.weight"]), name

    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        theirs, ours = dense(tokens).logits, model(tokens).logits
    assert (theirs - ours).abs().max() <= {4: 1e-5, 2: 2e-2}[theirs.element_size()]
    exact = (
        model.dequantize() if theirs.element_size() == 2 else model
    )  # sums of 16-bit types may tip a choice
    told = [
        each.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0) for each in (dense, exact)
    ]
    assert torch.equal(*told)


@pytest.mark.parametrize("case", ["sparse-24-bitmask bf16", "marlin-24"])
def test_report_and_config(case, write, tmp_path):
    made = write(**CASES[case])
    source = sum(t.nbytes for t in load_file(made.folder / "model.safetensors").values())
    report = convert_folder(made.folder, tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert report.source_bytes == source
    assert report.output_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert report.dense == len(made.dense) - len(made.linears)
    layer = next(layer for layer in report.layers if "up_proj" in layer.name)
    assert layer.shape == (384, 128)
    assert layer.output_bytes == 384 * 128 * 9 // 8
    assert layer.source_bytes < layer.output_bytes + 20
    assert report.to_dict()["layers"][0]["packed"] is True
    assert json.loads(json.dumps(report.to_dict()))["target"] == str(tmp_path / "new")
    assert set(report.files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}

    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "lissom"
    assert [f"{name}.weight" for name in config["quantization_config"]["modules"]] == sorted(made.linears)
    assert config["lissom"]["method"].startswith("converted from " + case.split()[0])
    assert config["lissom"]["writer"].startswith("compressed-tensors 0.")
    assert {key: value for key, value in config.items() if key not in ("lissom", "quantization_config")} == {
        key: value for key, value in made.config.items() if key != "quantization_config"
    }
    assert "converted from" in (tmp_path / "new" / "README.md").read_text()
    check_folder(tmp_path / "new")


def test_parts_of_a_weight_may_lie_in_several_files(write, tmp_path, monkeypatch):
    made = write()
    state = load_file(made.folder / "model.safetensors")
    (made.folder / "model.safetensors").unlink()
    index = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(index.values()):
        save_file({name: state[name] for name in state if index[name] == file}, made.folder / file)
    (made.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    monkeypatch.setattr(conversion, "ShardWriter", partial(shards.ShardWriter, shard_bytes=100_000))
    report = convert_folder(made.folder, tmp_path / "new")
    assert len([name for name in report.files if name.endswith(".safetensors")]) > 2
    model = load_model(tmp_path / "new")
    for name in made.linears:
        module = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.dense_weight(), made.dense[name])


def test_side_files_go_along(write, tmp_path):
    made = write()
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "NOTICE.md",
    ):
        (made.folder / name).write_text(name)
    (made.folder / "additional_chat_templates").mkdir()
    (made.folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    for name in ("recipe.yaml", "modeling_llama.py", "training.bin", "lissom-report.json"):
        (made.folder / name).write_text(name)
    (made.folder / "README.md").write_text("# Their words\n")
    report = convert_folder(made.folder, tmp_path / "new")
    new = raw(tmp_path / "new")
    assert new["tokenizer.model"] == b"tokenizer.model"
    assert new["tool.jinja"] == b"tool"
    assert new["README.md"].startswith(b"# Their words\n\n<!-- lissom: begin -->")
    assert set(report.left) == {"recipe.yaml", "modeling_llama.py", "training.bin", "lissom-report.json"}
    assert not set(report.left) & new.keys()
    assert {"LICENSE", "NOTICE.md", "merges.txt", "chat_template.jinja", "tokenizer.json"} <= new.keys()


@pytest.mark.parametrize(
    ("key", "more", "told"),
    [
        ("compression_config", {}, "before 0.8, left scales of groups in plain order"),
        ("quantization_config", {"version": "0.7.1"}, "before 0.8, left scales of groups in plain order"),
    ],
)
def test_scales_of_old_writers_are_in_plain_order(write, writers, tmp_path, key, more, told):
    made = write("marlin-24", dtype=torch.float16, ordered=False, entry={key: writers.marlin_entry(**more)})
    report = convert_folder(made.folder, tmp_path / "new")
    assert told in " ".join(report.notes)
    down = "model.layers.0.mlp.down_proj"  # the only kind of layer here whose groups the kernel's order moves
    assert torch.equal(
        load_model(tmp_path / "new").get_submodule(down).dense_weight(), made.dense[f"{down}.weight"]
    )
    other = convert_folder(made.folder, tmp_path / "new", scales="kernel", overwrite=True)
    assert other.notes == ()
    wrong = load_model(tmp_path / "new").get_submodule(down).dense_weight()
    assert not torch.equal(wrong, made.dense[f"{down}.weight"])


def test_an_unknown_writer_is_told_and_can_be_overruled(write, writers, tmp_path):
    entry = writers.marlin_entry(global_compression_ratio=1.8)
    made = write("marlin-24", dtype=torch.float16, ordered=False, entry={"quantization_config": entry})
    assert "convert again with scales in plain order" in plan_conversion(made.folder).notes[0]
    assert convert_folder(made.folder, tmp_path / "new", scales="plain").notes == ()
    down = "model.layers.1.mlp.down_proj"
    assert torch.equal(
        load_model(tmp_path / "new").get_submodule(down).dense_weight(), made.dense[f"{down}.weight"]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32])
def test_integers_become_the_type_that_is_asked_for(write, writers, tmp_path, dtype):
    made = write("marlin-24", dtype=torch.float16)
    convert_folder(made.folder, tmp_path / "new", dtype=dtype)
    model = load_model(tmp_path / "new")
    assert str(model.dtype) == f"torch.{str(dtype).removeprefix('torch.')}"
    torch.manual_seed(0)
    up = "model.layers.0.mlp.up_proj"
    wide = model.get_submodule(up).dense_weight()
    assert wide.dtype == model.dtype
    half = made.dense[f"{up}.weight"].float()
    # One rounding of the product instead of that to half precision.
    assert (wide.float() - half).abs().max() <= half.abs().max() * {2: 2**-8, 4: 2**-11}[wide.element_size()]
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.float16, "other tensors stay as they are"


def test_everything_in_bitmasks_as_the_first_writers_had_it(write, writers, tmp_path):
    made = write(
        "sparse-bitmask",
        old_names=True,
        entry={"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}},
    )

    def compress_all(state):
        for name in [name for name in state if name.endswith(".weight")]:
            state |= {f"{name}.{part}": tensor for part, tensor in writers.bitmask(state.pop(name)).items()}

    made.tensors(compress_all)
    report = convert_folder(made.folder, tmp_path / "new")
    reasons = {layer.name: layer.reason for layer in report.layers if not layer.packed}
    assert "is no linear" in reasons["model.embed_tokens.weight"]
    assert "is no linear" in reasons["model.norm.weight"]
    assert reasons["lm_head.weight"].startswith("it is not 2:4 (row 0, columns")
    model = load_model(tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(stored[name], made.dense[name]) for name in reasons)
    assert sum(isinstance(module, Sparse24Linear) for module in model.modules()) == len(made.linears)


def test_dense_weights_that_are_not_two_four_stay_bit_for_bit(write, tmp_path):
    made = write("dense", dtype=torch.bfloat16)
    down, spare = "model.layers.1.mlp.down_proj.weight", "model.layers.0.extra.weight"

    def spoil(state):
        state[down][5, 8:11] = 1
        state[spare] = torch.ones(4, 8)

    made.tensors(spoil)
    before = load_file(made.folder / "model.safetensors")
    report = convert_folder(made.folder, tmp_path / "new")
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons[down] == "it is not 2:4 (row 5, columns 8 to 11)"
    assert reasons[spare] == "LlamaForCausalLM does not use it"
    stored = load_file(tmp_path / "new" / "model.safetensors")
    for name in (down, spare, "lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(stored[name].view(torch.uint8), before[name].view(torch.uint8)), name
    assert len(report.packed) == len(made.linears) - 1
    load_model(tmp_path / "new")


def test_a_pruned_folder_keeps_what_it_knows_of_itself(write, tmp_path):
    made = write("dense")
    known = {"method": "alps", "pattern": "2:4", "format": "dense", "sparsity": 0.5}
    made.edit(lambda config: config.update(lissom=known))
    convert_folder(made.folder, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {key: config["lissom"][key] for key in known} == known | {"format": "packed"}
    assert "| Method | alps |" in (tmp_path / "new" / "README.md").read_text()


def test_a_weight_with_two_owners_is_written_out(write, tmp_path):
    made = write(settings={"tie_word_embeddings": True})

    def compress_embedding(state):
        weight = state.pop("model.embed_tokens.weight")
        assert "lm_head.weight" not in state
        state |= {
            "lm_head.compressed": weight.flatten(),
            "lm_head.bitmask": torch.full((96, 16), 255, dtype=torch.uint8),
            "lm_head.shape": torch.tensor([96, 128]),
        }

    made.tensors(compress_embedding)
    made.edit(lambda config: config.update(quantization_config={}))
    report = convert_folder(made.folder, tmp_path / "new")
    (head,) = (layer for layer in report.layers if not layer.packed)
    assert (head.name, head.reason) == ("lm_head.weight", "it is shared with another module")
    assert torch.equal(load_model(tmp_path / "new").lm_head.weight, made.dense["model.embed_tokens.weight"])


def test_target_is_replaced_only_when_asked_and_only_as_a_whole(write, tmp_path, monkeypatch):
    made, target = write(), tmp_path / "new"
    convert_folder(made.folder, target)
    (target / "notes.md").write_text("mine")
    before = raw(target)
    with pytest.raises(FileExistsError, match=r"already holds a model.*--overwrite"):
        convert_folder(made.folder, target)
    convert_folder(made.folder, target, overwrite=True)
    assert raw(target) == before

    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion._Packing, "meta", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(made.folder, target, overwrite=True)
    assert raw(target) == before
    with pytest.raises(KeyboardInterrupt):
        convert_folder(made.folder, tmp_path / "other")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "old"]


def test_the_source_and_the_current_folder_are_no_targets(write, tmp_path, monkeypatch):
    made = write()
    with pytest.raises(ValueError, match="is the source itself"):
        convert_folder(made.folder, tmp_path / "old" / ".." / "old", overwrite=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the current folder"):
        convert_folder(made.folder, ".")


def test_room_is_looked_for_first(write, tmp_path, monkeypatch):
    made = write()
    few = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: few)
    with pytest.raises(OSError, match=r"weights need 0\.00 GB, .* has 0\.00 GB left: make room"):
        convert_folder(made.folder, tmp_path / "deep" / "new")
    assert not (tmp_path / "deep").exists()


def test_a_plan_writes_nothing_and_says_the_same(write, tmp_path):
    made = write("marlin-24", dtype=torch.float16)
    plan = plan_conversion(made.folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["old"]
    report = convert_folder(made.folder, tmp_path / "new")
    assert plan.target is None
    assert (plan.layers, plan.output_bytes, plan.peak_bytes) == (
        report.layers,
        report.output_bytes,
        report.peak_bytes,
    )


def test_progress_is_told_when_it_takes_long(write, tmp_path, monkeypatch):
    made = write()
    events = []
    convert_folder(made.folder, tmp_path / "a", on_event=events.append)
    assert {event["event"] for event in events} == {"stage"}, "not for a moment's work"
    clock = iter(range(0, 100_000, 3))
    monkeypatch.setattr(conversion.time, "perf_counter", lambda: float(next(clock)))
    convert_folder(made.folder, tmp_path / "b", on_event=events.append)
    progress = [event for event in events if event["event"] == "progress"]
    assert len(progress) > 5
    assert progress[-1]["done"] == progress[-1]["of"]
    assert progress[-1]["remaining_seconds"] == 0
    left = [event["remaining_seconds"] for event in progress]
    assert left[0] > left[-1]
    assert all(event["done"] < after["done"] for event, after in itertools.pairwise(progress))


def test_links_of_the_hub_cache_are_followed_and_no_others(write, tmp_path):
    made = write()
    root = tmp_path / "models--a--b"
    blobs, revision = root / "blobs", root / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    for number, file in enumerate(sorted(made.folder.iterdir())):
        shutil.move(file, blobs / str(number))
        (revision / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    convert_folder(revision, tmp_path / "new")
    assert not any(path.is_symlink() for path in (tmp_path / "new").iterdir())
    load_model(tmp_path / "new")

    (tmp_path / "secret.txt").write_text("secret")
    for name in ("vocab.json", "generation_config.json", "model.safetensors", "config.json", "README.md"):
        place, kept = revision / name, revision / "kept"
        if place.is_symlink():
            place.rename(kept)
        for target, message in (
            (tmp_path / "secret.txt", "out of the model folder"),
            (tmp_path / "gone", "leads nowhere"),
        ):
            place.symlink_to(target)
            with pytest.raises(CheckpointError, match=rf"{name} is a symbolic link .*{message}"):
                convert_folder(revision, tmp_path / "other")
            place.unlink()
        if kept.is_symlink():
            kept.rename(place)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_one_weight_at_a_time(bulk, tmp_path):
    folders = {
        form: str(bulk(form)) for form in ("sparse-24-bitmask", "sparse-bitmask", "marlin-24", "dense")
    }
    script = f"""
        import json
        import torch
        import lissom.hf.convert as convert
        torch.set_num_threads(1)
        def line(key):
            with open("/proc/self/status") as status:
                return next(int(row.split()[1]) for row in status if row.startswith(key)) * 1024
        found = {{}}
        for form, folder in {folders!r}.items():
            convert.plan_conversion(folder)
            open("/proc/self/clear_refs", "w").write("5")
            before = line("VmRSS")
            report = convert.convert_folder(folder, {str(tmp_path / "new")!r}, overwrite=True)
            found[form] = report.output_bytes, line("VmHWM") - before, report.peak_bytes
        print(json.dumps(found))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for form, (written, peak, said) in json.loads(done.stdout).items():
        assert written > 150e6, form
        assert peak < 0.5 * written, form
        assert peak < said, form
