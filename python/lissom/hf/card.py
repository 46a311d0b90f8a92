# SPDX-License-Identifier: Apache-2.0
"""The section about compression in a model's README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lissom.hf.side import Ancestry

_BEGIN, _END = "<!-- lissom: begin -->", "<!-- lissom: end -->"


@dataclass(frozen=True)
class CardFacts:
    """What the model card states beyond the provenance that pruning left in ``config.lissom``.

    Args:
        base_model: name of the model before pruning; None: as the model says where it came from.
        perplexity_before: perplexity of the dense model.
        perplexity_after: perplexity of the saved model on the same text.
        evaluation_text: what the perplexities were measured on.
        license: licence identifier of the base model, for the card's header; None: what the base model's card
            says.
    """

    base_model: str | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    evaluation_text: str | None = None
    license: str | None = None
    notes: tuple[str, ...] = field(default=())


def render_card(
    facts: CardFacts,
    provenance: Mapping[str, Any],
    *,
    format: str,
    packed_modules: int,
    existing: str | None = None,
    base: Ancestry | None = None,
) -> str:
    """Writes the model card: replaces the lissom section of an existing text, or makes a new one.

    Args:
        facts: measured quality and names.
        provenance: ``config.lissom`` as pruning left it; may be empty.
        format: "packed" or "dense".
        packed_modules: how many linears are 2:4.
        existing: the README so far.
        base: what the base model says of itself; its licence and language go into a new text's header.

    Returns:
        The whole text in Markdown.

    Example:
        >>> "AutoModelForCausalLM" in render_card(CardFacts(), {}, format="packed", packed_modules=7)
        True
    """
    if base is not None and facts.base_model is None:
        facts = replace(facts, base_model=base.name)
    section = "\n".join([_BEGIN, *_section(facts, provenance, format, packed_modules), _END])
    if existing is None:
        return f"{_header(facts, base)}\n# {facts.base_model or 'Model'}, 2:4 sparse\n\n{section}\n"
    old = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
    if old.search(existing):
        return old.sub(lambda _: section, existing, count=1)
    return f"{existing.rstrip()}\n\n{section}\n"


def _header(facts: CardFacts, base: Ancestry | None) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [lissom, sparse, pruned]",
    ]
    inherited = [] if base is None else base.front_matter
    if facts.license:
        lines.append(f"license: {facts.license}")
        inherited = [line for line in inherited if not line.startswith("license")]
    lines += inherited
    return "\n".join([*lines, "---", ""])


def _section(facts: CardFacts, provenance: Mapping[str, Any], format: str, packed_modules: int) -> list[str]:
    calibration = provenance.get("calibration") or {}
    rows = {
        "Base model": facts.base_model,
        "Pattern": provenance.get("pattern"),
        "Method": provenance.get("method"),
        "Calibration": _calibration_line(calibration),
        "2:4 linears": str(packed_modules),
        "Perplexity": _perplexity_line(facts),
        "Format": format,
        "lissom version": provenance.get("version"),
    }
    lines = ["## Compression", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    lines += ["", *facts.notes, "### How to load", "", *_loading_lines(format)]
    return lines


def _calibration_line(calibration: Mapping[str, Any]) -> str | None:
    if not calibration:
        return None
    parts = [f"{calibration.get('samples')} windows of {calibration.get('seq_len')} tokens"]
    if "seed" in calibration:
        parts.append(f"seed {calibration['seed']}")
    if calibration.get("source_sha256"):
        parts.append(f"data sha256 `{str(calibration['source_sha256'])[:16]}`")
    return ", ".join(parts)


def _perplexity_line(facts: CardFacts) -> str | None:
    if facts.perplexity_after is None:
        return None
    before = "not measured" if facts.perplexity_before is None else f"{facts.perplexity_before:.2f}"
    text = f" on {facts.evaluation_text}" if facts.evaluation_text else ""
    return f"{before} before, {facts.perplexity_after:.2f} after{text}"


def _loading_lines(format: str) -> list[str]:
    load = [
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("<this folder>")',
        "```",
        "",
    ]
    if format == "dense":
        return [
            *load,
            "The pruned weights are written out as zeros: every tool reads them, none is faster for it.",
        ]
    return [
        *load,
        "The 2:4 linears are stored packed. Install `lissom` to load them; it need not be imported.",
        "Without it, loading stops with a size mismatch.",
    ]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
