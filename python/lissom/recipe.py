# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a run does, as data that pydantic has checked."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from lissom.recipe_parts import (
    AllocateSpec,
    DataSpec,
    EvalStep,
    Evaluation,
    GenerateStep,
    GenerationBench,
    InfoStep,
    InspectStep,
    PredictBench,
    PruneStep,
    ReconstructSpec,
    ReportStep,
    Sparse24Bench,
    Strict,
    TuneBench,
)

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


class RecipeError(ValueError):
    """A recipe that cannot be run as it is written; the message names the place and what to write instead."""


class Step(Strict):
    """One step: exactly one of the verbs, with its settings."""

    prune: PruneStep | None = None
    eval: EvalStep | None = None
    generate: GenerateStep | None = None
    bench: Sparse24Bench | TuneBench | GenerationBench | PredictBench | None = Field(
        default=None, discriminator="kind"
    )
    info: InfoStep | None = None
    inspect: InspectStep | None = None
    report: ReportStep | None = None

    @model_validator(mode="after")
    def _one_verb(self) -> Step:
        if len(self.model_fields_set) != 1 or getattr(self, self.verb) is None:
            raise ValueError(
                f"a step is one verb with its settings, such as '- prune: {{method: wanda}}'; "
                f"got {sorted(self.model_fields_set) or 'nothing'}"
            )
        return self

    @property
    def verb(self) -> str:
        """Name of the verb that this step sets."""
        return next(iter(self.model_fields_set), "prune")

    @property
    def settings(self) -> Strict:
        """Settings of that verb."""
        return getattr(self, self.verb)


class Output(Strict):
    """Where the model, the report and the log go."""

    dir: str
    format: Literal["packed", "dense"] = "packed"
    max_shard_size: str = "5GB"
    report: bool = True
    stream: bool = False


class Recipe(Strict):
    """Everything that decides a run's result."""

    model: str | None = None
    dtype: DTypeName = "auto"
    threads: int | None = Field(default=None, ge=1)
    data: DataSpec | None = None
    steps: list[Step] = Field(default=[])
    evaluate: Evaluation | None = None
    output: Output | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        verbs = [step.verb for step in self.steps]
        if self.model is None and (self.evaluate or {"prune", "eval", "generate", "inspect"} & set(verbs)):
            raise ValueError("model is missing: name a folder with config.json and safetensors weights")
        if "prune" in verbs and self.output is None:
            raise ValueError(
                "output is missing: a recipe that prunes needs 'output: {dir: FOLDER}' (-o FOLDER)"
            )
        for step in self.steps:
            misfit = step.prune.unpackable() if step.prune else None
            if misfit and self.output and self.output.format == "packed":
                raise ValueError(
                    f"output.format 'packed' holds at most two of every four weights, as pattern '2:4' leaves them, "
                    f"got {misfit}: prune to 2:4, or write 'dense' (--format dense), which gains neither size nor speed"
                )
        for step in self.steps:
            reader = step.prune and step.prune.data_reader
            if reader and self.data is None:
                raise ValueError(
                    f"data is missing: {reader} needs calibration text, 'data: {{source: FILE}}' (--data FILE)"
                )
        misfit = self._unstreamable() if self.output and self.output.stream else None
        if misfit:
            raise ValueError(f"output.stream (--stream) keeps one block of the model in memory: {misfit}")
        return self

    def _unstreamable(self) -> str | None:
        """What of the recipe needs the whole model in memory, and what to do about it."""
        step = self.steps[0].prune if len(self.steps) == 1 else None
        if step is None:
            return "its recipe is one prune step and no other"
        if step.permute:
            return "permute orders the channels of the whole model; leave it out"
        if step.allocate:
            return "allocate measures the whole model; give a pattern"
        if self.evaluate and (self.evaluate.perplexity or self.evaluate.tasks):
            return "perplexity and tasks need the whole model; run 'lissom eval' on the result where it fits"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values; reading it again gives an equal recipe."""
        out = self.model_dump(mode="json", exclude={"steps"}, exclude_none=True)
        out["steps"] = [{s.verb: s.settings.model_dump(mode="json", exclude_none=True)} for s in self.steps]
        order = [name for name in Recipe.model_fields if name in out]
        return {name: out[name] for name in order}

    def to_yaml(self) -> str:
        """The recipe as YAML text that `read_recipe` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def fingerprint(self) -> str:
        """sha256 over all that decides the saved weights, not where they go or how they are measured."""
        decisive = {k: v for k, v in self.to_dict().items() if k in ("model", "dtype", "data", "steps")}
        # Keys are not sorted: the order of a pattern map decides.
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """Safe YAML without base-60 integers (YAML 1.1 reads `2:4` as 124)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:int"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")
)


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a YAML recipe file.

    Args:
        path: the file; relative paths inside it are taken from the current directory.

    Returns:
        The checked recipe, defaults filled in.

    Raises:
        RecipeError: not YAML, a key twice, an unknown key (the nearest one is named), a bad value; with the
            line.
    """
    path = Path(path)
    return parse_recipe(path.read_text(encoding="utf-8"), name=path.name)


def parse_recipe(text: str, *, name: str = "recipe") -> Recipe:
    """Check a recipe given as YAML text.

    Args:
        text: the YAML document.
        name: what error messages call it.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: see `read_recipe`.

    Example:
        >>> parse_recipe("{model: m, steps: [inspect: {}]}").steps[0].verb
        'inspect'
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{name}{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"{name}: a recipe is a mapping with keys {', '.join(Recipe.model_fields)}; "
            f"got {type(values).__name__}"
        )
    _reject_repeated_keys(node, name)
    return build_recipe(values, name=name, node=node)


def build_recipe(values: dict[str, Any], *, name: str = "recipe", node: yaml.Node | None = None) -> Recipe:
    """Check a recipe given as plain values.

    Args:
        values: what the YAML document would hold.
        name: what error messages call it.
        node: the YAML tree of `values`, for line numbers.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: see `read_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, values, name, node)) from error


def _explain(error: ValidationError, values: dict[str, Any], name: str, node: yaml.Node | None) -> str:
    # An unknown key often makes other checks fail too: it is the one to name.
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    loc = tuple(part for part in problem["loc"] if part not in _BENCHES)
    line = _line_of(node, loc)
    place = f"{name}, line {line}" if line else name
    if problem["type"] == "extra_forbidden":
        *parent, key = loc
        known = _keys_at(tuple(parent), values)
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        return f"{place}: {_spell(parent) or 'the recipe'} has no key {key!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}: {_spell(loc) + ': ' if loc else ''}{message}{more}"


def _spell(loc: tuple | list) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _keys_at(loc: tuple, values: Any) -> list[str]:
    """Keys that a mapping at `loc` may have."""
    if not loc:
        return list(Recipe.model_fields)
    if loc[0] == "steps" and len(loc) == 2:
        return list(Step.model_fields)
    if loc[0] == "steps":
        if loc[2] == "bench":
            kind = values["steps"][loc[1]]["bench"].get("kind", "sparse24")
            return list(_BENCHES[kind].model_fields)
        model = _SETTINGS[str(loc[3] if len(loc) > 3 else loc[2])]
    else:
        model = _SECTIONS[str(loc[0])]
    return list(model.model_fields)


_SETTINGS: dict[str, type[Strict]] = {
    "prune": PruneStep,
    "allocate": AllocateSpec,
    "reconstruct": ReconstructSpec,
    "eval": EvalStep,
    "generate": GenerateStep,
    "info": InfoStep,
    "inspect": InspectStep,
    "report": ReportStep,
}
_BENCHES: dict[str, type[Strict]] = {
    "sparse24": Sparse24Bench,
    "tune": TuneBench,
    "generation": GenerationBench,
    "predict": PredictBench,
}
_SECTIONS: dict[str, type[Strict]] = {"data": DataSpec, "evaluate": Evaluation, "output": Output}


def _line_of(node: yaml.Node | None, loc: tuple) -> int | None:
    """Line (from 1) of the deepest key of `loc` that the document has."""
    line = None
    for part in loc:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, found = key.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line = found.start_mark.line + 1
        if found is None:
            break
        node = found
    return line


def _reject_repeated_keys(node: yaml.Node | None, name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            if key.value in seen:
                raise RecipeError(
                    f"{name}, line {key.start_mark.line + 1}: key {key.value!r} is there twice; keep one"
                )
            seen.add(key.value)
            _reject_repeated_keys(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _reject_repeated_keys(value, name)
