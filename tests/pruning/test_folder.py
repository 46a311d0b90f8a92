# SPDX-License-Identifier: Apache-2.0
import shutil
import subprocess
import sys

import pytest
import torch

import lissom
from lissom.hf import CheckpointError, convert_folder, load_model
from lissom.hf.quantizer import packed_modules
from lissom.models.families import FAMILIES
from lissom.models.resident import Resident
from lissom.models.tiny import build_tiny
from lissom.pruning import prune_folder, prune_model

IDS = torch.randint(3, 97, (10, 24), generator=torch.Generator().manual_seed(0))


def _load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "family, options", [("llama", {}), ("gpt2", {}), ("olmoe", {}), ("llama", {"blend": 0.0})]
)
def test_folder_is_pruned_like_the_model(tmp_path, family, options):
    model = build_tiny(family)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    arguments = {"pattern": "2:4", "data": IDS, "strict": False, **options}
    report = prune_model(model, **arguments)
    other = prune_folder(tmp_path / "dense", tmp_path / "out", spill_dir=tmp_path, **arguments)
    assert [layer.name for layer in other.layers] == [layer.name for layer in report.layers]
    written = _load(tmp_path / "out")
    for (name, tensor), found in zip(model.state_dict().items(), written.state_dict().values()):
        assert torch.equal(tensor, found), name
    assert written.config.lissom["method"] == "alps"


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.head])
def test_packed_folder_is_the_saved_model(tmp_path, family):
    arguments = {"method": "magnitude", "strict": False}
    model = build_tiny(family)
    model.save_pretrained(tmp_path / "in")
    for form in ("dense", "packed"):
        prune_folder(tmp_path / "in", tmp_path / form, format=form, **arguments)
    prune_model(model, **arguments)
    saved = lissom.save(model, tmp_path / "saved")
    written = load_model(tmp_path / "packed")
    assert packed_modules(written).keys() == set(saved.modules)
    expected = load_model(tmp_path / "saved").state_dict()
    assert written.state_dict().keys() == expected.keys()
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    if family == "gpt2":  # its Conv1D weights are 2:4 along the other dimension of what is stored
        with pytest.raises(CheckpointError, match="Conv1D, is no linear"):
            convert_folder(tmp_path / "dense", tmp_path / "converted")
        return
    report = convert_folder(tmp_path / "dense", tmp_path / "converted")
    assert {layer.name.removesuffix(".weight") for layer in report.packed} == set(saved.modules)
    assert load_model(tmp_path / "converted").state_dict().keys() == expected.keys()


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_files_have_the_size_that_is_asked_for(tmp_path, form):
    build_tiny("llama").save_pretrained(tmp_path / "in")
    for name, size in (("one", "5GB"), ("many", "20KB")):
        prune_folder(tmp_path / "in", tmp_path / name, format=form, max_shard_size=size, method="magnitude")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 30_000 for file in files)
    one, many = (load_model(tmp_path / name).state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_an_output_layer_is_packed_too(tmp_path):
    build_tiny("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "in")
    arguments = {"method": "magnitude", "pattern": {"lm_head": "2:4"}, "include": ["lm_head"]}
    prune_folder(tmp_path / "in", tmp_path / "out", format="packed", **arguments)
    assert packed_modules(load_model(tmp_path / "out")).keys() == {"lm_head"}


def test_weights_keep_their_stored_type_when_packed(tmp_path):
    build_tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "in")
    arguments = {"method": "magnitude", "dtype": torch.float32}
    prune_folder(tmp_path / "in", tmp_path / "out", format="packed", **arguments)
    model = load_model(tmp_path / "out")
    assert {module.weight.dtype for module in packed_modules(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "packed", "pattern": "50%"}, "holds at most two of every four weights, got '50%'"),
        ({"format": "packed", "pattern": {"re:.*mlp.*": "4:8"}}, r"got 're:\.\*mlp\.\*': '4:8'"),
        ({"format": "gguf"}, "format must be 'packed' or 'dense', got 'gguf'"),
    ],
)
def test_formats_that_do_not_fit_are_refused_at_once(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        prune_folder(tmp_path / "absent", tmp_path / "out", method="magnitude", **arguments)


def test_nothing_to_pack_leaves_nothing(tmp_path):
    build_tiny("llama").save_pretrained(tmp_path / "in")
    resident = Resident.open(tmp_path / "in")
    layer = resident.model.model.layers[0]
    with (
        pytest.raises(ValueError, match="no linear that was written is 2:4"),
        resident.saving(tmp_path / "out", packed=True) as output,
        resident.block(layer),
    ):
        output.write(layer)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_one_block_is_in_memory_at_a_time(tmp_path):
    build_tiny("llama").save_pretrained(tmp_path / "dense")
    resident = Resident.open(tmp_path / "dense")
    layers, seen = resident.model.model.layers, []

    def look(progress):
        real = [not parameter.is_meta for parameter in resident.model.parameters()]
        seen.append((progress.name, sum(real)))

    handles = [
        layer.register_forward_pre_hook(
            lambda module, args: seen.append([not layer.mlp.up_proj.weight.is_meta for layer in layers])
        )
        for layer in layers
    ]
    prune_model(resident, pattern="2:4", data=IDS, on_progress=look)
    # None while the model is called to see how it calls its blocks, then one at a time.
    assert {sum(entry) for entry in seen if isinstance(entry, list)} == {0, 1}
    assert [count for entry in seen if isinstance(entry, tuple) for count in entry[1:]] == [0, 0, 0]
    for handle in handles:
        handle.remove()


def test_killed_run_leaves_the_target_and_resumes(tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.block == 2:
            raise Stop

    build_tiny("llama").save_pretrained(tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    arguments = {"pattern": "2:4", "data": IDS, "overwrite": True, "state_dir": tmp_path / "state"}
    with pytest.raises(Stop):
        prune_folder(tmp_path / "dense", tmp_path / "out", on_progress=stop, **arguments)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    prune_folder(tmp_path / "dense", tmp_path / "out", resume=True, **arguments)
    model = build_tiny("llama")
    prune_model(model, pattern="2:4", data=IDS)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), _load(tmp_path / "out").state_dict().values())
    )


_TWO = """
import sys, json, torch
from lissom.models.tiny import build_tiny
from lissom.pruning import Ranks, Reconstruction, prune_model
torch.set_num_threads(1)
folder, samples, length, passes = sys.argv[1], *map(int, sys.argv[2:])
ids = torch.randint(3, 97, (samples, length), generator=torch.Generator().manual_seed(0))
with Ranks.join(timeout=60) as ranks:
    model = build_tiny("llama", dtype=torch.float64)
    report = prune_model(
        model, pattern="2:4", method="sparsegpt", data=ids, ranks=ranks,
        reconstruct=Reconstruction(passes=passes) if passes else None,
    )
    damps = [layer.damp for layer in report.layers]
    torch.save((model.state_dict(), damps, [block.losses for block in report.blocks]), f"{folder}/{ranks.rank}.pt")
"""


@pytest.mark.parametrize(
    "samples, length, passes",
    [(10, 24, 0), (5, 8, 0), (5, 24, 2)],
    ids=["usual", "few tokens", "reconstruct"],
)
@pytest.mark.filterwarnings("ignore:.*fewer than 2 per input")
def test_two_processes_give_the_result_of_one(tmp_path, samples, length, passes):
    program = tmp_path / "program.py"
    program.write_text(_TWO)
    arguments = [str(tmp_path), str(samples), str(length), str(passes)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run([*launcher, str(program), *arguments], check=True, timeout=300)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    subprocess.run([sys.executable, str(program), *arguments], check=True, timeout=300)
    whole, damps, losses = torch.load(tmp_path / "0.pt", weights_only=True)
    for rank, (found, its_damps, its_losses) in enumerate(parts):
        assert its_damps == damps, rank
        assert [each is None for each in its_losses] == [each is None for each in losses]
        for mine, wanted in zip(its_losses, losses, strict=True):
            assert mine is None or mine == pytest.approx(wanted)
        for name, tensor in whole.items():
            assert torch.equal(found[name], parts[0][0][name])
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
