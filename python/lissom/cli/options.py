# SPDX-License-Identifier: Apache-2.0
"""Flags that several verbs share, so that they mean and read the same everywhere."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class RefitChoice(str, Enum):
    """What `--refit` takes."""

    on = "on"
    exact = "exact"
    off = "off"


REFITS: dict[RefitChoice, Any] = {
    RefitChoice.on: True,
    RefitChoice.exact: "exact",
    RefitChoice.off: False,
}

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, or a name in the local Hugging Face cache.")
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Calibration text: .txt or .jsonl.")]
Field = Annotated[str, typer.Option("--field", help="Key of the text in .jsonl lines.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Calibration windows.")]
SeqLen = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per window.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of every random choice.")]
DType = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores by default.")]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="NAME", help="Only these modules; re:REGEX too. Repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="NAME", help="Not these modules. Repeatable.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be touched, memory and time; write nothing.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
Json = Annotated[bool, typer.Option("--json", help="Only JSON on stdout; messages go to stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Tracebacks, and what libraries log.")]
Text = Annotated[
    str | None,
    typer.Option("--eval-text", metavar="FILE", help="Held-out text for perplexity before and after."),
]
Windows = Annotated[int, typer.Option("--windows", min=1, help="Windows of the text that are scored.")]
Task = Annotated[list[str] | None, typer.Option("--task", help="lm-eval task, such as arc_easy. Repeatable.")]
Pattern = Annotated[
    str,
    typer.Option("--pattern", help="2:4 (2 of 4 kept), n:m, a share to prune such as 50%, 2:4+70%, 2:4t."),
]
PatternFor = Annotated[
    list[str] | None,
    typer.Option(
        "--pattern-for",
        metavar="NAME=PATTERN",
        help="Of these modules (re:REGEX too), or =dense; the first that matches counts, --pattern is for the "
        "rest. Repeatable.",
    ),
]
Method = Annotated[str, typer.Option("--method", help="magnitude, wanda, sparsegpt, mrp or alps.")]
Refit = Annotated[
    RefitChoice,
    typer.Option("--refit", help="Solve again for the kept weights: on, exact (slow), or off."),
]
Variant = Annotated[
    str | None,
    typer.Option("--variant", help="Of mrp: mask, compensation, each S (single) or M (joint), as in MM."),
]
Blend = Annotated[
    float | None,
    typer.Option("--blend", help="Weight of the dense model's outputs in the targets, 0 to 1."),
]
Permute = Annotated[
    bool | None,
    typer.Option("--permute/--no-permute", help="Reorder channels first, so that n:m masks lose less."),
]
ReconstructPasses = Annotated[
    int,
    typer.Option("--reconstruct", min=0, metavar="PASSES", help="Train each pruned block; 0 does not."),
]
ReconstructRate = Annotated[
    float, typer.Option("--reconstruct-lr", help="Learning rate of that training at its start.")
]
Damp = Annotated[
    float | None, typer.Option("--damp", help="Share of the mean diagonal added to the Gram matrix.")
]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="Leave layers that cannot be pruned instead of stopping.")
]
PreserveMask = Annotated[
    bool, typer.Option("--preserve-mask", help="Weights that are zero already stay so, and count.")
]
Form = Annotated[str, typer.Option("--format", help="packed (small and fast, needs lissom) or dense.")]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="One block of the model in memory at a time."),
]
Speed = Annotated[bool, typer.Option("--speed/--no-speed", help="Time dense against packed afterwards.")]
Kernels = Annotated[bool, typer.Option("--kernels/--no-kernels", help="Time the kernels for the roofline.")]


def patterns(usual: str, own: list[str] | None) -> str | dict[str, str]:
    """The pattern of a recipe: one for all layers, or a map with those of `--pattern-for` before it.

    Args:
        usual: of all layers that have none of their own.
        own: "NAME=PATTERN" for some.

    Raises:
        typer.BadParameter: one is not of this form, or a name is there twice.

    Example:
        >>> patterns("2:4", ["re:.*down_proj=dense"])
        {'re:.*down_proj': 'dense', 're:.*': '2:4'}
    """
    if not own:
        return usual
    found: dict[str, str] = {}
    for text in own:
        name, _, pattern = text.rpartition("=")  # a regular expression may hold further ones
        if not name or not pattern:
            raise typer.BadParameter(f"--pattern-for is NAME=PATTERN, such as 're:.*mlp.*=2:4', got {text!r}")
        if name in found:
            raise typer.BadParameter(f"--pattern-for names {name!r} twice; keep one")
        found[name] = pattern
    found.setdefault("re:.*", usual)
    return found
