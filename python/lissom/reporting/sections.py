# SPDX-License-Identifier: Apache-2.0
"""The parts of the report page; each gives None when the report lacks its facts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lissom.reporting import chart
from lissom.reporting.markup import Markup, element, figure, fold, pairs, section, table
from lissom.reporting.roofline import byte_ratio, kernel_points
from lissom.reporting.roofline_plot import roofline
from lissom.reporting.verdict import quality_word
from lissom.reporting.wording import (
    byte_text,
    duration_text,
    method_text,
    rate_text,
    ratio_text,
    thread_text,
    training_text,
)

Facts = dict[str, Any]
_TONES = {"dense": "dense", "onednn": "peer", "compiled": "peer", "packed": "packed"}
_PARTS = (
    ("linears", "linears", "packed"),
    ("lm_head", "output matrix", "sky"),
    ("attention", "attention", "amber"),
    ("other", "norms, activations, Python", "dense"),
)


def size_section(report: Facts) -> Markup | None:
    """Bytes of the files, before and after."""
    size = report.get("size")
    if not size:
        return None
    rows = [
        ("before", size["source_bytes"], size.get("linears_source_bytes", 0)),
        (f"after, {report['output']['format']}", size["output_bytes"], size.get("linears_output_bytes", 0)),
    ]
    data = [
        chart.Stack(
            label,
            (("pruned linears", linears, "packed"), ("embeddings and the rest", whole - linears, "dense")),
            byte_text(whole),
        )
        for label, whole, linears in rows
    ]
    told = None
    if size.get("linears_output_bytes") and size["linears_output_bytes"] < size["linears_source_bytes"]:
        told = element(
            "p",
            "The pruned linears shrink "
            f"{size['linears_source_bytes'] / size['linears_output_bytes']:.2f}-fold: "
            "of every four values two go, and half a byte comes that says where the others sat. "
            "Embeddings, norms and layers left dense stay as they were.",
        )
    return section(
        "Size",
        told,
        figure(
            chart.stacks(
                "size",
                data,
                title="Weight files before and after",
                description=f"{rows[0][1]} bytes before, {rows[1][1]} after.",
            )
        ),
    )


def speed_section(report: Facts) -> Markup | None:
    """Tokens per second, where the gain comes from, where a step goes."""
    speed = report.get("speed")
    if not speed:
        return None
    intro = (
        f"One sequence, {speed['prompt_tokens']} tokens of prompt, {speed['dtype']}, "
        f"{thread_text(speed['threads'])}; "
        f"medians of {speed['rounds']} interleaved rounds in one process on this machine."
    )
    plots = []
    for phase, label in (("decode", "Decode: tokens a second"), ("prefill", "Prefill: tokens a second")):
        rows = [
            chart.Bar(
                v["label"],
                v[f"{phase}_tokens_per_s"],
                rate_text(v[f"{phase}_tokens_per_s"]),
                _TONES[v["name"]],
            )
            for v in speed["variants"]
        ]
        told = "; ".join(f"{row.label} {row.text}" for row in rows)
        plots.append(figure(chart.bars(f"speed-{phase}", rows, title=label, description=told + "."), label))
    return section(
        "Speed on this machine",
        element("p", intro),
        element("div", *plots, class_="pair"),
        _gain(speed),
        _step(speed),
        _memory(speed),
    )


def _gain(speed: Facts) -> Markup:
    rows = []
    for phase in ("decode", "prefill"):
        parts = speed["attribution"][phase]
        limit = _byte_limit(speed, parts["best_dense"]) if phase == "decode" else None
        rows.append(chart.Gain(phase, parts["peer_weakness"], parts["sparsity"], limit))
    told = " ".join(
        f"{row.label}: {row.weakness * row.sparsity:.2f} = {row.weakness:.2f} (dense peer's weakness) times "
        f"{row.sparsity:.2f} (2:4)."
        for row in rows
    )
    fewer = byte_ratio({"float32": 4}.get(speed["dtype"], 2))
    caption = (
        "Part of the gain is that transformers' dense path does not run at this machine's best: oneDNN with "
        "prepacked weights shows what dense could do. Only the rest is the gain of 2:4. In decode it is "
        f"bounded by the bytes read (linears: {fewer:.2f}-fold fewer in {speed['dtype']}; the dashed mark "
        "includes the dense output matrix); prefill computes, and is bounded by arithmetic (2×)."
    )
    title = "Where the speed-up comes from"
    return figure(chart.factors("gain", rows, title=title, description=told), title, caption)


def _byte_limit(speed: Facts, best: str) -> float | None:
    """Ratio of the weight bytes that a decode step reads, best dense over packed."""
    read = {
        v["name"]: v["weight_bytes"]["linears"] + v["weight_bytes"].get("lm_head", 0)
        for v in speed["variants"]
    }
    dense = read.get(best) or read["dense"]
    return dense / read["packed"] if read.get("packed") else None


def _step(speed: Facts) -> Markup | None:
    rows, told = [], []
    for variant in speed["variants"]:
        shares = variant.get("decode_shares")
        if not shares:
            continue
        ms = 1e3 * variant["decode_seconds"]
        rows.append(
            chart.Stack(
                variant["label"],
                [(name, shares[part] * ms, tone) for part, name, tone in _PARTS],
                f"{ms:.1f} ms",
            )
        )
        told.append(
            f"{variant['label']}: "
            + ", ".join(f"{name} {shares[part]:.0%}" for part, name, _ in _PARTS)
            + "."
        )
    if not rows:
        return None
    return figure(
        chart.stacks("step", rows, title="Where a decode step goes", description=" ".join(told)),
        "Where a decode step goes",
        "Milliseconds per token. Only the linears get faster; what else a step "
        "costs limits the gain of the whole.",
    )


def _memory(speed: Facts) -> Markup | None:
    rows = [
        chart.Bar(
            v["label"],
            v["memory"]["running_peak_bytes"],
            byte_text(v["memory"]["running_peak_bytes"]),
            _TONES[v["name"]],
        )
        for v in speed["variants"]
        if v.get("memory")
    ]
    if len(rows) < 2:
        return None
    told = "; ".join(f"{row.label} {row.text}" for row in rows) + "."
    return figure(
        chart.bars("memory", rows, title="Peak memory while generating", description=told),
        "Peak memory while generating",
        "Whole process, each variant alone, Python and torch included.",
    )


def quality_section(report: Facts) -> Markup | None:
    """Perplexity and tasks, before and after."""
    quality = report.get("quality") or {}
    before, after = quality.get("before"), quality.get("after")
    if not before:
        return section("Quality", _tasks(quality)) if quality.get("tasks") else None
    rows = [chart.Bar("before", before["perplexity"], f"{before['perplexity']:.2f}", "dense")]
    intro = None
    if after:
        ratio = after["perplexity"] / before["perplexity"]
        rows.append(
            chart.Bar(
                "after",
                after["perplexity"],
                f"{after['perplexity']:.2f}",
                "packed" if ratio < 1.1 else "loss",
            )
        )
        bits = ""
        if before.get("bits_per_byte") and after.get("bits_per_byte"):
            bits = (
                f" Bits per byte: {before['bits_per_byte']:.3f} before, {after['bits_per_byte']:.3f} after."
            )
        intro = element(
            "p",
            f"Perplexity, lower is better: {ratio_text(ratio)} the dense model's, "
            f"{quality_word(ratio)}.{bits}",
        )
    caption = (
        f"{before['tokens']:,} scored tokens of {Path(str(quality.get('text', 'the text'))).name}, "
        f"{quality.get('protocol', '')}."
    )
    told = "; ".join(f"{row.label} {row.text}" for row in rows) + "."
    return section(
        "Quality",
        intro,
        figure(chart.bars("quality", rows, title="Perplexity", description=told), None, caption),
        _tasks(quality),
    )


def _tasks(quality: Facts) -> Markup | None:
    tasks = quality.get("tasks")
    if not tasks:
        return None
    rows = [(name, f"{pair['before']:.4f}", f"{pair['after']:.4f}") for name, pair in tasks.items()]
    return table(("task", "before", "after"), rows)


def pruning_section(report: Facts) -> Markup | None:
    """How the weights were chosen and solved for."""
    prunes = report.get("prunes", [])
    if not prunes:
        return None
    return section("Pruning", *[pairs(_settings(prune)) for prune in prunes])


def _settings(prune: Facts) -> dict[str, Any]:
    touched, whole = prune["touched_parameters"], max(prune["total_parameters"], 1)
    patterns = sorted({layer["pattern"] for layer in prune["layers"]})
    return {
        "pattern": ", ".join(patterns),
        "method": method_text(prune),
        "targets": f"{prune['blend']:.0%} the dense model's outputs, the rest the layer's own"
        if prune.get("blend")
        else None,
        "channels permuted": prune.get("permuted"),
        "weights touched": f"{touched:,} of {whole:,} ({touched / whole:.1%})",
        "of these pruned": f"{prune['sparsity']:.1%}" if "sparsity" in prune else None,
        "training": training_text(prune),
        "time": duration_text(prune["seconds"]) if prune.get("seconds") else None,
    }


def layers_section(report: Facts) -> Markup | None:
    """Relative error of every pruned layer, a panel for each kind."""
    layers = [layer for prune in report.get("prunes", []) for layer in prune["layers"]]
    layers = [layer for layer in layers if layer.get("relative_error") is not None]
    if not layers:
        return None
    kinds: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        found = re.search(r"\.(\d+)\.", layer["name"])
        kinds.setdefault(layer["name"].rpartition(".")[2], []).append(
            (int(found[1]) if found else 0, float(layer["relative_error"]))
        )
    series = {kind: sorted(points) for kind, points in kinds.items()}
    top = max(error for points in series.values() for _, error in points) or 1.0
    scale = (max(block for points in series.values() for block, _ in points), top)
    panels = [
        element(
            "figure",
            element("figcaption", kind, class_="title"),
            chart.depth_panel(f"layer-{index}", kind, series, scale=scale),
        )
        for index, kind in enumerate(series)
    ]
    worst = max(layers, key=lambda layer: layer["relative_error"])
    mean = sum(layer["relative_error"] for layer in layers) / len(layers)
    intro = (
        f"Relative error of each layer's output on the calibration text, ‖(W − W′)X‖² / ‖WX‖², by block. "
        f"Mean {mean:.3f} over {len(layers)} layers; the largest, {worst['relative_error']:.3f}, is "
        f"{worst['name']}."
    )
    return section(
        "Error of every pruned layer", element("p", intro), element("div", *panels, class_="panels")
    )


def kernels_section(report: Facts) -> Markup | None:
    """The timed kernels over the roofline."""
    kernels = report.get("kernels")
    if not kernels or not kernels.get("rows"):
        return None
    machine, dtype = kernels["machine"], kernels["rows"][0]["dtype"]
    gbps, gflops = machine["gbps"], machine["gflops"].get(dtype, machine["gflops"]["float32"])
    points = kernel_points(kernels["rows"], gbps=gbps, gflops=gflops)
    best = max((p for p in points if p.kernel == "2:4"), key=lambda p: p.share)
    intro = (
        f"The 2:4 linear and the fastest dense kernel ({dtype}, "
        f"{thread_text(kernels['rows'][0].get('threads', 1))}), over what this machine was measured to do "
        "with dense code. Fewer bytes move the discs to the right of their squares; along the memory line "
        "that is speed."
    )
    told = (
        f"{len(points)} timed kernels; the 2:4 kernel reaches up to {best.share:.0%} of the attainable speed."
    )
    plot = roofline(
        "roofline",
        points,
        gbps=gbps,
        gflops=gflops,
        title="Roofline of the kernels",
        description=told,
    )
    rows = [
        (
            f"{r['M']} × {r['N']} × {r['K']}",
            f"{r['ours_us']:,.0f}",
            *_best_peer(r),
            f"{r['ratio_best']:.2f}×",
            f"{r['gbps']:.1f}" if r.get("gbps") is not None else "",
            f"{r['roofline_share']:.0%}" if r.get("roofline_share") is not None else "",
        )
        for r in kernels["rows"]
    ]
    timings = table(("M × N × K", "2:4, µs", "best dense, µs", "which", "ratio", "GB/s", "of roofline"), rows)
    return section("Kernels", element("p", intro), figure(plot), fold("All timings", timings))


def _best_peer(row: Facts) -> tuple[str, str]:
    peer = min(row["peers"], key=row["peers"].__getitem__)
    return f"{row['peers'][peer]:,.0f}", peer


def details_section(report: Facts) -> Markup:
    """Tables that few want to read and all want to have."""
    blocks = []
    layers = [layer for prune in report.get("prunes", []) for layer in prune["layers"]]
    if layers:
        rows = [
            (
                layer["name"],
                "×".join(map(str, layer["shape"])),
                layer["pattern"],
                f"{layer['sparsity']:.1%}",
                "" if layer.get("relative_error") is None else f"{layer['relative_error']:.5f}",
                f"{layer['seconds']:.2f}",
            )
            for layer in layers
        ]
        blocks.append(
            fold(
                f"All {len(rows)} pruned layers",
                table(("layer", "shape", "pattern", "zeros", "relative error", "seconds"), rows),
            )
        )
    spent = [block for prune in report.get("prunes", []) for block in prune.get("blocks", [])]
    if spent:
        heads = ("block", "collect, s", "solve, s", "train, s", "advance, s", "error at first", "at last")
        blocks.append(fold(f"All {len(spent)} blocks", table(heads, [_block_row(block) for block in spent])))
    if report.get("recipe"):
        import yaml

        text = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
        blocks.append(
            fold(
                "Recipe",
                element(
                    "p",
                    "Saved as recipe.yaml; ",
                    element("code", "lissom run recipe.yaml"),
                    " repeats this run.",
                ),
                element("pre", text),
            )
        )
    if report.get("provenance"):
        blocks.append(fold("Provenance", pairs(report["provenance"])))
    if report.get("environment"):
        blocks.append(fold("Environment", pairs(report["environment"])))
    return section("Details", *blocks)


def _block_row(block: Facts) -> list[str]:
    times = [f"{block[f'{part}_seconds']:.2f}" for part in ("collect", "solve", "reconstruct", "advance")]
    return [block["name"], *times, *[f"{loss:.5f}" for loss in block.get("losses") or ()]]
