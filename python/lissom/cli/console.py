# SPDX-License-Identifier: Apache-2.0
"""How verbs talk: results on stdout, everything else on stderr, errors in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from lissom.recipe import RecipeError, build_recipe
from lissom.reporting.wording import duration_text
from lissom.run import RunResult, plan_recipe, run_recipe

_LONGEST = 600
_PIPED_WIDTH = 110


def _rank() -> int:
    """Number of this process among those that torchrun started."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdigit() and os.environ.get("WORLD_SIZE", "1") != "1" else 0


@dataclass
class Voice:
    """What the user asked to hear; of several processes the first one speaks, the others only complain."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False
    out: Console = field(default_factory=lambda: _console(sys.stdout))
    err: Console = field(default_factory=lambda: _console(sys.stderr))
    rank: int = field(default_factory=_rank)
    _progress: Progress | None = None
    _task: TaskID | None = None

    def event(self, event: dict[str, Any]) -> None:
        """Show one event of a run."""
        kind = event["event"]
        if self.rank:
            return
        if kind == "text":
            target = sys.stderr if self.json else sys.stdout
            target.write(event["text"] + ("\n" if event["end"] else ""))
            target.flush()
        elif self.quiet:
            return
        elif kind == "stage":
            self._end_progress()
            self.err.print(event["text"], style="dim", markup=False)
        elif kind == "progress":
            self._advance(event)

    def _advance(self, event: dict[str, Any]) -> None:
        left = duration_text(event["remaining_seconds"])
        error = "" if event["relative_error"] is None else f", error {event['relative_error']:.3f}"
        if not self.err.is_terminal:
            self.err.print(
                f"{event['step']}: {event['done']} of {event['of']} ({event['name']}{error}), {left} left",
                style="dim",
                markup=False,
            )
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.err,
                transient=True,
            )
            self._task = self._progress.add_task(event["step"], total=event["of"], note="")
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=event["done"], note=f"{left} left{error}")
        if event["done"] == event["of"]:
            self._end_progress()

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn exceptions into one sentence and an exit code; 2 for a wrong call, 1 for a failed run."""
        self._hush()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = self._warn
                yield
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            self._fail(
                "interrupted; the same call with --resume goes on where it stopped", "KeyboardInterrupt", 1
            )
        except RecipeError as error:
            self._fail(str(error), "RecipeError", 2)
        except Exception as error:  # noqa: BLE001 - the outermost frame: every failure becomes a sentence
            if self.verbose:
                self.err.print(traceback.format_exc(), markup=False)
            self._fail(explain(error), type(error).__name__, 1)
        finally:
            self._end_progress()

    def _fail(self, message: str, kind: str, code: int) -> None:
        self._end_progress()
        if self.json and self.rank == 0:
            print(json.dumps({"error": {"type": kind, "message": message}}))
        # A wrong call is wrong for all; RankError says that another process failed, and that one says why.
        if self.rank == 0 or kind not in ("RecipeError", "RankError"):
            self._say(f"error: {message}", "bold red")
        raise typer.Exit(code)

    def _warn(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if self.verbose or (not self.quiet and issubclass(category, UserWarning)):
            self._say(f"warning: {message}", "yellow")

    def _say(self, text: str, style: str) -> None:
        by = f"process {self.rank}: " if self.rank else ""
        self.err.print(f"{by}{text}", style=style, markup=False, soft_wrap=True)

    def _hush(self) -> None:
        """Libraries' own bars and logs would drown the result."""
        if self.verbose:
            return
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def show(self, value: Any, view: Callable[[Console, Any], None]) -> None:
        """Print a result: JSON, or as `view` draws it."""
        if self.rank:
            return
        if self.json:
            print(json.dumps(value, ensure_ascii=False, indent=2))
        else:
            view(self.out, value)


def execute(voice: Voice, verb: str, values: dict[str, Any], view: Callable[[Console, Any], None]) -> None:
    """Run a verb: check its recipe, then plan it or run it, and show what came out.

    Args:
        voice: what the user wants to hear.
        verb: its name, for messages.
        values: the one-step recipe; empty settings may be None.
        view: draws the result on the console.
    """
    with voice.guard():
        try:
            recipe = build_recipe(_without_none(values), name=f"lissom {verb}")
        except RecipeError as error:
            raise RecipeError(str(error).replace(f"steps[0].{verb}.", "")) from error
        if voice.dry_run and voice.rank:
            return
        if voice.dry_run:
            from lissom.cli.tables import plan_view

            voice.show(plan_recipe(recipe), plan_view)
            return
        result = run_recipe(recipe, resume=voice.resume, overwrite=voice.overwrite, on_event=voice.event)
        voice.show(outcome(result), view)


def outcome(result: RunResult) -> Any:
    """What a run has to show: its report, or the result of its only step, or all results."""
    if result.report is not None:
        return result.report
    return result.results[0]["result"] if len(result.results) == 1 else result.results


def _console(file: TextIO) -> Console:
    return Console(file=file, highlight=False, width=None if file.isatty() else _PIPED_WIDTH)


def explain(error: BaseException) -> str:
    """An exception as one sentence with what to try."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    if isinstance(error, MemoryError) or "not enough memory" in text:
        return f"not enough memory ({text}): try fewer --samples, a shorter --seq-len, or --dtype bfloat16"
    if isinstance(error, PermissionError):
        return f"{text}: choose a folder that you may write (-o)"
    if isinstance(error, KeyError):
        return f"missing key {text}; -v shows where"
    return text


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
