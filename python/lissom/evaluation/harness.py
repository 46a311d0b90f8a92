# SPDX-License-Identifier: Apache-2.0
"""Benchmark tasks by EleutherAI's lm-evaluation-harness, an optional extra."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath


def evaluate_tasks(
    model_dir: str | PathLike[str],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "cpu",
    include_path: str | PathLike[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Score a saved model on lm-eval tasks; packed folders load like any other.

    Args:
        model_dir: folder that `AutoModelForCausalLM.from_pretrained` reads.
        tasks: task names.
        limit: examples per task; None for all.
        num_fewshot: examples in the prompt; None for the task's own number.
        batch_size: requests per forward pass.
        dtype: of the weights, as transformers names it.
        device: where the model runs.
        include_path: folder with further task files.

    Returns:
        For each task its metrics by name, such as {"arc_easy": {"acc,none": 0.41}}.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: no task is named, or one is not known.
    """
    if not tasks:
        raise ValueError("name at least one task, such as 'arc_easy'")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("lm_eval"):
            raise
        raise ModuleNotFoundError(
            "evaluating tasks needs lm-eval, which is not installed: pip install 'lissom[eval]'",
            name=error.name,
        ) from error
    manager = TaskManager(include_path=None if include_path is None else fspath(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": fspath(model_dir), "dtype": dtype, "trust_remote_code": False},
        tasks=list(tasks),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        task_manager=manager,
    )
    # Metrics are named "acc,none" (metric, filter); other entries are aliases and counts.
    return {
        task: {name: float(value) for name, value in metrics.items() if "," in name and value != "N/A"}
        for task, metrics in found["results"].items()
    }
