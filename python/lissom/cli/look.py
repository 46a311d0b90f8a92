# SPDX-License-Identifier: Apache-2.0
"""Verbs that only look: info, inspect, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lissom.cli import options, tables
from lissom.cli.console import Voice, execute


def info(
    *,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Versions, CPU, kernels in use, settings."""
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    execute(voice, "info", {"steps": [{"info": {}}]}, tables.info_view)


def inspect(
    model: options.Model,
    *,
    pattern: Annotated[str, typer.Option("--pattern", help="What a prune would ask for.")] = "2:4",
    include: options.Include = None,
    exclude: options.Exclude = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Blocks and linears of a model, and what pruning could touch; reads no weights."""
    step = {"pattern": pattern, "include": include, "exclude": exclude}
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    execute(voice, "inspect", {"model": model, "steps": [{"inspect": step}]}, tables.inspect_view)


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Folder that lissom wrote, or its lissom-report.json.")
    ] = Path("lissom-demo"),
    *,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write lissom-report.html again from a folder's lissom-report.json."""
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    execute(
        voice,
        "report",
        {"steps": [{"report": {"source": str(folder)}}]},
        lambda console, value: console.print(value["page"], markup=False, soft_wrap=True),
    )
