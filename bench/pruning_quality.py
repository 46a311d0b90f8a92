#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Perplexity, time and memory of pruning methods on real models: the tables of docs/systems/pruning.md.

    python bench/pruning_quality.py OUT.jsonl --model smollm2-135m-instruct --pattern 2:4 --method alps wanda

Every run is a process of its own and adds one line to OUT.jsonl; runs that are there already are skipped. Models and
texts come from .cache/lissom (`make models`). Perplexity: 8 windows of 1024 tokens of prose.valid.txt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "lissom"
PUBLISHED = {"damp": 0.01, "blend": 0.0}
# Name of a row -> arguments of prune_model.
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "refit": False, **PUBLISHED},
    "wanda": {"method": "wanda", "refit": False, **PUBLISHED},
    "sparsegpt": {"method": "sparsegpt", "refit": False, **PUBLISHED},
    "sparsegpt+refit": {"method": "sparsegpt", "refit": True, **PUBLISHED},
    "mrp": {"method": "mrp", "refit": False, **PUBLISHED},
    "mrp+refit": {"method": "mrp", "refit": True, **PUBLISHED},
    "alps": {"method": "alps", "refit": True, **PUBLISHED},
    "default": {"method": "alps", "refit": True},
    "default+permute": {"method": "alps", "refit": True, "permute": True},
    "default+reconstruct": {"method": "alps", "refit": True, "reconstruct": True},
    "default+permute+reconstruct": {"method": "alps", "refit": True, "permute": True, "reconstruct": True},
}


def main() -> None:
    """Run what is asked for and not yet in the file."""
    args = _arguments()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    keys = ("model", "pattern", "name", "text", "seed", "samples", "seq_len", "threads")
    for model, pattern, name, text, seed in itertools.product(
        args.model, args.pattern, args.method, args.text, args.seed
    ):
        values = (model, pattern, name, text, seed, args.samples, args.seq_len, args.threads)
        job = dict(zip(keys, values, strict=True))
        if any(all(row[key] == job[key] for key in keys) for row in done):
            continue
        command = [sys.executable, __file__, str(args.out), "--job", json.dumps(job)]
        subprocess.run(command, check=True)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One model pruned and scored, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lissom.evaluation import perplexity
    from lissom.pruning import Options, Reconstruction, prune_model

    torch.set_num_threads(job["threads"])
    folder = CACHE / job["model"]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    row = dict(job)
    if job["name"] != "dense":
        how = dict(METHODS[job["name"]])
        options = Options(refit=how.pop("refit"))
        if how.pop("reconstruct", False):
            how["reconstruct"] = Reconstruction()
        windows = {key: job[key] for key in ("samples", "seq_len", "seed")}
        began, began_cpu = time.perf_counter(), time.process_time()
        report = prune_model(
            model,
            pattern=job["pattern"],
            data=None if job["name"] == "magnitude" else CACHE / f"{job['text']}.train.txt",
            tokenizer=tokenizer,
            options=options,
            on_progress=lambda p: print(f"{job['name']} {p.block}/{p.blocks}, {p.remaining:.0f} s left"),
            **how,
            **windows,
        )
        row["seconds"] = round(time.perf_counter() - began, 1)
        row["cpu_seconds"] = round(time.process_time() - began_cpu, 1)
        for part in ("collect", "solve", "reconstruct", "advance"):
            row[part] = round(sum(getattr(block, f"{part}_seconds") for block in report.blocks), 1)
        row["error"] = sum(layer.relative_error or 0 for layer in report.layers) / len(report.layers)
    row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    row["perplexity"] = round(perplexity(model, tokenizer, CACHE / "prose.valid.txt").perplexity, 3)
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", nargs="+", default=["smollm2-135m-instruct"])
    parser.add_argument("--pattern", nargs="+", default=["2:4"])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=["dense", *METHODS])
    parser.add_argument("--text", nargs="+", default=["prose"], help="NAME of .cache/lissom/NAME.train.txt")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        with args.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(measure(args.job)) + "\n")
        sys.exit()
    return args


if __name__ == "__main__":
    main()
