# SPDX-License-Identifier: Apache-2.0
"""The command `lissom VERB`: parses flags into a recipe, runs it, shows the result."""

from __future__ import annotations

from typing import Annotated

import typer

import lissom
from lissom.cli import convert, demo, look, make, measure, selftest

app = typer.Typer(
    name="lissom",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model 2:4-sparse, save it, run it faster on this CPU, and see what it cost.",
    epilog="No telemetry; only demo fetches anything. Exit codes: 0 done, 1 failed, 2 wrong usage.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(look.info)
app.command()(look.inspect)
app.command()(make.prune)
app.command("eval")(measure.evaluate)
app.command()(measure.generate)
app.add_typer(measure.bench, name="bench")
app.command()(make.run)
app.command()(convert.convert)
app.command()(look.report)
app.command()(demo.demo)
app.command()(selftest.selftest)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(lissom.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options that come before the verb; `--version` acts by its callback."""


def main() -> None:
    """Entry point of the command."""
    app(prog_name="lissom")
