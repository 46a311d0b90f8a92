# SPDX-License-Identifier: Apache-2.0
"""`lissom selftest`: are the kernels right on this machine."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console

from lissom.cli import options
from lissom.cli.console import Voice


class Device(str, Enum):
    """Where the kernels run."""

    cpu = "cpu"
    cuda = "cuda"


def selftest(
    *,
    device: Annotated[
        Device, typer.Option("--device", help="cpu: each instruction set that is here.")
    ] = Device.cpu,
    timings: Annotated[
        bool, typer.Option("--timings/--no-timings", help="On a GPU: also time against cuBLAS.")
    ] = True,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Check every 2:4 operator against float64 on this CPU or GPU; on a GPU also time it. Under a minute."""
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run)
    with voice.guard():
        from lissom import selftest as test

        if dry_run:
            voice.show(
                {"device": device.value, "groups": list(test.GROUPS), "missing": test.missing(device.value)},
                _plan,
            )
            return

        def tell(text: str) -> None:
            voice.event({"event": "stage", "text": text})

        result = test.run(device.value, timings=timings, on_progress=tell)
        voice.show({**result, "markdown": test.markdown(result)}, _view)
        if not result["passed"]:
            raise typer.Exit(1)


def _plan(console: Console, value: dict[str, Any]) -> None:
    console.print(f"would check on {value['device']}: {', '.join(value['groups'])}")
    for text in value["missing"]:
        console.print(f"missing: {text}", markup=False, soft_wrap=True)


def _view(console: Console, value: dict[str, Any]) -> None:
    console.print(value["markdown"], markup=False, soft_wrap=True)
