# SPDX-License-Identifier: Apache-2.0
"""Verbs that make a model folder: prune, run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lissom.cli import options, tables
from lissom.cli.console import Voice, outcome
from lissom.cli.console import execute as execute_verb
from lissom.recipe import Recipe, build_recipe, read_recipe
from lissom.run import plan_recipe, run_recipe


def prune(
    model: options.Model,
    *,
    output: options.Output,
    pattern: options.Pattern = "2:4",
    pattern_for: options.PatternFor = None,
    method: options.Method = "alps",
    refit: options.Refit = options.RefitChoice.on,
    variant: options.Variant = None,
    blend: options.Blend = None,
    permute: options.Permute = None,
    reconstruct: options.ReconstructPasses = 0,
    reconstruct_lr: options.ReconstructRate = 5e-4,
    data: options.Data = None,
    field: options.Field = "text",
    samples: options.Samples = 64,
    seq_len: options.SeqLen = 1024,
    seed: options.Seed = 0,
    include: options.Include = None,
    exclude: options.Exclude = None,
    damp: options.Damp = None,
    lenient: options.Lenient = False,
    preserve_mask: options.PreserveMask = False,
    form: options.Form = "packed",
    stream: options.Stream = False,
    eval_text: options.Text = None,
    windows: options.Windows = 8,
    speed: options.Speed = True,
    kernels: options.Kernels = False,
    dtype: options.DType = "auto",
    threads: options.Threads = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Set weights to zero, save the model, and report size, speed and quality."""
    calibration = {"source": data, "field": field, "samples": samples, "seq_len": seq_len, "seed": seed}
    training = {"passes": reconstruct, "learning_rate": reconstruct_lr} if reconstruct else None
    which = {"include": include, "exclude": exclude, "strict": not lenient, "preserve_mask": preserve_mask}
    how = {"method": method, "variant": variant, "damp": damp, "blend": blend, "permute": permute}
    patterns = options.patterns(pattern, pattern_for)
    step = {"pattern": patterns, "refit": options.REFITS[refit], "reconstruct": training, **how, **which}
    values = {
        "model": model,
        "dtype": dtype,
        "threads": threads,
        "data": calibration if data else None,
        "steps": [{"prune": step}],
        "evaluate": {"perplexity": eval_text, "windows": windows, "speed": speed, "kernels": kernels},
        "output": {"dir": str(output), "format": form, "stream": stream},
    }
    voice = Voice(
        json=json, quiet=quiet, verbose=verbose, dry_run=dry_run, resume=resume, overwrite=overwrite
    )
    execute_verb(voice, "prune", values, tables.report_view)


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see docs/recipes.md.")],
    *,
    model: Annotated[
        str | None, typer.Option("--model", help="Takes the place of the recipe's model.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Takes the place of output.dir.")
    ] = None,
    threads: options.Threads = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a recipe: its steps in order, then evaluate, save, report."""
    voice = Voice(
        json=json, quiet=quiet, verbose=verbose, dry_run=dry_run, resume=resume, overwrite=overwrite
    )
    with voice.guard():
        checked = _replaced(read_recipe(recipe), model, output, threads)
        if dry_run:
            voice.show(plan_recipe(checked), tables.plan_view)
            return
        result = run_recipe(checked, resume=resume, overwrite=overwrite, on_event=voice.event)
        voice.show(outcome(result), tables.report_view if result.report else tables.results_view)


def _replaced(recipe: Recipe, model: str | None, output: Path | None, threads: int | None) -> Recipe:
    values = recipe.to_dict()
    if model is not None:
        values["model"] = model
    if threads is not None:
        values["threads"] = threads
    if output is not None:
        values["output"] = {**(values.get("output") or {}), "dir": str(output)}
    return build_recipe(values, name="lissom run")
