# SPDX-License-Identifier: Apache-2.0
"""`lissom demo`: a real model made 2:4-sparse, saved, loaded by plain transformers, timed and judged."""

from __future__ import annotations

import json as jsonlib
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import lissom
from lissom import assets
from lissom.cli import options, tables
from lissom.cli.console import Voice
from lissom.recipe import build_recipe
from lissom.reporting.wording import duration_text
from lissom.run import is_interrupted, plan_recipe, run_recipe

MODEL = "smollm2-135m-instruct"
# Runs in a process of its own, that knows nothing of lissom but what pip installed.
_RELOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
assert "lissom.nn" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
ids = tokenizer(prompt, return_tensors="pt")
out = model.generate(**ids, max_new_tokens=24, do_sample=False, repetition_penalty=1.2, pad_token_id=0)
packed = sum(type(m).__name__ == "Sparse24Linear" for m in model.modules())
print(json.dumps({"text": tokenizer.decode(out[0], skip_special_tokens=True), "packed_linears": packed}))
"""


@dataclass(frozen=True)
class Material:
    """What the demo works on; `note` says why it is not the real model."""

    model: Path
    calibration: Path
    validation: Path
    prompt: str = "A free operating system is"
    note: str | None = None


def demo(
    *,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")] = Path(
        "lissom-demo"
    ),
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Where third_party/models.py puts models.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="The bundled tiny model instead of the real one.")
    ] = False,
    threads: options.Threads = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Prune a small real model to 2:4, save it, load it with plain transformers, time it, report."""
    voice = Voice(
        json=json, quiet=quiet, verbose=verbose, dry_run=dry_run, resume=resume, overwrite=overwrite
    )
    with voice.guard():
        start = time.perf_counter()
        material = _bundled(None) if tiny else _find(cache, voice)
        recipe = build_recipe(_recipe(material, output, threads), name="lissom demo")
        if dry_run:
            voice.show(plan_recipe(recipe), tables.plan_view)
            return
        if material.note:
            voice.err.print(f"note: {material.note}", style="yellow", markup=False, soft_wrap=True)
        resume = resume or (is_interrupted(recipe) and not overwrite)
        again = (output / "lissom-report.json").is_file()
        report = run_recipe(recipe, resume=resume, overwrite=overwrite or again, on_event=voice.event).report
        if report is None:  # one of several processes that helped
            return
        voice.event(
            {"event": "stage", "text": "loading the result with plain transformers, in another process"}
        )
        result = {
            "report": report,
            "reload": _reload(output, material.prompt),
            "note": material.note,
            "seconds": time.perf_counter() - start,
        }
        voice.show(result, _view)


def _recipe(material: Material, output: Path, threads: int | None) -> dict[str, Any]:
    # Small enough for three minutes on two cores; 64 windows of 1024 give a better model.
    values: dict[str, Any] = {
        "model": str(material.model),
        "data": {"source": str(material.calibration), "samples": 32, "seq_len": 512},
        "steps": [{"prune": {"pattern": "2:4"}}],
        "evaluate": {"perplexity": str(material.validation), "windows": 4, "seq_len": 1024, "kernels": True},
        "output": {"dir": str(output)},
    }
    return {**values, "threads": threads} if threads else values


def _find(cache: Path | None, voice: Voice) -> Material:
    """The real model from the cache, fetched into it from a checkout; else the bundled one."""
    checkout = Path(lissom.__file__).resolve().parents[2]
    door = checkout / "third_party"
    folder = cache or checkout / ".cache" / "lissom"
    wanted = [
        ("models.py", folder / MODEL / "config.json", ["--only", MODEL]),
        ("corpora.py", folder / "prose.valid.txt", ["--only", "prose"]),
    ]
    for script, sign, arguments in wanted:
        if sign.is_file():
            continue
        if voice.dry_run or not (door / script).is_file():
            return _bundled(f"{sign} is not there (a checkout's third_party/{script} would fetch it)")
        voice.event({"event": "stage", "text": f"fetching with third_party/{script}: {' '.join(arguments)}"})
        done = subprocess.run(
            [sys.executable, str(door / script), str(folder), *arguments], stdout=sys.stderr, check=False
        )
        if done.returncode or not sign.is_file():
            return _bundled(f"third_party/{script} could not fetch {sign.name} (exit code {done.returncode})")
    return Material(folder / MODEL, folder / "prose.train.txt", folder / "prose.valid.txt")


def _bundled(reason: str | None) -> Material:
    why = f"{reason}; the demo" if reason else "the demo"
    note = (
        f"{why} uses the tiny model that comes with lissom: everything runs, but neither its speed nor its "
        "quality says anything about real models"
    )
    return Material(
        assets.TINY_LLAMA, assets.CALIBRATION_TEXT, assets.VALIDATION_TEXT, "And it came to pass", note
    )


def _reload(folder: Path, prompt: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _RELOAD, str(folder), prompt], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(
            f"plain transformers could not load {folder}: {lines[-1]}; is lissom installed with pip, and "
            "is LISSOM_AUTOLOAD not 0?"
        )
    return jsonlib.loads(done.stdout.splitlines()[-1])


def _view(console: Console, result: dict[str, Any]) -> None:
    tables.report_view(console, result["report"])
    found = result["reload"]
    console.print(
        f"\nAutoModelForCausalLM.from_pretrained, without importing lissom: {found['packed_linears']} packed "
        "linears. It says:",
        markup=False,
    )
    console.print("  " + " ".join(found["text"].split()), style="italic", markup=False)
    if result["note"]:
        console.print(f"note: {result['note']}", style="yellow", markup=False)
    console.print(f"\n{duration_text(result['seconds'])} in all.")
