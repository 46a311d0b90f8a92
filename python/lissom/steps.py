# SPDX-License-Identifier: Apache-2.0
"""What each step of a recipe does; everything the verbs and `lissom.compress` share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lissom import recipe as recipes
from lissom.recipe import Recipe
from lissom.reporting import facts
from lissom.reporting.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lissom.pruning import PruneReport, Ranks

Event = dict[str, Any]


@dataclass
class Session:
    """A run under way: the recipe, the model once it is loaded, whom to tell, and who helps."""

    recipe: Recipe
    emit: Callable[[Event], None]
    state: Path | None = None
    ranks: Ranks | None = None
    overwrite: bool = False
    prunes: list[dict[str, Any]] = field(default_factory=list)
    _model: PreTrainedModel | None = None
    _tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model that the steps change, loaded on first use."""
        if self._model is None:
            import lissom.hf

            source = self.source
            needed, here = facts.weight_file_bytes(source), facts.memory_bytes()
            if needed > here:
                raise recipes.RecipeError(
                    f"the weights of {source} take {needed / 1e9:.1f} GB, this machine has {here / 1e9:.1f} GB of "
                    "memory: 'lissom prune --stream' keeps one block of a model in memory"
                )
            self.emit({"event": "stage", "text": f"loading {source}"})
            dtype = None if self.recipe.dtype == "auto" else self.recipe.dtype
            self._model = lissom.hf.load_model(source, dtype=dtype)
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        if self._tokenizer is None:
            import lissom.hf

            self._tokenizer = lissom.hf.load_tokenizer(self.source)
        return self._tokenizer

    @property
    def source(self) -> Path:
        """The folder of the recipe's model."""
        if self.recipe.model is None:
            raise recipes.RecipeError(
                "this step needs a model: name a folder with config.json and safetensors weights"
            )
        return facts.model_folder(self.recipe.model)

    @property
    def streams(self) -> bool:
        """Whether the model goes from folder to folder, one block at a time, and is never loaded."""
        return self.recipe.output is not None and self.recipe.output.stream

    def release(self) -> None:
        """Let go of the model, so that its memory can serve the next one."""
        self._model = None


def prune(session: Session, step: recipes.PruneStep) -> dict[str, Any]:
    """Prune the session's model in place, or its folder into the output; `session.state` keeps finished blocks."""
    from lissom.pruning import Ranks

    data = session.recipe.data

    def tell(progress: Any) -> None:
        errors = [layer.relative_error for layer in progress.layers if layer.relative_error is not None]
        session.emit(
            {
                "event": "progress",
                "step": "prune",
                "done": progress.block,
                "of": progress.blocks,
                "name": progress.name,
                "remaining_seconds": progress.remaining,
                "resumed": progress.resumed,
                "relative_error": sum(errors) / len(errors) if errors else None,
            }
        )

    state = session.state / f"prune-{len(session.prunes)}" if session.state else None
    ranks = session.ranks or Ranks()
    settings = _settings(session.recipe, step)
    if step.allocate:
        settings["pattern"] = _allocate(session, step, ranks, state)
    report = _prune(
        session,
        **settings,
        data=_texts(data),
        tokenizer=session.tokenizer if data else None,
        state_dir=state,
        # A run that does not resume has an empty folder; its processes find what another has begun there.
        resume=state is not None,
        ranks=ranks,
        on_progress=tell,
    )
    result = report.to_dict()
    session.prunes.append(result)
    return result


def _prune(session: Session, **arguments: Any) -> PruneReport:
    from lissom.pruning import prune_folder, prune_model

    output = session.recipe.output
    if output is None or not output.stream:
        return prune_model(session.model, **arguments)
    import torch

    name = session.recipe.dtype
    return prune_folder(
        session.source,
        output.dir,
        dtype=None if name == "auto" else getattr(torch, name),
        format=output.format,
        max_shard_size=output.max_shard_size,
        overwrite=session.overwrite,
        spill_dir=session.state if arguments["data"] is not None else None,
        **arguments,
    )


def _settings(recipe: Recipe, step: recipes.PruneStep) -> dict[str, Any]:
    """Fields of `lissom.pruning.Settings` that a recipe decides."""
    same = {"pattern", "method", "damp", "blend", "include", "exclude", "strict", "preserve_mask"}
    given = step.model_dump(include=same)
    if step.permute is not None:
        given["permute"] = step.permute
    if recipe.data is not None:
        given |= recipe.data.model_dump(include={"samples", "seq_len", "seed"})
    return {**given, "options": step.options, "reconstruct": step.reconstruction}


def _allocate(session: Session, step: recipes.PruneStep, ranks: Ranks, state: Path | None) -> dict[str, str]:
    """The pattern of each layer, as the first process finds it or an interrupted run has found it."""
    from lissom.pruning.allocate_model import allocate_model

    assert step.allocate is not None
    kept = state / "patterns.json" if state else None
    found: dict[str, str] = {}
    with ranks.section("choosing patterns"):
        if ranks.rank == 0 and kept is not None and kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
        elif ranks.rank == 0:
            session.emit({"event": "stage", "text": "choosing the pattern of each layer"})
            settings = _settings(session.recipe, step)
            found = allocate_model(
                session.model,
                step.allocate.allocation,
                data=_texts(session.recipe.data),
                tokenizer=session.tokenizer,
                **{name: settings[name] for name in ("samples", "seq_len", "seed", "include", "exclude")},
            ).to_dict()
            if kept is not None:
                write_json(kept, found)
    chosen: dict[str, str] = ranks.gather_objects(found)[0]
    return chosen


def evaluate(session: Session, step: recipes.EvalStep) -> dict[str, Any]:
    """Perplexity of the session's model, tasks of its folder."""
    result: dict[str, Any] = {}
    if step.perplexity is None and not step.tasks:
        raise recipes.RecipeError(
            "nothing to evaluate: name a text (--perplexity FILE) or tasks (--task NAME)"
        )
    if step.perplexity is not None:
        result.update(measure_perplexity(session, step))
    if step.tasks:
        result["tasks"] = measure_tasks(session.source, step, session)
    return result


def measure_perplexity(session: Session, step: recipes.EvalStep) -> dict[str, Any]:
    """Perplexity of the session's model as it is now, with its protocol in words."""
    from lissom.evaluation import perplexity

    text = Path(str(step.perplexity))
    if not text.is_file():
        raise FileNotFoundError(f"there is no text file {text}: name a .txt or .jsonl file")
    session.emit({"event": "stage", "text": f"perplexity on {text.name}"})
    found = perplexity(
        session.model, session.tokenizer, text, windows=step.windows, seq_len=step.seq_len, stride=step.stride
    )
    return {**found.to_dict(), "text": str(text), "protocol": protocol(step)}


def protocol(step: recipes.EvalStep) -> str:
    """How perplexity was measured, in words.

    Example:
        >>> protocol(recipes.EvalStep(perplexity="t.txt"))
        '8 windows of 1024 tokens'
    """
    if step.stride:
        return f"sliding window of {step.seq_len} tokens, stride {step.stride}, whole text"
    return f"{step.windows} windows of {step.seq_len} tokens"


def measure_tasks(folder: Path, step: recipes.EvalStep, session: Session) -> dict[str, Any]:
    """lm-eval scores of a model folder."""
    from lissom.evaluation.harness import evaluate_tasks

    session.emit({"event": "stage", "text": f"tasks {', '.join(step.tasks)} on {folder.name}"})
    return evaluate_tasks(folder, step.tasks, limit=step.limit, dtype=session.recipe.dtype)


def generate(session: Session, step: recipes.GenerateStep) -> dict[str, Any]:
    """Continue a prompt; each piece of text is told as it comes."""
    import torch

    model: Any = session.model
    tokenizer = session.tokenizer
    prompt: Any = step.prompt
    if step.chat:
        if not tokenizer.chat_template:
            raise ValueError(f"{session.recipe.model} has no chat template: leave --chat out")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": step.prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not step.chat)
    torch.manual_seed(step.seed)
    sampling = (
        {"do_sample": True, "temperature": step.temperature} if step.temperature else {"do_sample": False}
    )
    streamer = _streamer(tokenizer, session.emit)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=step.max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - start
    length = inputs["input_ids"].shape[1]
    new = output.shape[1] - length
    return {
        "prompt": step.prompt,
        "text": tokenizer.decode(output[0, length:], skip_special_tokens=True),
        "prompt_tokens": length,
        "new_tokens": new,
        "seconds": seconds,
        "tokens_per_s": new / seconds,
    }


def bench(
    session: Session,
    step: recipes.Sparse24Bench | recipes.TuneBench | recipes.GenerationBench | recipes.PredictBench,
) -> Any:
    """Time kernels, or a whole model; or predict on paper."""
    threads = session.recipe.threads

    def say(line: str) -> None:
        session.emit({"event": "stage", "text": line})

    if isinstance(step, recipes.TuneBench):
        from lissom.benchmark import sparse24

        return sparse24.tune(threads=threads or 1)
    if isinstance(step, recipes.Sparse24Bench):
        from lissom.benchmark import sparse24

        say("timing the 2:4 linear against dense")
        asked: dict[str, Any] = {"quick": step.quick, "threads": threads, "dtypes": step.dtypes}
        if step.rows:
            asked["tokens"] = step.rows
        return sparse24.run_capped(step.isa, **asked) if step.isa else sparse24.run(**asked)
    if isinstance(step, recipes.PredictBench):
        return _predict(step)
    from lissom.benchmark import generation

    options = generation.GenerationOptions(
        prompt=step.prompt,
        new_tokens=step.new_tokens,
        rounds=step.rounds,
        threads=threads,
        compiled=step.compiled,
        dtype=session.recipe.dtype,
        memory=step.memory,
    )
    model = step.shape or session.source
    return generation.run(model, packed=step.packed, options=options, on_progress=say)


def _predict(step: recipes.PredictBench) -> dict[str, Any]:
    from lissom.benchmark import predict

    asked: dict[str, Any] = {"gpu": step.gpu, "dtypes": step.dtypes}
    if step.rows:
        asked["rows"] = step.rows
    if step.shapes:
        asked["shapes"] = [tuple(int(size) for size in shape.split("x")) for shape in step.shapes]
    return predict.run(**asked)


def info(session: Session, step: recipes.InfoStep) -> dict[str, Any]:
    """Versions, CPU, kernels."""
    return facts.environment()


def inspect(session: Session, step: recipes.InspectStep) -> dict[str, Any]:
    """Blocks and linears, and what pruning could touch."""
    return facts.inventory(session.source, pattern=step.pattern, include=step.include, exclude=step.exclude)


def report(session: Session, step: recipes.ReportStep) -> dict[str, Any]:
    """Render a folder's lissom-report.json again."""
    from lissom.reporting import write_report

    source = Path(step.source)
    file = source / "lissom-report.json" if source.is_dir() else source
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no report {file}: name a folder that lissom wrote, or its lissom-report.json"
        )
    page = write_report(json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".html"))
    return {"source": str(file), "page": str(page)}


VERBS: dict[str, Callable[[Session, Any], Any]] = {
    "prune": prune,
    "eval": evaluate,
    "generate": generate,
    "bench": bench,
    "info": info,
    "inspect": inspect,
    "report": report,
}


def plan(recipe: Recipe, verb: str, settings: Any) -> dict[str, Any]:
    """What a step would need, and touch; no weight is read.

    Args:
        recipe: whose step it is.
        verb: of the step.
        settings: of the step.

    Returns:
        `peak_bytes` and `estimated_seconds`; of a prune the rest of its `PrunePlan`.
    """
    if verb == "prune":
        from lissom.pruning import plan_prune

        skeleton = facts.skeleton(recipe.model or "", dtype=recipe.dtype)
        given = {**_settings(recipe, settings), "data": recipe.data.source if recipe.data else None}
        if recipe.output and recipe.output.stream:
            spill = f"{recipe.output.dir}.lissom-state" if recipe.data else None
            return plan_prune(skeleton, streamed=True, spill_dir=spill, **given).to_dict()
        if not settings.allocate:
            return plan_prune(skeleton, **given).to_dict()
        # What will be chosen is not known: at most every layer that can be pruned, with the first pattern.
        tried = [option for option in settings.allocate.patterns if option != "dense"]
        planned = plan_prune(skeleton, **given | {"pattern": tried[0], "strict": False})
        measuring = {
            "pattern": tried[0],
            "method": "wanda",
            "options": replace(settings.options, variant=None, act_order=False),
            "blend": 0.0,
            "reconstruct": None,
            "strict": False,
        }
        trial = plan_prune(skeleton, **given | measuring).estimated_seconds
        return {**planned.to_dict(), "estimated_seconds": planned.estimated_seconds + len(tried) * trial}
    if verb in ("eval", "generate") or (verb == "bench" and recipe.model):
        net: Any = facts.skeleton(recipe.model or "", dtype=recipe.dtype)
        size = sum(p.numel() * p.element_size() for p in net.parameters())
        count = sum(p.numel() for p in net.parameters())
        dtype = next(net.parameters()).dtype
        vocabulary = net.config.get_text_config().vocab_size
        tokens, rows, runs = {
            "eval": lambda: (settings.windows * settings.seq_len, settings.seq_len, 1),
            "generate": lambda: (settings.max_new_tokens, 1, 1),
            # Three variants, warmed up once; a decoded token costs about ten of a prompt.
            "bench": lambda: (settings.prompt + 10 * settings.new_tokens, 1, 3 * (settings.rounds + 1)),
        }[verb]()
        return {
            "peak_bytes": size * (3 if verb == "bench" else 1) + 8 * rows * vocabulary,
            "estimated_seconds": runs * tokens * 2 * count / facts.matmul_rate(dtype),
        }
    return {"peak_bytes": 0, "estimated_seconds": 0.0}


def check_texts(recipe: Recipe) -> None:
    """Find the recipe's texts before any work is done.

    Raises:
        FileNotFoundError: one is missing.
    """
    wanted = [("calibration text", recipe.data.source, "--data")] if recipe.data else []
    if recipe.evaluate and recipe.evaluate.perplexity:
        wanted.append(("evaluation text", recipe.evaluate.perplexity, "--eval-text"))
    for what, path, flag in wanted:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no {what} {path}: name a .txt or .jsonl file ({flag} FILE)")


def _texts(data: recipes.DataSpec | None) -> Any:
    if data is None:
        return None
    from lissom.evaluation.data import read_texts

    path = Path(data.source)
    return path if data.field == "text" else read_texts(path, field=data.field)[0]


def _streamer(tokenizer: Any, emit: Callable[[Event], None]) -> Any:
    from transformers import TextStreamer

    class Teller(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit({"event": "text", "text": text, "end": stream_end})

    return Teller(tokenizer, skip_prompt=True, skip_special_tokens=True)
