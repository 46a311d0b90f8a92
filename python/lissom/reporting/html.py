# SPDX-License-Identifier: Apache-2.0
"""The report page: one HTML file without scripts, fonts or anything else from outside."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from lissom.reporting import sections
from lissom.reporting.files import write_text
from lissom.reporting.markup import Markup, element
from lissom.reporting.verdict import judge
from lissom.reporting.wording import byte_text, duration_text, prune_text, rate_text, ratio_text

Facts = dict[str, Any]


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
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'",
        ),
        element("title", f"{name}: lissom report"),
        element("style", Markup(style)),
    )
    parts = [
        sections.size_section(report),
        sections.speed_section(report),
        sections.quality_section(report),
        sections.pruning_section(report),
        sections.layers_section(report),
        sections.kernels_section(report),
        sections.details_section(report),
    ]
    body = element("body", element("main", _top(report, name), *parts), _foot(report))
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def _model_name(report: Facts) -> str:
    return Path(str(report.get("model", {}).get("source", "model"))).name or "model"


def _top(report: Facts, name: str) -> Markup:
    verdict = judge(report)
    notes = [
        element("li", text, class_=kind)
        for kind, texts in (
            ("gain", verdict["gains"]),
            ("cost", verdict["costs"]),
            ("unknown", verdict["unknown"]),
        )
        for text in texts
    ]
    return element(
        "header",
        element(
            "p", "lissom report", Markup(" &middot; "), str(report.get("created", ""))[:10], class_="eyebrow"
        ),
        element("h1", name),
        element("p", _deed(report), class_="deed"),
        element(
            "p", verdict["headline"], class_="headline nothing" if verdict["nothing_gained"] else "headline"
        ),
        _tiles(report),
        element("ul", *notes, class_="notes") if notes else None,
    )


def _deed(report: Facts) -> str:
    """What was done, in one line."""
    parts = [prune_text(prune) for prune in report.get("prunes", [])]
    if report.get("output", {}).get("format"):
        parts.append(f"saved {report['output']['format']}")
    if report.get("seconds"):
        parts.append(f"in {duration_text(report['seconds'])}")
    return ", ".join(parts)


def _tiles(report: Facts) -> Markup | None:
    tiles = []
    size, speed, quality = report.get("size"), report.get("speed"), report.get("quality") or {}
    if size:
        tiles.append(
            (
                "Files",
                f"−{1 - size['output_bytes'] / size['source_bytes']:.0%}"
                if size["output_bytes"] < size["source_bytes"]
                else "±0%",
                f"{byte_text(size['source_bytes'])} → {byte_text(size['output_bytes'])}",
            )
        )
    for phase, label in (("decode", "Decode"), ("prefill", "Prefill")):
        if speed:
            rows = {row["name"]: row for row in speed["variants"]}
            key = f"{phase}_tokens_per_s"
            tiles.append(
                (
                    label,
                    ratio_text(speed["attribution"][phase]["total"]),
                    f"{rate_text(rows['dense'][key])} → {rate_text(rows['packed'][key])} tokens/s",
                )
            )
    if quality.get("before") and quality.get("after"):
        before, after = quality["before"]["perplexity"], quality["after"]["perplexity"]
        tiles.append(
            ("Perplexity", ratio_text(after / before), f"{before:.1f} → {after:.1f}, lower is better")
        )
    if not tiles:
        return None
    return element(
        "dl",
        [
            element("div", element("dt", label), element("dd", number, class_="number"), element("dd", note))
            for label, number, note in tiles
        ],
        class_="tiles",
    )


def _foot(report: Facts) -> Markup:
    return element(
        "footer",
        element(
            "p",
            f"Written by lissom {report.get('lissom_version', '')} on this machine; "
            "nothing was sent anywhere. Figures hold for this CPU only.",
        ),
    )
