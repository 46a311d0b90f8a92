# SPDX-License-Identifier: Apache-2.0
"""Verbs that measure: eval, generate, bench."""

from __future__ import annotations

from typing import Annotated

import typer

from lissom.cli import options, tables
from lissom.cli.console import Voice, execute

bench = typer.Typer(no_args_is_help=True)


@bench.callback(invoke_without_command=True)
def bench_group(
    ctx: typer.Context,
    predict: Annotated[
        str | None, typer.Option("--predict", metavar="GPU", help="Short for `bench predict --gpu GPU`.")
    ] = None,
) -> None:
    """Time the kernels, or a whole model, against the strongest dense peers; or predict."""
    if predict is not None and ctx.invoked_subcommand:
        raise typer.BadParameter(
            f"not together with `bench {ctx.invoked_subcommand}`", param_hint="--predict"
        )
    if predict is not None:
        bench_predict(gpu=predict)


def evaluate(
    model: options.Model,
    *,
    perplexity: Annotated[
        str | None, typer.Option("--perplexity", metavar="FILE", help="Text to score: .txt or .jsonl.")
    ] = None,
    windows: options.Windows = 8,
    seq_len: options.SeqLen = 1024,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="Slide over the whole text in steps of this.")
    ] = None,
    task: options.Task = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples per task.")] = None,
    dtype: options.DType = "auto",
    threads: options.Threads = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Perplexity and bits per byte of a text; lm-eval tasks when it is installed."""
    step = {
        "perplexity": perplexity,
        "windows": windows,
        "seq_len": seq_len,
        "stride": stride,
        "tasks": task or [],
        "limit": limit,
    }
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    execute(
        voice,
        "eval",
        {"model": model, "dtype": dtype, "threads": threads, "steps": [{"eval": step}]},
        tables.eval_view,
    )


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    *,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")
    ] = 0.0,
    seed: options.Seed = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    dtype: options.DType = "auto",
    threads: options.Threads = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Continue a prompt, with the tokens per second."""
    step = {
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "chat": chat,
    }
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    execute(
        voice,
        "generate",
        {"model": model, "dtype": dtype, "threads": threads, "steps": [{"generate": step}]},
        tables.generate_view,
    )


@bench.command("sparse24")
def bench_sparse24(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="One shape and fewer repeats.")] = False,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="bfloat16, float32 or float16. Repeatable.")
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option("--rows", min=1, metavar="M", help="Rows of x. Repeatable.")
    ] = None,
    isa: Annotated[
        str | None, typer.Option("--isa", help="Cap us and the peers: avx2, avx512 or avx512x.")
    ] = None,
    threads: options.Threads = 1,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Time the 2:4 linear against oneDNN with prepacked weights and F.linear."""
    step = {"kind": "sparse24", "quick": quick, "dtypes": dtype, "rows": rows, "isa": isa}
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    execute(voice, "bench", {"threads": threads, "steps": [{"bench": step}]}, tables.sparse24_view)


@bench.command("tune")
def bench_tune(
    *,
    threads: options.Threads = 1,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Find out which 2:4 kernel an unknown CPU should use from how many rows of x."""
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    values = {"threads": threads, "steps": [{"bench": {"kind": "tune"}}]}
    execute(voice, "bench", values, tables.tune_view)


@bench.command("predict")
def bench_predict(
    *,
    gpu: Annotated[str, typer.Option("--gpu", help="a100, h100, b200 or rtx50.")] = "a100",
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="bfloat16, float16 or int8. Repeatable.")
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option("--rows", min=1, metavar="M", help="Rows of x. Repeatable.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", metavar="NxK", help="Rows x columns of W. Repeatable.")
    ] = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """What the CUDA 2:4 linear should take by arithmetic alone: nothing is run, nothing is measured."""
    step = {"kind": "predict", "gpu": gpu, "dtypes": dtype, "rows": rows, "shapes": shape}
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    execute(voice, "bench", {"steps": [{"bench": step}]}, tables.predict_view)


@bench.command("generation")
def bench_generation(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Dense or packed model folder.")
    ] = None,
    *,
    packed: Annotated[
        str | None,
        typer.Option(
            "--packed",
            metavar="DIR",
            help="The 2:4 model; without one the dense weights are cut by magnitude, for timing only.",
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Random weights of a known shape: llama-1b.")
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens decoded a round.")] = 16,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also torch.compile'd dense (slow to start).")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also peak memory, each model in a process of its own.")
    ] = False,
    dtype: options.DType = "auto",
    threads: options.Threads = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Tokens per second of a whole model, dense against packed, prefill and decode."""
    step = {
        "kind": "generation",
        "packed": packed,
        "shape": shape,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "compiled": compiled,
        "memory": memory,
    }
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    execute(
        voice,
        "bench",
        {"model": model, "dtype": dtype, "threads": threads, "steps": [{"bench": step}]},
        tables.generation_view,
    )
