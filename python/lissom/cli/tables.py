# SPDX-License-Identifier: Apache-2.0
"""Results as rich tables; names from models and files are printed without markup."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lissom.reporting.wording import (
    byte_text,
    duration_text,
    prune_text,
    ratio_text,
    thread_text,
    training_text,
)

_CONTENDERS = {
    "dense": "dense",
    "onednn": "dense, oneDNN",
    "compiled": "dense, compiled",
    "packed": "2:4 packed",
}


def table(*heads: str, title: str | None = None) -> Table:
    """An empty table; columns after the first are right-aligned."""
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for index, head in enumerate(heads):
        made.add_column(head, justify="left" if index == 0 else "right", no_wrap=True)
    return made


def pairs_view(console: Console, values: dict[str, Any]) -> None:
    """Two columns: name, value."""
    made = Table.grid(padding=(0, 3))
    for name, value in values.items():
        if value is not None:
            made.add_row(Text(name, style="dim"), Text(str(value)))
    console.print(made)


def info_view(console: Console, value: dict[str, Any]) -> None:
    """`lissom info`."""
    pairs_view(
        console,
        {
            "lissom": value["lissom"],
            "python": value["python"],
            **value["packages"],
            "cpu": f"{value['cpu']} ({value['core']}{'' if value['core_measured'] else ', not measured'})",
            "instruction sets": f"{value['isa']} in use, {value['detected_isa']} detected",
            "cores, threads": f"{value['cores']}, {value['threads']}",
            "memory": byte_text(value["memory_bytes"]),
            "gpu": value["gpu"] or "none",
            "cuda kernels": _cuda_text(value["cuda"]),
            "build": ", ".join(f"{k} {v}" for k, v in value["build"].items()),
            **{name: setting or "not set" for name, setting in value["settings"].items()},
        },
    )
    for family, kernels in value["kernels"].items():
        rows = sorted({int(row) for by_rows in kernels.values() for row in by_rows})
        made = table("dtype", *[f"M >= {row}" for row in rows], title=f"{family}: kernel by rows of x")
        for dtype, by_rows in kernels.items():
            paths = {int(row): path for row, path in by_rows.items()}
            made.add_row(dtype, *[str(paths.get(row, "")) for row in rows])
        console.print()
        console.print(made)


def _cuda_text(cuda: dict[str, Any]) -> str:
    if not cuda["architectures"]:
        return "none in this build"
    made = f"{', '.join(cuda['architectures'])} (CUDA {cuda['toolkit']})"
    return (
        f"{made}; no device: {cuda['trouble']}" if cuda["trouble"] else f"{made}; {cuda['devices']} devices"
    )


def inspect_view(console: Console, value: dict[str, Any]) -> None:
    """`lissom inspect`."""
    prune = value["prune"]
    made_by = value["made_by"]
    pairs_view(
        console,
        {
            "model": value["model"],
            "family": value["family"],
            "dtype": value["dtype"],
            "blocks": value["blocks"],
            "parameters": f"{value['parameters']:,}",
            "weight files": byte_text(value["file_bytes"]),
            "format": "2:4 packed by lissom" if value["packed"] else value["quantization"] or "dense",
            "made by": f"lissom {made_by.get('version')}, {made_by.get('method')} {made_by.get('pattern')}"
            if made_by
            else None,
        },
    )
    made = table("linear", "shape", "count", "parameters")
    for row in value["linears"]:
        made.add_row(
            Text(row["kind"]), "×".join(map(str, row["shape"])), str(row["count"]), f"{row['parameters']:,}"
        )
    console.print(made)
    line = (
        f"prune {prune['pattern']} would touch {len(prune['touched'])} linears, "
        f"{prune['touched_share']:.0%} of the parameters"
    )
    if prune["packed_bytes"]:
        line += f": {byte_text(prune['dense_bytes'])} become {byte_text(prune['packed_bytes'])}"
    console.print(line)
    _left(console, prune["left"])


def plan_view(console: Console, value: dict[str, Any]) -> None:
    """`--dry-run`."""
    for step in value["steps"]:
        need, time = byte_text(step["peak_bytes"]), duration_text(step["estimated_seconds"])
        line = f"{step['verb']}: peak memory {need}, about {time}"
        if "touched" in step:
            line += f"; touches {len(step['touched'])} linears, {step['touched_share']:.1%} of the parameters"
        console.print(line)
        _left(console, step.get("left", {}))
    console.print(
        f"in all about {duration_text(value['estimated_seconds'])} (timing of speed and kernels not counted)"
    )
    if value["peak_bytes"] > value["memory_bytes"]:
        console.print(
            f"that is more than the {byte_text(value['memory_bytes'])} of memory here: --stream keeps one block of "
            "the model in it, fewer --samples need less",
            style="yellow",
        )
    for path in value["writes"]:
        console.print(f"would write {path}", style="dim", markup=False)


def eval_view(console: Console, value: dict[str, Any]) -> None:
    """`lissom eval`."""
    if "perplexity" in value:
        pairs_view(
            console,
            {
                "perplexity": f"{value['perplexity']:.3f}",
                "bits per byte": f"{value['bits_per_byte']:.4f}",
                "nats per token": f"{value['nats_per_token']:.4f}",
                "scored tokens": f"{value['tokens']:,}",
                "protocol": value["protocol"],
                "time": duration_text(value["seconds"]),
            },
        )
    if "tasks" in value:
        made = table("task", "metric", "value")
        for task, metrics in value["tasks"].items():
            for metric, number in metrics.items():
                made.add_row(task, metric, f"{number:.4f}")
        console.print(made)


def generate_view(console: Console, value: dict[str, Any]) -> None:
    """`lissom generate`: the text has been printed as it came."""
    Console(stderr=True).print(
        f"{value['new_tokens']} tokens, {value['tokens_per_s']:.1f} tokens/s", style="dim"
    )


def sparse24_view(console: Console, rows: list[dict[str, Any]]) -> None:
    """`lissom bench sparse24`."""
    from lissom.benchmark.sparse24 import geomean_ratios

    heads = (
        "dtype",
        "M",
        "N",
        "K",
        "2:4 µs",
        "dense µs",
        "best dense",
        "ratio",
        "GFLOP/s",
        "GB/s",
        "of roofline",
    )
    made = table(*heads, title=f"{thread_text(rows[0]['threads'])}")
    for row in rows:
        peer = min(row["peers"], key=row["peers"].__getitem__)
        shape = (str(row[name]) for name in "MNK")
        times = f"{row['ours_us']:,.0f}", f"{row['peers'][peer]:,.0f}", peer, ratio_text(row["ratio_best"])
        rates = f"{row['gflops']:.0f}", f"{row['gbps']:.1f}", f"{row['roofline_share']:.0%}"
        made.add_row(row["dtype"], *shape, *times, *rates)
    console.print(made)
    for (dtype, m), ratio in geomean_ratios(rows).items():
        console.print(f"{dtype}, M = {m}: {ratio_text(ratio)} the best dense kernel (geometric mean)")


def predict_view(console: Console, value: dict[str, Any]) -> None:
    """`lissom bench predict`."""
    heads = ("dtype", "M", "N × K", "kernel", "moved", "µs", "bound", "share", "no launch", "dense")
    made = table(*heads, title=f"{value['gpu']}: {value['note']}")
    for row in value["rows"]:
        tile = "gemv" if row["tile"] is None else "×".join(map(str, row["tile"]))
        parts = f", k in {row['splits']}" if row["splits"] > 1 else ""
        made.add_row(
            row["dtype"],
            str(row["M"]),
            f"{row['N']} × {row['K']}",
            tile + parts,
            byte_text(row["bytes_moved"]),
            f"{row['us']:,.1f}",
            row["bound"].removesuffix(" cores"),
            f"{row['bound_share']:.0%}",
            f"{row['bound_us'] / (row['us'] - row['launch_us']):.0%}",
            ratio_text(row["ratio"]),
        )
    console.print(made)
    console.print(
        "kernel: tile as rows of W × rows of x, and into how many parts k is cut. share: of the tighter bound, "
        "memory or tensor cores, with the launch and without (a captured graph hides most of it).\n"
        "dense: predicted gain over dense bfloat16 at its own bound, without launch. "
        f"All of it is {value['note']}.",
        style="dim",
        markup=False,
    )


def tune_view(console: Console, value: dict[str, Any]) -> None:
    """`lissom bench tune`."""
    made = table("dtype", "M", "permuted µs", "lanes µs")
    for row in value["rows"]:
        made.add_row(row["dtype"], str(row["M"]), f"{row['permuted_us']:,.0f}", f"{row['lanes_us']:,.0f}")
    console.print(made)
    for dtype, least in value["from"].items():
        console.print(f"{dtype}: " + (f"lanes from M = {least}" if least else "permuted at every M"))


def generation_view(console: Console, value: dict[str, Any]) -> None:
    """`lissom bench generation`."""
    made = table("", "prefill", "decode", "ms/token", "linears", "lm_head", "attention", "other")
    for row in value["variants"]:
        shares = row["decode_shares"]
        made.add_row(
            _CONTENDERS[row["name"]],
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.2f}",
            f"{1e3 * row['decode_seconds']:.1f}",
            *[
                f"{shares[part]:.0%}" if shares else ""
                for part in ("linears", "lm_head", "attention", "other")
            ],
        )
    console.print(made)
    console.print("prefill and decode in tokens/s, the rest as shares of a decode step", style="dim")
    for phase in ("decode", "prefill"):
        parts = value["attribution"][phase]
        console.print(
            f"{phase}: {ratio_text(parts['total'])} transformers as it comes = "
            f"{ratio_text(parts['peer_weakness'])} dense peer's weakness × "
            f"{ratio_text(parts['sparsity'])} by 2:4"
        )
    for row in value["variants"]:
        if row["memory"]:
            console.print(
                f"{_CONTENDERS[row['name']]}: {byte_text(row['memory']['file_bytes'])} on disk, peak memory "
                f"{byte_text(row['memory']['running_peak_bytes'])} running, "
                f"{byte_text(row['memory']['loading_peak_bytes'])} loading"
            )


def report_view(console: Console, report: dict[str, Any]) -> None:
    """What a run that saved has to show."""
    made = table("", "before", "after", "")
    size, speed, quality = report["size"], report.get("speed"), report.get("quality") or {}
    made.add_row(
        "weight files",
        byte_text(size["source_bytes"]),
        byte_text(size["output_bytes"]),
        f"{size['output_bytes'] / size['source_bytes']:.2f} of it",
    )
    if speed:
        rows = {row["name"]: row for row in speed["variants"]}
        for phase in ("decode", "prefill"):
            key, parts = f"{phase}_tokens_per_s", speed["attribution"][phase]
            made.add_row(
                f"{phase}, tokens/s",
                f"{rows['dense'][key]:.1f}",
                f"{rows['packed'][key]:.1f}",
                f"{ratio_text(parts['total'])}; {ratio_text(parts['sparsity'])} best dense",
            )
    if quality.get("before") and quality.get("after"):
        before, after = quality["before"], quality["after"]
        made.add_row(
            "perplexity",
            f"{before['perplexity']:.2f}",
            f"{after['perplexity']:.2f}",
            ratio_text(after["perplexity"] / before["perplexity"]),
        )
    console.print(made)
    for prune in report["prunes"]:
        _prune_lines(console, prune)
    verdict = report["verdict"]
    console.print(verdict["headline"], style="bold", markup=False)
    for sign, texts in (("+", verdict["gains"]), ("-", verdict["costs"]), ("?", verdict["unknown"])):
        for text in texts:
            console.print(f"{sign} {text}", markup=False)
    console.print(f"model   {report['output']['dir']}", markup=False, soft_wrap=True)
    if report["recipe"]["output"].get("report", True):
        console.print(f"report  {report['output']['dir']}/lissom-report.html", markup=False, soft_wrap=True)


def _prune_lines(console: Console, prune: dict[str, Any]) -> None:
    console.print(prune_text(prune), markup=False)
    if prune["blend"]:
        console.print(f"targets: {prune['blend']:.0%} the dense model's outputs", style="dim")
    if prune["permuted"]:
        console.print("channels were put in an order that suits the pattern", style="dim")
    trained = training_text(prune)
    if trained:
        console.print(trained, style="dim", markup=False)


def results_view(console: Console, results: Any) -> None:
    """Results of a recipe without output: each step as its verb shows it."""
    views = {"info": info_view, "inspect": inspect_view, "eval": eval_view, "generate": generate_view}
    for result in results if isinstance(results, list) else [results]:
        view = views.get(result.get("verb", ""), lambda console, value: console.print_json(data=value))
        view(console, result.get("result", result))


def _left(console: Console, left: dict[str, str]) -> None:
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        shown = names[0] if len(names) == 1 else f"{len(names)} linears such as {names[0]}"
        console.print(f"left: {shown}: {reason}", style="dim", markup=False)
