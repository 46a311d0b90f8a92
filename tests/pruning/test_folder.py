# SPDX-License-Identifier: Apache-2.0
import shutil
import subprocess
import sys

import pytest
import torch

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
