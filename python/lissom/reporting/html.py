# SPDX-License-Identifier: Apache-2.0
"""The report page: one HTML file without scripts, fonts or anything else from outside."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lissom.reporting import chart
from lissom.reporting.files import write_text
from lissom.reporting.markup import Markup, element
from lissom.reporting.roofline import byte_ratio, kernel_points
from lissom.reporting.verdict import byte_text, judge, quality_word, ratio_text

Facts = dict[str, Any]
_METHODS = {"sparsegpt": "SparseGPT", "wanda": "Wanda"}
_TONES = {"dense": "dense", "onednn": "peer", "compiled": "peer", "packed": "packed"}
_PARTS = (("linears", "linears", "packed"), ("lm_head", "output matrix", "sky"), ("attention", "attention", "amber"),
          ("other", "norms, activations, Python", "dense"))


def write_report(report: Facts, path: str | Path) -> Path:
    """Render a report and write it, whole or not at all.

    Args:
        report: contents of lissom-report.json.
        path: the HTML file.

    Returns:
        The path written.
    """
    return write_text(path, render_report(report))


def render_report(report: Facts) -> str:
    """The report as one self-contained HTML document.

    Args:
        report: contents of lissom-report.json; sections whose facts are missing are left out.

    Returns:
        The document; every text from outside is escaped.

    Example:
        >>> "&lt;b&gt;" in render_report({"model": {"source": "<b>"}})
        True
    """
    name = _model_name(report)
    style = importlib.resources.files("lissom.reporting").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # Nothing may be loaded or run, whatever a model's name contains.
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("title", f"{name}: lissom report"),
        element("style", Markup(style)),
    )
    sections = [_size(report), _speed(report), _quality(report), _layers(report), _kernels(report), _details(report)]
    body = element("body", element("main", _top(report, name), *sections), _foot(report))
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def _model_name(report: Facts) -> str:
    return Path(str(report.get("model", {}).get("source", "model"))).name or "model"


def _top(report: Facts, name: str) -> Markup:
    verdict = report.get("verdict") or judge(report)
    notes = [element("li", text, class_=kind) for kind, texts in
             (("gain", verdict["gains"]), ("cost", verdict["costs"]), ("unknown", verdict["unknown"])) for text in texts]
    return element(
        "header",
        element("p", "lissom report", Markup(" &middot; "), str(report.get("created", ""))[:10], class_="eyebrow"),
        element("h1", name),
        element("p", _deed(report), class_="deed"),
        element("p", verdict["headline"], class_="headline nothing" if verdict["nothing_gained"] else "headline"),
        _tiles(report),
        element("ul", *notes, class_="notes") if notes else None,
    )


def _deed(report: Facts) -> str:
    """What was done, in one line."""
    parts = []
    for prune in report.get("prunes", []):
        share = prune["touched_parameters"] / max(prune["total_parameters"], 1)
        parts.append(f"{prune['pattern']} by {_METHODS.get(prune['method'], prune['method'])}: {len(prune['layers'])} layers, {share:.0%} of the parameters")
    if report.get("output", {}).get("format"):
        parts.append(f"saved {report['output']['format']}")
    if report.get("seconds"):
        parts.append(f"in {_duration(report['seconds'])}")
    return ", ".join(parts)


def _tiles(report: Facts) -> Markup | None:
    tiles = []
    size, speed, quality = report.get("size"), report.get("speed"), report.get("quality") or {}
    if size:
        tiles.append(("Files", f"−{1 - size['output_bytes'] / size['source_bytes']:.0%}"
                      if size["output_bytes"] < size["source_bytes"] else "±0%",
                      f"{byte_text(size['source_bytes'])} → {byte_text(size['output_bytes'])}"))
    for phase, label in (("decode", "Decode"), ("prefill", "Prefill")):
        if speed:
            rows = {row["name"]: row for row in speed["variants"]}
            key = f"{phase}_tokens_per_s"
            tiles.append((label, ratio_text(speed["attribution"][phase]["total"]),
                          f"{_rate(rows['dense'][key])} → {_rate(rows['packed'][key])} tokens/s"))
    if quality.get("before") and quality.get("after"):
        before, after = quality["before"]["perplexity"], quality["after"]["perplexity"]
        tiles.append(("Perplexity", ratio_text(after / before), f"{before:.1f} → {after:.1f}, lower is better"))
    if not tiles:
        return None
    return element("dl", [element("div", element("dt", label), element("dd", number, class_="number"),
                                  element("dd", note)) for label, number, note in tiles], class_="tiles")


def _size(report: Facts) -> Markup | None:
    size = report.get("size")
    if not size:
        return None
    rows = [("before", size["source_bytes"], size.get("linears_source_bytes", 0)),
            (f"after, {report['output']['format']}", size["output_bytes"], size.get("linears_output_bytes", 0))]
    data = [chart.Stack(label, (("pruned linears", linears, "packed"), ("embeddings and the rest", whole - linears, "dense")),
                        byte_text(whole)) for label, whole, linears in rows]
    told = None
    if size.get("linears_output_bytes") and size["linears_output_bytes"] < size["linears_source_bytes"]:
        told = element("p", f"The pruned linears shrink {size['linears_source_bytes'] / size['linears_output_bytes']:.2f}-fold: "
                            "of every four values two go, and half a byte comes that says where the others sat. "
                            "Embeddings, norms and layers left dense stay as they were.")
    return _section("Size", told, _figure(chart.stacks("size", data, title="Weight files before and after",
                                                       description=f"{rows[0][1]} bytes before, {rows[1][1]} after.")))


def _speed(report: Facts) -> Markup | None:
    speed = report.get("speed")
    if not speed:
        return None
    intro = (f"One sequence, {speed['prompt_tokens']} tokens of prompt, {speed['dtype']}, {_threads(speed['threads'])}; "
             f"medians of {speed['rounds']} interleaved rounds in one process on this machine.")
    plots = []
    for phase, label in (("decode", "Decode: tokens a second"), ("prefill", "Prefill: tokens a second")):
        rows = [chart.Bar(v["label"], v[f"{phase}_tokens_per_s"], _rate(v[f"{phase}_tokens_per_s"]), _TONES[v["name"]])
                for v in speed["variants"]]
        told = "; ".join(f"{row.label} {row.text}" for row in rows)
        plots.append(_figure(chart.bars(f"speed-{phase}", rows, title=label, description=told + "."), label))
    return _section("Speed on this machine", element("p", intro), element("div", *plots, class_="pair"),
                    _gain(speed), _step(speed), _memory(speed))


def _gain(speed: Facts) -> Markup:
    element_bytes = {"float32": 4}.get(speed["dtype"], 2)
    rows = []
    for phase in ("decode", "prefill"):
        parts = speed["attribution"][phase]
        rows.append((phase, parts["peer_weakness"], parts["sparsity"], _byte_limit(speed, parts["best_dense"])
                     if phase == "decode" else None))
    told = " ".join(f"{label}: {weak * sparse:.2f} = {weak:.2f} (dense peer's weakness) times {sparse:.2f} (2:4)."
                    for label, weak, sparse, _ in rows)
    caption = ("Part of the gain is that transformers' dense path does not run at this machine's best: oneDNN with prepacked "
               "weights shows what dense could do. Only the rest is the gain of 2:4. In decode it is bounded by the bytes "
               f"read (linears: {byte_ratio(element_bytes):.2f}-fold fewer in {speed['dtype']}; the dashed mark includes the "
               "dense output matrix); prefill computes, and is bounded by arithmetic (2×).")
    return _figure(chart.factors("gain", rows, title="Where the speed-up comes from", description=told),
                   "Where the speed-up comes from", caption)


def _byte_limit(speed: Facts, best: str) -> float | None:
    """Ratio of the weight bytes that a decode step reads, best dense over packed."""
    read = {v["name"]: v["weight_bytes"]["linears"] + v["weight_bytes"].get("lm_head", 0) for v in speed["variants"]}
    dense = read.get(best) or read["dense"]
    return dense / read["packed"] if read.get("packed") else None


def _step(speed: Facts) -> Markup | None:
    rows, told = [], []
    for variant in speed["variants"]:
        shares = variant.get("decode_shares")
        if not shares:
            continue
        ms = 1e3 * variant["decode_seconds"]
        rows.append(chart.Stack(variant["label"], [(name, shares[part] * ms, tone) for part, name, tone in _PARTS],
                                f"{ms:.1f} ms"))
        told.append(f"{variant['label']}: " + ", ".join(f"{name} {shares[part]:.0%}" for part, name, _ in _PARTS) + ".")
    if not rows:
        return None
    return _figure(chart.stacks("step", rows, title="Where a decode step goes", description=" ".join(told)),
                   "Where a decode step goes", "Milliseconds per token. Only the linears get faster; what else a step "
                   "costs limits the gain of the whole.")


def _memory(speed: Facts) -> Markup | None:
    rows = [chart.Bar(v["label"], v["memory"]["running_peak_bytes"], byte_text(v["memory"]["running_peak_bytes"]),
                      _TONES[v["name"]]) for v in speed["variants"] if v.get("memory")]
    if len(rows) < 2:
        return None
    told = "; ".join(f"{row.label} {row.text}" for row in rows) + "."
    return _figure(chart.bars("memory", rows, title="Peak memory while generating", description=told),
                   "Peak memory while generating", "Whole process, each variant alone, Python and torch included.")


def _quality(report: Facts) -> Markup | None:
    quality = report.get("quality") or {}
    before, after = quality.get("before"), quality.get("after")
    if not before:
        return None
    rows = [chart.Bar("before", before["perplexity"], f"{before['perplexity']:.2f}", "dense")]
    intro = None
    if after:
        ratio = after["perplexity"] / before["perplexity"]
        rows.append(chart.Bar("after", after["perplexity"], f"{after['perplexity']:.2f}", "packed" if ratio < 1.1 else "loss"))
        bits = ""
        if before.get("bits_per_byte") and after.get("bits_per_byte"):
            bits = f" Bits per byte: {before['bits_per_byte']:.3f} before, {after['bits_per_byte']:.3f} after."
        intro = element("p", f"Perplexity, lower is better: {ratio_text(ratio)} the dense model's, {quality_word(ratio)}.{bits}")
    caption = (f"{before['tokens']:,} scored tokens of {Path(str(quality.get('text', 'the text'))).name}, "
               f"{quality.get('protocol', '')}.")
    told = "; ".join(f"{row.label} {row.text}" for row in rows) + "."
    return _section("Quality", intro, _figure(chart.bars("quality", rows, title="Perplexity", description=told),
                                              None, caption), _tasks(quality))


def _tasks(quality: Facts) -> Markup | None:
    tasks = quality.get("tasks")
    if not tasks:
        return None
    rows = [(name, f"{pair['before']:.4f}", f"{pair['after']:.4f}") for name, pair in tasks.items()]
    return _table(("task", "before", "after"), rows)


def _layers(report: Facts) -> Markup | None:
    layers = [layer for prune in report.get("prunes", []) for layer in prune["layers"]]
    layers = [layer for layer in layers if layer.get("relative_error") is not None]
    if not layers:
        return None
    kinds: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        found = re.search(r"\.(\d+)\.", layer["name"])
        kinds.setdefault(layer["name"].rpartition(".")[2], []).append(
            (int(found[1]) if found else 0, float(layer["relative_error"])))
    top = max(error for points in kinds.values() for _, error in points) or 1.0
    scale = (max(block for points in kinds.values() for block, _ in points), top)
    panels = []
    for index, (kind, points) in enumerate(kinds.items()):
        others = [sorted(rest) for name, rest in kinds.items() if name != kind]
        panels.append(element("figure", element("figcaption", kind, class_="title"),
                              chart.depth_panel(f"layer-{index}", kind, sorted(points), others, scale=scale)))
    worst = max(layers, key=lambda layer: layer["relative_error"])
    mean = sum(layer["relative_error"] for layer in layers) / len(layers)
    intro = (f"Relative error of each layer's output on the calibration text, ‖(W − W′)X‖² / ‖WX‖², by block. "
             f"Mean {mean:.3f} over {len(layers)} layers; the largest, {worst['relative_error']:.3f}, is {worst['name']}.")
    return _section("Error of every pruned layer", element("p", intro), element("div", *panels, class_="panels"))


def _kernels(report: Facts) -> Markup | None:
    kernels = report.get("kernels")
    if not kernels or not kernels.get("rows"):
        return None
    machine = kernels["machine"]
    points = kernel_points(kernels["rows"], gbps=machine["gbps"], gflops=machine["gflops"])
    best = max((p for p in points if p.kernel == "2:4"), key=lambda p: p.share)
    intro = (f"The 2:4 linear and the fastest dense kernel ({kernels['rows'][0]['dtype']}, "
             f"{_threads(kernels['rows'][0].get('threads', 1))}), over what this machine was measured to do. "
             "Fewer bytes move the discs to the right of their squares, along the memory line that is speed.")
    told = f"{len(points)} timed kernels; the 2:4 kernel reaches up to {best.share:.0%} of the attainable speed."
    plot = chart.roofline("roofline", points, gbps=machine["gbps"], gflops=machine["gflops"],
                          title="Roofline of the kernels", description=told)
    rows = [(f"{r['M']} × {r['N']} × {r['K']}", f"{r['ours_us']:,.0f}", *_best_peer(r), f"{r['ratio_best']:.2f}×",
             f"{r['gbps']:.1f}" if r.get("gbps") is not None else "",
             f"{r['roofline_share']:.0%}" if r.get("roofline_share") is not None else "") for r in kernels["rows"]]
    table = _table(("M × N × K", "2:4, µs", "best dense, µs", "which", "ratio", "GB/s", "of roofline"), rows)
    return _section("Kernels", element("p", intro), _figure(plot), _fold("All timings", table))


def _best_peer(row: Facts) -> tuple[str, str]:
    peer = min(row["peers"], key=row["peers"].__getitem__)
    return f"{row['peers'][peer]:,.0f}", peer


def _details(report: Facts) -> Markup:
    blocks = []
    layers = [layer for prune in report.get("prunes", []) for layer in prune["layers"]]
    if layers:
        rows = [(layer["name"], "×".join(map(str, layer["shape"])), layer["pattern"], f"{layer['sparsity']:.1%}",
                 "" if layer.get("relative_error") is None else f"{layer['relative_error']:.5f}",
                 f"{layer['seconds']:.2f}") for layer in layers]
        blocks.append(_fold(f"All {len(rows)} pruned layers",
                            _table(("layer", "shape", "pattern", "zeros", "relative error", "seconds"), rows)))
    if report.get("recipe"):
        import yaml

        text = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
        blocks.append(_fold("Recipe", element("p", "Saved as recipe.yaml; ", element("code", "lissom run recipe.yaml"),
                                              " repeats this run."), element("pre", text)))
    if report.get("provenance"):
        blocks.append(_fold("Provenance", _pairs(report["provenance"])))
    if report.get("environment"):
        blocks.append(_fold("Environment", _pairs(report["environment"])))
    return _section("Details", *blocks)


def _foot(report: Facts) -> Markup:
    return element("footer", element("p", f"Written by lissom {report.get('lissom_version', '')} on this machine; "
                                          "nothing was sent anywhere. Figures hold for this CPU only."))


def _section(title: str, *content: Markup | None) -> Markup:
    return element("section", element("h2", title), *content)


def _figure(plot: Markup, title: str | None = None, caption: str | None = None) -> Markup:
    return element("figure", element("h3", title) if title else None, plot,
                   element("figcaption", caption) if caption else None)


def _fold(title: str, *content: Markup) -> Markup:
    return element("details", element("summary", title), *content)


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> Markup:
    body = [element("tr", [element("td", cell) for cell in row]) for row in rows]
    return element("div", element("table", element("thead", element("tr", [element("th", h, scope="col") for h in heads])),
                                  element("tbody", body)), class_="wide", tabindex="0")


def _pairs(values: Facts) -> Markup:
    rows = [element("tr", element("th", key.replace("_", " "), scope="row"),
                    element("td", value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)))
            for key, value in values.items() if value is not None]
    return element("div", element("table", element("tbody", rows), class_="pairs"), class_="wide", tabindex="0")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


