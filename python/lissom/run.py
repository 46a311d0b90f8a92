# SPDX-License-Identifier: Apache-2.0
"""Runs recipes: plan, steps, evaluation, save, report; the command and `lissom.compress` both enter here."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lissom import steps
from lissom.recipe import Evaluation, Recipe, RecipeError, build_recipe, read_recipe
from lissom.reporting import facts, judge, write_report
from lissom.reporting.files import write_json, write_text
from lissom.steps import Event, Session

if TYPE_CHECKING:
    from lissom.pruning import Ranks

REPORT_VERSION = 1
_PATIENCE = 86400.0  # seconds that the other processes of a run wait while the first one evaluates or saves
_PROMPT = 512  # tokens of prefill when speed is measured, or half of what a small model takes


@dataclass(frozen=True)
class RunResult:
    """What a run gave: one result per step, and for a run that saves the whole report.

    Of several processes (torchrun) only the first has the report, and results of steps other than prune.
    """

    recipe: Recipe
    results: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] | None = None
    output: Path | None = None


class RunError(RuntimeError):
    """A run that cannot start or go on as asked; the message says what to try."""


def compress(
    model: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | dict[str, Any] | Recipe,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult:
    """Make a model smaller as a recipe says: steps, evaluation, saving, report.

    Args:
        model: folder of the dense model; takes the place of the recipe's `model`.
        recipe: YAML file, plain values, or a checked recipe.
        output: folder to write; takes the place of the recipe's `output.dir`.
        resume: go on with an interrupted run; the weights come out bit-equal.
        overwrite: replace a model that is already in the output folder.
        on_event: called with each stage and each finished block.

    Returns:
        Results of the steps, the report, the output folder.

    Raises:
        RecipeError: the recipe is wrong.
        RunError: the output folder is taken, or holds another run's state.

    Example:
        >>> compress("model-dir", recipe="recipe.yaml", output="out")  # doctest: +SKIP
    """
    if isinstance(recipe, Recipe):
        values = recipe.to_dict()
    elif isinstance(recipe, dict):
        values = dict(recipe)
    else:
        values = read_recipe(Path(recipe)).to_dict()
    values["model"] = str(model)
    if output is not None:
        values["output"] = {**(values.get("output") or {}), "dir": str(output)}
    checked = build_recipe(values)
    if checked.output is None:
        raise RecipeError("output is missing: pass output= or write 'output: {dir: FOLDER}'")
    return run_recipe(checked, resume=resume, overwrite=overwrite, on_event=on_event)


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult:
    """Run a recipe's steps; with an output, evaluate, save and report as well.

    Processes that torchrun started share the pruning; everything else the first one does while they wait.

    Args:
        recipe: what to do.
        resume: go on with an interrupted run.
        overwrite: replace a model that is already in the output folder, or an interrupted run's state.
        on_event: called with each stage and each finished block.

    Returns:
        One result per step, and the report of a run that saves.

    Raises:
        RunError: the output folder is taken, or `resume` meets another recipe's state.
        RankError: another process of the run failed.
    """
    from lissom.pruning import Ranks

    emit = on_event or (lambda event: None)
    with _threads(recipe.threads), Ranks.join(timeout=_PATIENCE) as ranks:
        ranks.same("the recipe", recipe.to_dict())
        if recipe.output is not None:
            return _Making(recipe, emit, ranks, resume=resume, overwrite=overwrite).run()
        if ranks.rank:
            return RunResult(recipe)
        session = Session(recipe, emit)
        results = _run_steps(session)
        evaluation = recipe.evaluate
        if evaluation:
            results.append(_timed("eval", lambda: steps.evaluate(session, evaluation)))
        return RunResult(recipe, results)


def plan_recipe(recipe: Recipe) -> dict[str, Any]:
    """What a run would touch, need and write; nothing is written and no weight is read.

    Args:
        recipe: what would be done.

    Returns:
        `recipe` (resolved), `steps` (a plan each), `peak_bytes`, `memory_bytes` (of this machine),
        `estimated_seconds`, `writes` (paths).
    """
    plans: list[dict[str, Any]] = []
    peak, seconds = 0, 0.0
    with _threads(recipe.threads):
        for step in recipe.steps:
            plan = steps.plan(recipe, step.verb, step.settings)
            plans.append({"verb": step.verb, **plan})
            peak, seconds = max(peak, plan["peak_bytes"]), seconds + plan["estimated_seconds"]
        if recipe.evaluate and recipe.evaluate.perplexity:
            plan = steps.plan(recipe, "eval", recipe.evaluate)
            times = 2 if recipe.output else 1
            plans.append({"verb": "evaluate", **plan, "estimated_seconds": times * plan["estimated_seconds"]})
            peak, seconds = max(peak, plan["peak_bytes"]), seconds + times * plan["estimated_seconds"]
    writes = []
    if recipe.output:
        files = ["config.json", "model*.safetensors", "recipe.yaml", "log.jsonl"]
        if recipe.output.report:
            files += ["lissom-report.json", "lissom-report.html"]
        writes = [f"{recipe.output.dir}/{name}" for name in files]
    writes += [str(Path(s.report.source) / "lissom-report.html") for s in recipe.steps if s.report]
    return {
        "recipe": recipe.to_dict(),
        "steps": plans,
        "peak_bytes": peak,
        "memory_bytes": facts.memory_bytes(),
        "estimated_seconds": seconds,
        "writes": writes,
    }


def is_interrupted(recipe: Recipe) -> bool:
    """Whether a run of this recipe into its output folder was begun and can be resumed.

    Args:
        recipe: one with an output.

    Returns:
        Whether the state beside the folder is this recipe's.
    """
    started = _state_folder(Path(recipe.output.dir)) / "run.json" if recipe.output else None
    if started is None or not started.is_file():
        return False
    return json.loads(started.read_text(encoding="utf-8"))["fingerprint"] == recipe.fingerprint()


def _state_folder(output: Path) -> Path:
    return Path(f"{output}.lissom-state")


class _Making:
    """One run that makes a model folder; its state lies beside the folder until the folder is complete."""

    def __init__(
        self, recipe: Recipe, emit: Callable[[Event], None], ranks: Ranks, *, resume: bool, overwrite: bool
    ) -> None:
        if recipe.output is None or recipe.model is None:
            raise RecipeError("a run that saves needs both 'model' and 'output'")
        self.recipe, self.settings = recipe, recipe.output
        self.evaluation = recipe.evaluate or Evaluation(speed=False, kernels=False)
        self.output = Path(recipe.output.dir)
        self.state = _state_folder(self.output)
        self.told = emit
        self.began = time.perf_counter()
        self.resume = resume
        self.ranks = ranks
        with ranks.section("starting"):
            if ranks.rank == 0:
                facts.model_folder(recipe.model)  # a wrong path fails now, not after an hour
                steps.check_texts(recipe)
                self._claim(overwrite=overwrite)
        self.overwrite = overwrite or resume
        self.session = Session(recipe, self.emit, state=self.state, ranks=ranks, overwrite=self.overwrite)

    def run(self) -> RunResult:
        """All stages; a run that fails before its first finished block leaves nothing behind."""
        if self.ranks.rank:
            return self._help()
        try:
            return self._run()
        except BaseException:
            if not any(self.state.rglob("*.safetensors")):
                shutil.rmtree(self.state)
            raise

    def _help(self) -> RunResult:
        """What every process but the first does: its part of the pruning, then wait until all is done."""
        results = _run_steps(self.session)
        self.session.release()
        with self.ranks.section("saving"):
            return RunResult(self.recipe, results, output=self.output)

    def _run(self) -> RunResult:
        self.emit({"event": "start", "recipe": self.recipe.to_dict()})
        before = self._before()
        results = _run_steps(self.session)
        with self.ranks.section("saving"):
            return RunResult(self.recipe, results, self._finish(before), self.output)

    def _finish(self, before: dict[str, Any] | None) -> dict[str, Any]:
        """What comes behind the steps; the report."""
        packing = self._pack()
        after = (
            steps.measure_perplexity(self.session, self.evaluation) if self.evaluation.perplexity else None
        )
        if not self.settings.stream:
            self._save(before, after)
        config = self._config()
        report = self._report(before, after, packing, config)
        room = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.session.release()
        self._measure(report, prompt=min(_PROMPT, (room or _PROMPT * 2) // 2))
        report["seconds"] = time.perf_counter() - self.began
        report["verdict"] = judge(report)
        self._publish(report)
        return report

    def emit(self, event: Event) -> None:
        """Log an event and pass it on; the first process speaks for all."""
        if self.ranks.rank:
            return
        stamped = {"time": _now(), **event}
        with (self.state / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(stamped, ensure_ascii=False) + "\n")
        self.told(event)

    def _claim(self, *, overwrite: bool) -> None:
        """Take the output folder, or say why not, before any work."""
        if self.output.resolve() == Path.cwd():
            # The folder is replaced as a whole: the shell that stands in it would stand in a deleted one.
            raise RunError(f"the output folder {self.output} is the current folder: name another one (-o)")
        if (
            self.output.exists()
            and self.recipe.model
            and self.output.resolve() == Path(self.recipe.model).resolve()
        ):
            raise RunError(
                f"the output folder {self.output} is the model's own folder: choose another one (-o)"
            )
        started = self.state / "run.json"
        if started.is_file() and not self.resume:
            if not overwrite:
                raise RunError(
                    f"{self.state} holds an interrupted run: go on with --resume, "
                    "or start again with --overwrite"
                )
            shutil.rmtree(self.state)
        taken = (self.output / "config.json").exists()
        if taken and not overwrite and not (self.resume and started.is_file()):
            raise RunError(
                f"{self.output} already holds a model: choose another folder (-o), or pass --overwrite"
            )
        if started.is_file():
            if not is_interrupted(self.recipe):
                raise RunError(
                    f"{self.state} is the state of another recipe: repeat the first call with --resume, "
                    "or start again with --overwrite"
                )
        else:
            self.state.mkdir(parents=True, exist_ok=True)
            write_json(started, {"fingerprint": self.recipe.fingerprint(), "recipe": self.recipe.to_dict()})

    def _before(self) -> dict[str, Any] | None:
        if not self.evaluation.perplexity:
            return None
        kept = self.state / "before.json"
        wanted = self.evaluation.model_dump(mode="json")
        if kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["evaluation"] == wanted:
                return found["result"]
        result = steps.measure_perplexity(self.session, self.evaluation)
        write_json(kept, {"evaluation": wanted, "result": result})
        return result

    def _pack(self) -> dict[str, int]:
        """Swap 2:4 linears for packed ones, so that their kernels are what is evaluated; their bytes."""
        if self.settings.format != "packed":
            return {}
        if self.settings.stream:
            return facts.packed_bytes(self.output)
        from lissom.nn import Sparse24Linear, sparsify

        self.emit({"event": "stage", "text": "packing"})
        sparsify(self.session.model)
        layers = [m for m in self.session.model.modules() if isinstance(m, Sparse24Linear)]
        dense = sum(m.in_features * m.out_features * m.weight.element_size() for m in layers)
        meta = sum(m.out_features * -(-m.in_features // 8) for m in layers)
        return {"linears_source_bytes": dense, "linears_output_bytes": dense // 2 + meta}

    def _save(self, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        import lissom

        self.emit({"event": "stage", "text": f"saving to {self.output}"})
        card = {
            "perplexity_before": before["perplexity"] if before else None,
            "perplexity_after": after["perplexity"] if after else None,
            "evaluation_text": Path(after["text"]).name if after else None,
        }
        lissom.save(
            self.session.model,
            self.output,
            format=self.settings.format,
            tokenizer=self.session.tokenizer,
            overwrite=self.overwrite,
            card=card,
            max_shard_size=self.settings.max_shard_size,
        )

    def _config(self) -> Any:
        """The config of the model that was made; a streamed one was never in memory as a whole."""
        if not self.settings.stream:
            return self.session.model.config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.output, local_files_only=True)

    def _report(
        self,
        before: dict[str, Any] | None,
        after: dict[str, Any] | None,
        packing: dict[str, int],
        config: Any,
    ) -> dict[str, Any]:
        import lissom

        made = getattr(config, "lissom", None) or {}
        calibration = made.get("calibration") or {}
        quality = (
            {"text": before["text"], "protocol": before["protocol"], "before": before, "after": after}
            if before
            else None
        )
        return {
            "report_version": REPORT_VERSION,
            "lissom_version": lissom.__version__,
            "created": _now(),
            "model": {
                "source": self.recipe.model,
                "family": config.model_type,
                "dtype": str(config.dtype).removeprefix("torch."),
                "parameters": self.session.prunes[0]["total_parameters"] if self.session.prunes else None,
            },
            "recipe": self.recipe.to_dict(),
            "output": {"dir": str(self.output), "format": self.settings.format},
            "prunes": self.session.prunes,
            "quality": quality,
            "size": packing,
            "speed": None,
            "kernels": None,
            "provenance": {
                "model": self.recipe.model,
                "lissom": lissom.__version__,
                "recipe_fingerprint": self.recipe.fingerprint(),
                "calibration_text": self.recipe.data.source if self.recipe.data else None,
                "calibration_sha256": calibration.get("source_sha256"),
                "calibration_windows": calibration.get("samples"),
                "calibration_seq_len": calibration.get("seq_len"),
                "calibration_seed": calibration.get("seed"),
            },
            "environment": facts.environment(),
        }

    def _measure(self, report: dict[str, Any], *, prompt: int) -> None:
        """What the saved folder is worth on this machine."""
        source = self.session.source
        report["size"] = {
            "source_bytes": facts.weight_file_bytes(source),
            "output_bytes": facts.weight_file_bytes(self.output),
            **report["size"],
        }
        if self.evaluation.tasks:
            report["quality"] = {**(report["quality"] or {}), "tasks": self._tasks(source)}
        if self.settings.format != "packed":
            return
        if self.evaluation.speed and self.settings.stream:
            self._say(
                f"not timed, the model was never in memory: lissom bench generation {self.output} does it"
            )
        elif self.evaluation.speed:
            from lissom.benchmark import generation

            self.emit({"event": "stage", "text": "timing dense against packed"})
            options = generation.GenerationOptions(
                prompt=prompt, threads=self.recipe.threads, dtype=self.recipe.dtype, rounds=3
            )
            report["speed"] = generation.run(
                source, packed=self.output, options=options, on_progress=self._say
            )
        if self.evaluation.kernels:
            report["kernels"] = self._kernels(report["model"]["dtype"])

    def _tasks(self, source: Path) -> dict[str, Any]:
        before = steps.measure_tasks(source, self.evaluation, self.session)
        after = steps.measure_tasks(self.output, self.evaluation, self.session)
        return {
            f"{task}, {metric}": {"before": value, "after": after[task][metric]}
            for task, metrics in before.items()
            for metric, value in metrics.items()
        }

    def _kernels(self, dtype: str) -> dict[str, Any]:
        from lissom.benchmark import machine, sparse24

        self.emit({"event": "stage", "text": "timing the kernels"})
        return {"machine": machine.measure(), "rows": sparse24.run(quick=True, threads=1, dtypes=[dtype])}

    def _say(self, line: str) -> None:
        self.emit({"event": "stage", "text": line})

    def _publish(self, report: dict[str, Any]) -> None:
        """Put recipe, report and log into the output folder; then the state has served."""
        write_text(self.output / "recipe.yaml", self.recipe.to_yaml())
        if self.settings.report:
            write_json(self.output / "lissom-report.json", report)
            write_report(report, self.output / "lissom-report.html")
        self.emit({"event": "done", "output": str(self.output), "seconds": report["seconds"]})
        write_text(self.output / "log.jsonl", (self.state / "log.jsonl").read_text(encoding="utf-8"))
        shutil.rmtree(self.state)


def _run_steps(session: Session) -> list[dict[str, Any]]:
    helps = session.ranks is not None and session.ranks.rank > 0
    return [
        _timed(step.verb, functools.partial(steps.VERBS[step.verb], session, step.settings))
        for step in session.recipe.steps
        if step.prune or not helps
    ]


def _timed(verb: str, work: Callable[[], Any]) -> dict[str, Any]:
    start = time.perf_counter()
    result = work()
    return {"verb": verb, "seconds": time.perf_counter() - start, "result": result}


def _threads(count: int | None) -> contextlib.AbstractContextManager[None]:
    from lissom.benchmark.machine import torch_threads

    return torch_threads(count) if count else contextlib.nullcontext()


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
