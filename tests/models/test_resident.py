# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from lissom import assets
from lissom.hf import CheckpointError, load_model
from lissom.models import origin
from lissom.models.families import FAMILIES
from lissom.models.resident import Resident
from lissom.models.shards import stored_tensors
from lissom.models.stream import BlockStream
from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import UnsupportedModelError, describe

CAUSAL = [name for name, family in FAMILIES.items() if family.head]
EXPERTS = ["mixtral", "qwen2_moe", "deepseek_v3", "jamba"]


@pytest.fixture
def folder(tmp_path):
    """Saves a tiny model: folder("llama", shards="20KB", **config)."""

    def make(family="llama", *, dtype=torch.float32, shards="5GB", **config):
        build_tiny(family, dtype=dtype, **config).save_pretrained(tmp_path / "in", max_shard_size=shards)
        return tmp_path / "in"

    return make


def blocks_of(model):
    return [block.module for block in describe(model).blocks]


def tensors_of(folder):
    return {name: stored.read() for name, stored in stored_tensors(folder).items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CAUSAL)
def test_an_opened_model_is_the_loaded_one(folder, family, dtype):
    path = folder(family, dtype=dtype, shards="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    expected, resident = load_model(path), Resident.open(path)
    assert not any(module.training for module in resident.model.modules())
    assert all(parameter.is_meta for parameter in resident.model.parameters())
    assert resident.device.type == "cpu"
    assert_same(dict(resident.model.named_buffers()), dict(expected.named_buffers()))
    resident.load("")
    assert_same(dict(resident.model.named_parameters()), dict(expected.named_parameters()))
    assert resident.model.config.to_dict() | {"_name_or_path": ""} == expected.config.to_dict() | {
        "_name_or_path": ""
    }
    resident.release("")
    assert all(parameter.is_meta for parameter in resident.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", *EXPERTS])
def test_a_walk_block_by_block_gives_the_same_bits(folder, family):
    path = folder(family)
    expected, resident = load_model(path), Resident.open(path)
    inputs = tiny_inputs(family)
    whole = BlockStream(expected, describe(expected), inputs, batch=2)
    parts = describe(resident.model)
    head = resident.model.get_output_embeddings()  # tied to the embedding in some of them
    with resident.block(*resident.rest([*blocks_of(resident.model), head])):
        assert head.weight.is_meta != resident.model.config.tie_word_embeddings
        stream = BlockStream(resident.model, parts, inputs, batch=2)
    assert all(parameter.is_meta for parameter in resident.model.parameters())
    for block in parts.blocks:
        assert torch.equal(stream.hidden, whole.hidden)
        with resident.block(block.module):
            assert not any(parameter.is_meta for parameter in block.module.parameters())
            stream.advance()
        whole.advance()
        assert all(parameter.is_meta for parameter in resident.model.parameters())
    assert torch.equal(stream.hidden, whole.hidden)


def test_parts_are_modules_and_names(folder):
    resident = Resident.open(folder())
    first = "model.layers.0"
    norm = f"{first}.input_layernorm.weight"
    assert resident.names(norm) == resident.names(resident.model.model.layers[0].input_layernorm) == [norm]
    assert len(resident.names(first)) == len(resident.names(resident.model.model.layers[0])) == 9
    assert resident.names("model.layers.1", norm, norm)[9:] == [norm]
    outside = resident.rest([*blocks_of(resident.model), resident.model.lm_head])
    assert outside == ["model.embed_tokens.weight", "model.norm.weight"]
    for wrong in ("model.layers.00", "model.lay", torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="is no module or parameter of this LlamaForCausalLM"):
            resident.load(wrong)


def test_a_context_releases_what_it_loaded_and_no_more(folder):
    resident = Resident.open(folder())
    layer = resident.model.model.layers[1]
    assert resident.load(layer.mlp.up_proj) == ["model.layers.1.mlp.up_proj.weight"]
    with torch.no_grad():
        layer.mlp.up_proj.weight.zero_()

    def fail():
        with resident.block(layer):
            assert not layer.self_attn.q_proj.weight.is_meta
            assert layer.mlp.up_proj.weight.count_nonzero() == 0  # what is there is not read again
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert layer.self_attn.q_proj.weight.is_meta
    assert not layer.mlp.up_proj.weight.is_meta
    resident.release(layer)
    assert resident.load(layer.mlp)
    assert layer.mlp.up_proj.weight.count_nonzero() > 0


@pytest.mark.parametrize("stored", ["one", "both", "head"])
def test_tied_weights_stay_tied(folder, stored):
    path = folder(tie_word_embeddings=True)
    file = path / "model.safetensors"
    weights = load_file(file)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if stored != "one":
        weights[head] = weights[embedding].clone()
    if stored == "head":
        del weights[embedding]
    save_file(weights, file, metadata={"format": "pt"})
    resident = Resident.open(path)
    model = resident.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with resident.block(model.lm_head):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, weights[head if stored == "head" else embedding])
        with torch.no_grad():
            model.lm_head.weight[0] = 0
        with resident.saving(path.parent / "out") as output:
            output.write(model.lm_head)
    assert model.model.embed_tokens.weight.is_meta
    written = tensors_of(path.parent / "out")
    assert written.keys() == weights.keys()
    assert all(written[name][0].count_nonzero() == 0 for name in (embedding, head) if name in written)


def test_a_tie_that_the_folder_contradicts_is_not_made(folder):
    path = folder(tie_word_embeddings=True)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="config.json ties lm_head.weight to model.embed_tokens.weight, but"):
        resident = Resident.open(path)
    resident.load("")
    assert torch.equal(resident.model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(resident.model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", CAUSAL)
def test_saved_blocks_come_back_and_the_rest_is_copied(folder, family, tmp_path):
    path = folder(family, dtype=torch.bfloat16, shards="60KB")
    (path / "tokenizer.json").write_text("{}")
    (path / "lissom-report.json").write_text("{}")
    before, resident = tensors_of(path), Resident.open(path)
    blocks = blocks_of(resident.model)
    expected = load_model(path)
    resident.model.config.lissom = {"method": "halving"}
    with torch.no_grad(), resident.saving(tmp_path / "out") as output:
        for block in (blocks[0], blocks[2]):
            with resident.block(block):
                for parameter in block.parameters():
                    parameter.mul_(0.5)
                output.write(block)
        for number in (0, 2):
            for parameter in blocks_of(expected)[number].parameters():
                parameter.mul_(0.5)
    after = tensors_of(tmp_path / "out")
    assert {name: (each.shape, each.dtype) for name, each in after.items()} == {
        name: (each.shape, each.dtype) for name, each in before.items()
    }
    assert 0 < sum(not torch.equal(before[name], after[name]) for name in before) < len(before)
    found = load_model(tmp_path / "out")
    assert_same(dict(found.named_parameters()), dict(expected.named_parameters()))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "lissom-report.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    provenance = config.pop("lissom")
    assert provenance["method"] == "halving"
    assert provenance["format"] == "dense"
    assert config == json.loads((path / "config.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert output.report is not None
    assert sorted(output.report.files) == files
    assert output.report.bytes == sum((tmp_path / "out" / name).stat().st_size for name in files)
    assert "halving" in (tmp_path / "out" / "README.md").read_text()


def test_saved_types_are_those_of_the_folder(folder, tmp_path):
    path = folder(dtype=torch.float32)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    resident = Resident.open(path)
    layer = resident.model.model.layers[0]
    with resident.saving(tmp_path / "out") as output, resident.block(layer):
        assert layer.mlp.up_proj.weight.dtype == torch.bfloat16
        output.write(layer)
    before, after = tensors_of(path), tensors_of(tmp_path / "out")
    for name, tensor in after.items():
        rounded = before[name].bfloat16().float() if name.startswith("model.layers.0.") else before[name]
        assert torch.equal(tensor, rounded)
    wide = Resident.open(path, dtype=torch.float64)
    wide.load(wide.model.model.norm)
    assert wide.model.model.norm.weight.dtype == torch.float64


def test_an_output_that_fails_changes_nothing(folder, tmp_path):
    resident = Resident.open(folder())
    layers = resident.model.model.layers

    def write(*blocks):
        with resident.saving(tmp_path / "out") as output, resident.block(layers[0]):
            for block in blocks:
                output.write(block)

    with pytest.raises(ValueError, match=r"model\.layers\.1\..* is not in memory: load the whole block"):
        write(layers[0], layers[1])
    with pytest.raises(ValueError, match="was written before"):
        write(layers[0], layers[0])
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
    with resident.saving(tmp_path / "out"):
        pass
    with pytest.raises(FileExistsError, match="already holds a model"), resident.saving(tmp_path / "out"):
        pass


def test_a_conversion_without_a_way_back_is_refused_before_any_work(folder, tmp_path, monkeypatch):
    from transformers import core_model_loading

    resident = Resident.open(folder("mixtral"))
    back = core_model_loading.revert_weight_conversion
    for wrong, message in (
        (
            lambda model, state: {f"x.{name}": each for name, each in back(model, state).items()},
            "turns it into x",
        ),
        (lambda model, state: back(model, state)["nothing"], "cannot be written: KeyError"),
    ):
        monkeypatch.setattr(core_model_loading, "revert_weight_conversion", wrong)
        with pytest.raises(UnsupportedModelError, match=message), resident.saving(tmp_path / "out"):
            raise AssertionError("the body must not be reached")


def test_one_stored_tensor_for_two_parameters(folder, tmp_path, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    path = folder(dtype=torch.bfloat16)
    split = WeightConverter(
        "mlp.gate_up_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], operations=[Chunk(dim=0)]
    )
    monkeypatch.setattr(
        conversion_mapping, "_checkpoint_conversion_mapping_cache", {"llama": [split], "legacy": []}
    )
    weights = load_file(path / "model.safetensors")
    for number in range(3):
        mlp = f"model.layers.{number}.mlp"
        halves = [weights.pop(f"{mlp}.{half}_proj.weight") for half in ("gate", "up")]
        weights[f"{mlp}.gate_up_proj.weight"] = torch.cat(halves)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    resident = Resident.open(path)
    mlp = resident.model.model.layers[1].mlp
    fused = weights["model.layers.1.mlp.gate_up_proj.weight"]
    assert resident.load(mlp.up_proj) == [f"model.layers.1.mlp.{half}_proj.weight" for half in ("gate", "up")]
    assert torch.equal(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), fused)
    with torch.no_grad():
        mlp.gate_proj.weight.zero_()
    resident.release(mlp.up_proj)
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight is not in memory"):
        resident.stored(mlp.gate_proj)
    resident.load(mlp.up_proj)  # reads the pair, and leaves the changed half alone
    with resident.saving(tmp_path / "out") as output:
        output.write(mlp.gate_proj)
    after = tensors_of(tmp_path / "out")
    assert after.keys() == weights.keys()
    written = after.pop("model.layers.1.mlp.gate_up_proj.weight")
    assert torch.equal(written, torch.cat([torch.zeros_like(fused[:48]), fused[48:]]))
    assert_same(after, {name: weights[name] for name in after})


def test_a_model_in_memory_needs_no_loading(tmp_path):
    model = build_tiny()
    before = dict(model.named_parameters())
    resident = Resident(model)
    assert resident.load("") == []
    assert resident.device.type == "cpu"
    with resident.block(model.model.layers[0]):
        pass
    resident.release("")
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    with pytest.raises(ValueError, match=r"lissom\.save"), resident.saving(tmp_path / "out"):
        pass


def test_digest_follows_every_byte(folder):
    path = folder()
    first = Resident.open(path).digest()
    weights = load_file(path / "model.safetensors")
    assert Resident.open(path).digest() == first
    weights["model.norm.weight"][-1] += 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert Resident.open(path).digest() != first
    model = build_tiny()
    held = Resident(model).digest()
    with torch.no_grad():
        model.model.norm.weight[-1] += 1
    assert Resident(model).digest() != held


def _edit(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _configure(path, **entries):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | entries))


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "missing tensor": (lambda path: _edit(path, lambda w: w.pop(UP)), f"lacks 1 tensors.*{UP}"),
    "other shape": (
        lambda path: _edit(path, lambda w: w.update({UP: torch.zeros(48, 31)})),
        rf"{UP} gives {UP} \[48, 31\], but config.json describes \[48, 32\]",
    ),
    "larger config": (lambda path: _configure(path, hidden_size=1 << 24), "but config.json describes"),
    "more blocks": (lambda path: _configure(path, num_hidden_layers=4), r"lacks 9 tensors.*layers\.3"),
    "quantised": (
        lambda path: _configure(path, quantization_config={"quant_method": "fp8"}),
        "quantised or packed",
    ),
    "other type": (
        lambda path: _edit(path, lambda w: w.update({UP: torch.zeros(48, 32).to(torch.float8_e4m3fn)})),
        "is stored as F8_E4M3",
    ),
    "cut off": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9]),
        "damaged or cut off",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has no weights"),
    "two names": (
        lambda path: _edit(path, lambda w: w.update({"layers.1.mlp.up_proj.weight": w[UP] + 1})),
        "stored twice",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_folder_that_does_not_fit_is_refused_before_a_weight_is_read(folder, kind, monkeypatch):
    path = folder()
    damage, message = DAMAGES[kind]
    damage(path)
    monkeypatch.setattr("lissom.models.shards.Stored.read", lambda _: pytest.fail("a weight was read"))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        Resident.open(path)


def test_an_expert_of_another_shape_is_refused(folder):
    path = folder("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    _edit(path, lambda weights: weights.update({name: weights[name][:, 1:].contiguous()}))
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.gate_up_proj cannot be made from"):
        Resident.open(path)


MEASURE = """
    import resource, sys
    import torch
    import lissom.hf.save  # what an output needs from there
    from lissom.models.resident import Resident

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

    source, target = sys.argv[1:]
    warm = Resident.open(source)                  # imports, allocator, the largest tensor
    with warm.block(warm.model.model.layers[0].mlp.up_proj), torch.no_grad():
        warm.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    before = peak()
    resident = Resident.open(source)
    with torch.no_grad(), resident.saving(target) as output:
        for layer in resident.model.model.layers:
            with resident.block(layer):
                layer.mlp.up_proj.weight.mul_(0.5)
                output.write(layer)
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_one_block(tmp_path):
    width, ffn, layers = 1024, 4096, 12
    model = build_tiny(
        hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "in")
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 1.5 * block < layers * block / 4


def test_companions_of_the_bundled_model_are_copied(tmp_path):
    source = shutil.copytree(assets.TINY_LLAMA, tmp_path / "in")
    with Resident.open(source).saving(tmp_path / "out"):
        pass
    copied = {file.name for file in (tmp_path / "out").iterdir()}
    assert copied == {file.name for file in source.iterdir()}
    assert_same(tensors_of(source), tensors_of(tmp_path / "out"))


def test_the_skeleton_disturbs_no_random_state(folder):
    path = folder()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    origin.skeleton(path, stored_tensors(path), None)
    assert torch.equal(torch.rand(3), expected)
