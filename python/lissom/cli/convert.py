# SPDX-License-Identifier: Apache-2.0
"""`lissom convert`: a folder with 2:4 weights, in a retired format or dense, becomes a packed one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lissom.cli import options
from lissom.cli.console import Voice
from lissom.cli.tables import table
from lissom.recipe import RecipeError
from lissom.reporting.wording import byte_text, duration_text, ratio_text

_DTYPES = ("auto", "float16", "bfloat16", "float32")
_SCALES = ("auto", "kernel", "plain")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Folder: sparse-24-bitmask, sparse-bitmask, marlin-24, or dense."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write.")],
    *,
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Of weights stored as integers: auto (as the config says), or float*."),
    ] = "auto",
    scales: Annotated[
        str,
        typer.Option("--scales", help="Order of marlin-24 scales: auto (by their writer), kernel or plain."),
    ] = "auto",
    threads: options.Threads = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Turn a 2:4 checkpoint, dense or in a format that nothing else runs any more, into a packed one."""
    voice = Voice(json=json, quiet=quiet, verbose=verbose, dry_run=dry_run, overwrite=overwrite)
    with voice.guard():
        _check("--dtype", dtype, _DTYPES)
        _check("--scales", scales, _SCALES)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        voice.show(_convert(voice, source, target, {"dtype": dtype, "scales": scales}), convert_view)


def _check(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"{flag} must be one of {', '.join(known)}, got {value!r}")


def _convert(voice: Voice, source: Path, target: Path, how: dict[str, Any]) -> dict[str, Any]:
    from lissom.hf.convert import convert_folder, plan_conversion

    if voice.dry_run:
        files = [f"{target}/{name}" for name in ("config.json", "model*.safetensors")]
        return plan_conversion(source, **how).to_dict() | {"writes": files}
    try:
        report = convert_folder(source, target, overwrite=voice.overwrite, on_event=voice.event, **how)
    except KeyboardInterrupt:
        raise RuntimeError(f"interrupted; {target} is as it was before") from None
    return report.to_dict()


def convert_view(console: Console, report: dict[str, Any]) -> None:
    """A row for each kind of layer, then what was left alone, and sizes."""
    layers = report["layers"]
    counts: Counter[tuple[str, ...]] = Counter()
    sizes: dict[tuple[str, ...], list[int]] = {}
    key: tuple[str, ...]
    for layer in layers:
        key = (_kind(layer["name"]), layer["format"], "×".join(map(str, layer["shape"])), _now(layer))
        counts[key] += 1
        sums = sizes.setdefault(key, [0, 0])
        sums[0], sums[1] = sums[0] + layer["source_bytes"], sums[1] + layer["output_bytes"]
    made = table("layer", "was", "shape", "is", "count", "before", "after")
    for key, count in counts.items():
        made.add_row(*map(Text, key), str(count), *map(byte_text, sizes[key]))
    console.print(made)
    for layer in {layer["reason"]: layer for layer in layers if layer["reason"]}.values():
        console.print(f"dense: such as {layer['name']}: {layer['reason']}", style="dim", markup=False)
    if report["dense"]:
        console.print(
            f"copied bit for bit: {report['dense']} tensors, {byte_text(report['dense_bytes'])}", markup=False
        )
    if report["left"]:
        console.print(f"not taken along: {', '.join(report['left'])}", style="dim", markup=False)
    for note in report["notes"]:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    ratio = ratio_text(report["output_bytes"] / report["source_bytes"])
    console.print(
        f"weights: {byte_text(report['source_bytes'])} before, {byte_text(report['output_bytes'])} after ({ratio})"
    )
    if report["target"] is None:
        console.print(f"would need about {byte_text(report['peak_bytes'])} of memory beside the program")
        for path in report.get("writes", []):
            console.print(f"would write {path}", style="dim", markup=False)
    else:
        console.print(
            f"model   {report['target']}   ({duration_text(report['seconds'])})", markup=False, soft_wrap=True
        )


def _kind(name: str) -> str:
    """The name of a layer without the number of its block: rows of a table are kinds."""
    parts = name.removesuffix(".weight").split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or name


def _now(layer: dict[str, Any]) -> str:
    return f"{'2:4 packed' if layer['packed'] else 'dense'} {layer['dtype']}"
