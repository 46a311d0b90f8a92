# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a whole model: dense as transformers runs it, dense at its best, and packed."""

from __future__ import annotations

import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import lissom
from lissom.benchmark.machine import torch_threads

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}
LABELS = {
    "dense": "dense, transformers as it comes",
    "onednn": "dense, oneDNN prepacked",
    "compiled": "dense, torch.compile",
    "packed": "2:4 packed, lissom",
}

Model = str | Path | nn.Module


@dataclass(frozen=True)
class GenerationOptions:
    """How a generation benchmark is run; `prompt` and `new_tokens` in tokens, one sequence."""

    prompt: int = 512
    new_tokens: int = 16
    rounds: int = 5
    threads: int | None = None
    dtype: str = "auto"
    compiled: bool = False
    memory: bool = False
    seed: int = 0


class PrepackedLinear(nn.Module):
    """A dense linear whose weight oneDNN has laid out once, as torch.compile with freezing does: the peer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        # No hint of the rows of x: layouts made with one were equal at one row, and slower or equal at 512.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), None)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@dataclass
class Variant:
    """One contender and what was measured of it; times in seconds."""

    name: str
    model: Any
    folder: Path | None = None
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    decode_parts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] | None = None


class _Clock:
    """A generate() streamer that notes when each token arrived."""

    def __init__(self, on_first: Callable[[], None] | None) -> None:
        self.times: list[float] = []
        self.on_first = on_first

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2 and self.on_first:  # generate() hands over the prompt before the first token
            self.on_first()

    def end(self) -> None:
        """Required of a streamer; nothing to do."""


def run(
    model: Model,
    *,
    packed: Model | None = None,
    options: GenerationOptions | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time prefill and decode of one model, dense against packed, interleaved in this process.

    Args:
        model: dense model, its folder, or a name in `SHAPES` (random weights).
        packed: the 2:4 model or its folder; without one the dense weights are cut by magnitude,
                for timing only.
        options: lengths, rounds, threads.
        on_progress: called with one line of text per stage.

    Returns:
        `variants` (medians, shares of a decode step, bytes), `ratios`, and `attribution`
        (peer weakness x sparsity).

    Raises:
        ValueError: nothing in the model is 2:4, or the sequence does not fit the model.
    """
    options = options or GenerationOptions()
    say = on_progress or (lambda line: None)
    # No torch.inference_mode() here: of a weight made in it, F.linear copies the transpose for each prompt
    # (0.65 s for an lm_head of 32000 x 2048). generate() has its own no_grad, as for any user.
    with torch_threads(options.threads or torch.get_num_threads()):
        dense, sparse = _pair(model, packed, options, say)
        prompt = _prompt(dense.model, options)
        variants = _contenders(dense, sparse, options, say)
        for variant in variants:
            say(f"warming up: {LABELS[variant.name]}")
            _generate(variant.model, prompt, 2)
        for turn in range(options.rounds):
            say(f"round {turn + 1} of {options.rounds}")
            for variant in variants[turn % len(variants) :] + variants[: turn % len(variants)]:
                prefill, steps = _generate(variant.model, prompt, options.new_tokens)
                variant.prefill_s.append(prefill)
                variant.decode_s.extend(steps)
        for variant in variants:
            if variant.name != "compiled":
                variant.decode_parts = _decode_parts(variant.model, prompt, options.new_tokens)
    if options.memory:
        _measure_memory(variants, options, say)
    return _summary(model, variants, options)


def random_model(shape: str, *, dtype: str = "auto", seed: int = 0) -> nn.Module:
    """A Llama of a known shape with random weights.

    Args:
        shape: a name in `SHAPES`.
        dtype: of the weights; "auto" is bfloat16.
        seed: of the weights.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: unknown shape.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape not in SHAPES:
        raise ValueError(f"benchmark.generation: shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False)
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_config(config, dtype=wanted).eval()


def _load(model: Model, dtype: str, seed: int) -> nn.Module:
    if isinstance(model, nn.Module):
        return model.eval()
    if str(model) in SHAPES:
        return random_model(str(model), dtype=dtype, seed=seed)
    from lissom.hf import load_model

    return load_model(model, dtype=None if dtype == "auto" else getattr(torch, dtype)).eval()


def _pair(
    model: Model, packed: Model | None, options: GenerationOptions, say: Callable[[str], None]
) -> tuple[Variant, Variant]:
    """Dense and packed, from whatever the caller has of them."""
    from lissom.nn import Sparse24Linear

    first = _load(model, options.dtype, options.seed)
    if _is_packed(first):
        if packed is not None:
            raise ValueError(
                "benchmark.generation: the first model is packed already; name the dense one first"
            )
        dense = _swap(first, lambda m: m.to_linear() if isinstance(m, Sparse24Linear) else None)
        return Variant("dense", dense), Variant("packed", first, _folder(model))
    if packed is None:
        say("cutting the weights to 2:4 by magnitude (for timing only)")
        return Variant("dense", first, _folder(model)), Variant("packed", _cut(first))
    second = _load(packed, options.dtype, options.seed)
    if not _is_packed(second):
        raise ValueError(
            "benchmark.generation: no layer of the packed model is 2:4; prune it with pattern '2:4' first"
        )
    return Variant("dense", first, _folder(model)), Variant("packed", second, _folder(packed))


def _is_packed(model: nn.Module) -> bool:
    from lissom.nn import Sparse24Linear

    return any(isinstance(module, Sparse24Linear) for module in model.modules())


def _folder(model: Model) -> Path | None:
    return Path(model) if isinstance(model, (str, Path)) and Path(model).is_dir() else None


def _contenders(
    dense: Variant, packed: Variant, options: GenerationOptions, say: Callable[[str], None]
) -> list[Variant]:
    from lissom.nn import Sparse24Linear

    say("laying out the dense weights for oneDNN")
    # The very layers that are packed, so that lm_head and all else are the same in both.
    names = {name for name, m in packed.model.named_modules() if isinstance(m, Sparse24Linear)}
    prepacked = _swap(dense.model, lambda m: PrepackedLinear(m) if type(m) is nn.Linear else None, only=names)
    variants = [dense, Variant("onednn", prepacked), packed]
    if options.compiled:
        compiled = _swap(dense.model, lambda m: None)
        compiled.forward = torch.compile(compiled.forward, dynamic=True, options={"freezing": True})
        variants.insert(2, Variant("compiled", compiled))
    return variants


def _cut(model: nn.Module) -> nn.Module:
    from lissom.models.walk import describe
    from lissom.nn import Sparse24Linear

    names = {
        ref.name for block in describe(model).blocks for ref in block.linears if type(ref.module) is nn.Linear
    }
    return _swap(model, lambda m: Sparse24Linear.from_linear(m, pattern="magnitude"), only=names)


def _swap(
    model: nn.Module,
    make: Callable[[Any], nn.Module | None],
    *,
    only: set[str] | None = None,
) -> nn.Module:
    """A copy that shares every tensor with `model`, with some of its linears replaced."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for name, module in list(twin.named_modules()):
        if not isinstance(module, nn.Linear) or (only is not None and name not in only):
            continue
        new = make(module)
        if new is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, new)
    return twin.eval()


def _prompt(model: Any, options: GenerationOptions) -> Tensor:
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if options.prompt + options.new_tokens > room:
        raise ValueError(
            f"benchmark.generation: prompt + new_tokens must be <= {room} (the model's positions), "
            f"got {options.prompt} + {options.new_tokens}; choose less"
        )
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(0, config.vocab_size, (1, options.prompt), generator=generator)  # [1, T]


def _generate(
    model: Any,
    prompt: Tensor,
    new_tokens: int,
    on_first: Callable[[], None] | None = None,
) -> tuple[float, list[float]]:
    """Seconds to the first token, and seconds of each later one, as generate() delivers them."""
    clock = _Clock(on_first)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        streamer=clock,
        pad_token_id=0,
    )
    arrivals = clock.times[1:]
    return arrivals[0] - start, [after - before for before, after in itertools.pairwise(arrivals)]


def _decode_parts(model: Any, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    """Shares of one decode step: linears, lm_head, attention without its linears, everything else."""
    spent: dict[str, float] = {}
    head = model.get_output_embeddings()
    roles = {
        m: "lm_head" if m is head else "linears"
        for m in model.modules()
        if isinstance(m, (nn.Linear, PrepackedLinear)) or type(m).__name__ == "Conv1D" or m is head
    }
    attention = [
        m
        for name, m in model.named_modules()
        if name.rpartition(".")[2] in ("self_attn", "attn", "attention")
    ]
    inside = {child for m in attention for child in m.modules() if child in roles}
    plan = {m: {role: 1, "attention": -1} if m in inside else {role: 1} for m, role in roles.items()}
    plan.update({m: {"attention": 1} for m in attention})
    try:
        for module, signs in plan.items():
            module.forward = _timed(module.forward, spent, signs)
        steps = _generate(model, prompt, new_tokens, on_first=spent.clear)[1]
    finally:
        for module in plan:
            module.__dict__.pop("forward", None)
    parts = {name: spent.get(name, 0.0) / sum(steps) for name in ("linears", "lm_head", "attention")}
    return {**parts, "other": 1.0 - sum(parts.values())}


def _timed(inner: Callable[..., Any], spent: dict[str, float], signs: dict[str, int]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = inner(*args, **kwargs)
        seconds = time.perf_counter() - start
        for part, sign in signs.items():
            spent[part] = spent.get(part, 0.0) + sign * seconds
        return out

    return forward


def _weight_bytes(model: Any) -> dict[str, int]:
    """Bytes of the blocks' linears, of the output matrix (each step reads both), and of all else."""
    from lissom.nn import Sparse24Linear

    head = model.get_output_embeddings()
    found = {"linears": 0, "lm_head": 0, "other": 0}
    seen: set[int] = set()
    modules = [
        head,
        *(m for m in model.modules() if m is not head),
    ]  # head first: a tied embedding is counted there
    for module in modules:
        tensors = [
            t
            for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if id(t) not in seen
        ]
        seen.update(id(t) for t in tensors)
        linear = isinstance(module, (nn.Linear, PrepackedLinear)) or type(module).__name__ == "Conv1D"
        role = "lm_head" if module is head else "linears" if linear else "other"
        if isinstance(module, PrepackedLinear):
            found[role] += module.in_features * module.out_features * module.packed.element_size()
        elif isinstance(module, Sparse24Linear):
            values = module.out_features * module.in_features // 2 * module.weight.element_size()
            found[role] += values + module.out_features * -(-module.in_features // 8)
        else:
            found[role] += sum(t.numel() * t.element_size() for t in tensors)
    return found


def _summary(model: Any, variants: list[Variant], options: GenerationOptions) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for v in variants:
        prefill, decode = statistics.median(v.prefill_s), statistics.median(v.decode_s)
        rows.append(
            {
                "name": v.name,
                "label": LABELS[v.name],
                "prefill_seconds": prefill,
                "prefill_tokens_per_s": options.prompt / prefill,
                "decode_seconds": decode,
                "decode_tokens_per_s": 1 / decode,
                "decode_shares": v.decode_parts,
                "weight_bytes": _weight_bytes(v.model),
                "memory": v.memory,
                "samples": {"prefill_seconds": v.prefill_s, "decode_seconds": v.decode_s},
            }
        )
    by_name = {row["name"]: row for row in rows}
    return {
        "model": str(model) if isinstance(model, (str, Path)) else type(model).__name__,
        "dtype": str(next(variants[0].model.parameters()).dtype).removeprefix("torch."),
        "threads": options.threads or torch.get_num_threads(),
        "prompt_tokens": options.prompt,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "variants": rows,
        "memory_ratios": _memory_ratios(by_name),
        "ratios": {
            phase: {
                f"over_{n}": row[f"{phase}_seconds"] / by_name["packed"][f"{phase}_seconds"]
                for n, row in by_name.items()
                if n != "packed"
            }
            for phase in ("prefill", "decode")
        },
        "attribution": {phase: attribute(by_name, phase) for phase in ("prefill", "decode")},
    }


def _memory_ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """Packed over dense: bytes on disk, peaks of memory."""
    dense, packed = rows["dense"]["memory"], rows["packed"]["memory"]
    return {name: packed[name] / dense[name] for name in dense} if dense and packed else None


def attribute(variants: dict[str, dict[str, Any]], phase: str) -> dict[str, Any]:
    """Split packed's gain over transformers into what the dense peer wastes and what sparsity gives.

    Args:
        variants: rows of `run()["variants"]` by name.
        phase: "prefill" or "decode".

    Returns:
        `total` = `peer_weakness` * `sparsity` (factors); `best_dense` names the strongest dense variant.
    """
    seconds = {name: row[f"{phase}_seconds"] for name, row in variants.items()}
    best = min((name for name in seconds if name != "packed"), key=seconds.__getitem__)
    return {
        "total": seconds["dense"] / seconds["packed"],
        "peer_weakness": seconds["dense"] / seconds[best],
        "sparsity": seconds[best] / seconds["packed"],
        "best_dense": best,
    }


def _measure_memory(
    variants: Sequence[Variant], options: GenerationOptions, say: Callable[[str], None]
) -> None:
    """Bytes on disk and peak resident memory, each model alone in a process of its own."""
    forms: dict[str, Literal["dense", "packed"]] = {"dense": "dense", "packed": "packed"}
    for variant in (v for v in variants if v.name in forms):
        say(f"peak memory: {LABELS[variant.name]}")
        with tempfile.TemporaryDirectory() as scratch:
            folder = variant.folder or Path(scratch) / variant.name
            if variant.folder is None:
                lissom.save(variant.model, folder, format=forms[variant.name])
            files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            variant.memory = {"file_bytes": files, **_measure_folder(folder, options)}


def _measure_folder(folder: Path, options: GenerationOptions) -> dict[str, int]:
    arguments = [str(folder), str(options.prompt), str(options.new_tokens), options.dtype]
    done = subprocess.run(
        [sys.executable, "-m", "lissom.benchmark.generation", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads or torch.get_num_threads())},
    )
    if done.returncode:
        last = done.stderr.strip()[-400:]
        raise RuntimeError(f"benchmark.generation: measuring memory of {folder} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident_peak() -> int:
    """Peak resident bytes since the last reset (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(
        "benchmark.generation: /proc/self/status has no VmHWM; peak memory is measured on Linux only"
    )


def _memory_of(folder: str, prompt: int, new_tokens: int, dtype: str) -> dict[str, int]:
    before = _resident_peak()
    model = _load(folder, dtype, 0)
    loading = _resident_peak()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    _generate(model, _prompt(model, GenerationOptions(prompt=prompt, new_tokens=new_tokens)), new_tokens)
    return {"imports_bytes": before, "loading_peak_bytes": loading, "running_peak_bytes": _resident_peak()}


if __name__ == "__main__":
    print(json.dumps(_memory_of(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
