#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the small Llama that ships with lissom, from public-domain text, in a few minutes on one core.

    python third_party/corpora.py --only kjv && python bench/train_tiny.py

Writes python/lissom/assets/{tiny-llama/, calibration.txt, validation.txt}. The demo falls back to it where
the real model cannot be had. Steps and seed are fixed, so the same machine and torch give the same weights
(another CPU sums in another order). Such a model hardly reacts to pruning: judge quality on a real one.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Plan:
    """Everything that decides the weights."""

    vocab_size: int = 2048
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    seq_len: int = 1024
    batch: int = 2
    steps: int = 560
    warmup: int = 40
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    seed: int = 0


def train_tokenizer(text: str, plan: Plan) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE, so that every text has tokens and round-trips."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(text.split("\n\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=plan.seq_len,
        clean_up_tokenization_spaces=False,
    )


def make_model(plan: Plan) -> LlamaForCausalLM:
    """Return the untrained model in float32."""
    config = LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden,
        intermediate_size=plan.intermediate,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        max_position_embeddings=plan.seq_len,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate_at(step: int, plan: Plan) -> float:
    """Linear warm-up, then cosine to 5 %."""
    if step < plan.warmup:
        return plan.learning_rate * (step + 1) / plan.warmup
    done = (step - plan.warmup) / (plan.steps - plan.warmup)
    return plan.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, plan: Plan) -> None:
    """Run the fixed number of AdamW steps over random windows of `tokens` [T]."""
    generator = torch.Generator().manual_seed(plan.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)
    model.train()
    started = time.perf_counter()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, plan)
        starts = torch.randint(len(tokens) - plan.seq_len, (plan.batch,), generator=generator)
        batch = torch.stack([tokens[s : s + plan.seq_len] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == plan.steps - 1:
            print(
                f"step {step:4d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True
            )


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Mean loss over consecutive windows of `text`, in bits per byte (first token of each unscored)."""
    model.eval()
    nats, size, width = 0.0, 0, model.config.max_position_embeddings
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    for window in tokens[: len(tokens) // width * width].view(-1, width):
        nats += model(input_ids=window[None], labels=window[None]).loss.item() * (width - 1)
        size += len(tokenizer.decode(window[1:].tolist()).encode())
    return nats / math.log(2) / size


def excerpt(text: str, size: int) -> str:
    """Return whole chapters, evenly spread over `text`, of about `size` characters in all."""
    chapters = text.strip().split("\n\n\n")
    stride = max(1, round(len(text) / size))
    return "\n\n\n".join(chapters[::stride]) + "\n"


CARD = """# tiny-llama

A Llama of {millions:.2f} M parameters ({layers} layers, width {hidden}, byte-level BPE of {vocab_size}
symbols) that comes with lissom so that the demo and the tests run without a network. Made by
`bench/train_tiny.py`: {steps} steps of {batch} x {seq_len} tokens, seed {seed}, on the King James Bible
(public domain; Debian's bible-kjv-text). Weights: Apache-2.0.

Bits per byte on held-out chapters: {bits:.3f}. It is for plumbing and numerics. Models this small hardly
react to pruning: judge quality and speed on a real one. `../calibration.txt` and `../validation.txt` are
chapters of the same text, from its training and its held-out part.
"""


def main() -> None:
    """Train, evaluate and write the assets (the folder is replaced when all is done)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, default=ROOT / ".cache" / "lissom", help="folder of kjv.*.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "python" / "lissom" / "assets")
    options = parser.parse_args()
    plan = Plan()
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    training = (options.text / "kjv.train.txt").read_text(encoding="utf-8")
    held_out = (options.text / "kjv.valid.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(training, plan)
    model = make_model(plan)
    train(model, torch.tensor(tokenizer(training, verbose=False).input_ids), plan)
    model = model.to(torch.bfloat16)
    bits = bits_per_byte(model, tokenizer, held_out)
    print(f"{model.num_parameters():,} parameters, {bits:.3f} bits per byte on kjv.valid.txt")

    final = options.out / "tiny-llama"
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out, prefix=".tiny-llama.") as folder:
        partial = Path(folder) / "tiny-llama"
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        facts = {**vars(plan), "bits": bits, "millions": model.num_parameters() / 1e6}
        (partial / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
        for file in partial.iterdir():
            file.chmod(0o644)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    (options.out / "calibration.txt").write_text(excerpt(training, 240_000), encoding="utf-8")
    (options.out / "validation.txt").write_text(excerpt(held_out, 60_000), encoding="utf-8")


if __name__ == "__main__":
    main()
