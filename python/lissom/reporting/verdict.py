# SPDX-License-Identifier: Apache-2.0
"""What a user gained and paid, in plain words."""

from __future__ import annotations

from typing import Any

from lissom.reporting.wording import byte_text, ratio_text

# Below 5 % two medians of one machine cannot be told apart.
NOISE = 0.05
_QUALITY = [
    (1.02, "practically unchanged"),
    (1.10, "slightly worse"),
    (1.50, "noticeably worse"),
    (3.00, "clearly worse: expect weaker answers, and fine-tune before use"),
]


def judge(report: dict[str, Any]) -> dict[str, Any]:
    """Weigh a run's report.

    Args:
        report: contents of lissom-report.json; `size`, `quality`, `speed` and `output` may be missing.

    Returns:
        `headline` (one sentence), `gains`, `costs`, `unknown` (lists of sentences), `nothing_gained` (bool).
    """
    gains: list[str] = []
    costs: list[str] = []
    unknown: list[str] = []
    _judge_size(report, gains, costs)
    _judge_speed(report, gains, costs, unknown)
    _judge_quality(report, gains, costs, unknown)
    nothing = not gains
    return {
        "headline": _headline(report, nothing),
        "gains": gains,
        "costs": costs,
        "unknown": unknown,
        "nothing_gained": nothing,
    }


def _judge_size(report: dict[str, Any], gains: list[str], costs: list[str]) -> None:
    size = report.get("size")
    if not size or not size.get("source_bytes"):
        return
    before, after = size["source_bytes"], size["output_bytes"]
    change = f"from {byte_text(before)} to {byte_text(after)}"
    if after < before * 0.98:
        gains.append(f"The files shrink {change}, {1 - after / before:.0%} less.")
    elif report.get("output", {}).get("format") == "dense":
        costs.append(
            f"No gain in size ({change}): format 'dense' writes the zeros out; every tool reads it, nothing "
            "gets smaller or faster. Use format 'packed' with pattern 2:4 for that."
        )
    else:
        costs.append(f"No gain in size ({change}): hardly any weight could be packed.")


def _judge_speed(report: dict[str, Any], gains: list[str], costs: list[str], unknown: list[str]) -> None:
    speed = report.get("speed")
    if not speed:
        unknown.append("Speed was not measured.")
        return
    for phase, name in (("decode", "Decode"), ("prefill", "Prefill")):
        parts = speed["attribution"][phase]
        total, sparsity = parts["total"], parts["sparsity"]
        best = f"{ratio_text(sparsity)} the best dense kernels here"
        against = f"{ratio_text(total)} transformers as it comes, {best}"
        if sparsity >= 1 + NOISE:
            gains.append(f"{name} runs at {against}.")
        elif total >= 1 + NOISE:
            other = "be faster" if sparsity < 1 - NOISE else "do as much"
            gains.append(
                f"{name} runs at {against}: faster than what you run today, but a good dense kernel "
                f"would {other} without pruning."
            )
        elif total > 1 - NOISE:
            costs.append(f"{name} is as fast as before ({against}).")
        else:
            costs.append(f"{name} got slower ({against}).")


def _judge_quality(report: dict[str, Any], gains: list[str], costs: list[str], unknown: list[str]) -> None:
    quality = report.get("quality") or {}
    if not quality.get("before") or not quality.get("after"):
        unknown.append(
            "Quality was not measured: name a held-out text (--eval-text FILE) to know what pruning cost."
        )
        return
    before, after = quality["before"]["perplexity"], quality["after"]["perplexity"]
    costs.append(
        f"Perplexity goes from {before:.1f} to {after:.1f} ({ratio_text(after / before)}): "
        f"{quality_word(after / before)}."
    )


def quality_word(ratio: float) -> str:
    """Plain words for a ratio of perplexities, after over before.

    Example:
        >>> quality_word(1.0), quality_word(50)[:7]
        ('practically unchanged', 'damaged')
    """
    for limit, word in _QUALITY:
        if ratio < limit:
            return word
    return "damaged: not usable without further training"


def _headline(report: dict[str, Any], nothing: bool) -> str:
    if nothing:
        return "You gain nothing on this machine."
    claims = []
    size, speed, quality = report.get("size"), report.get("speed"), report.get("quality") or {}
    if size and size.get("source_bytes") and size["output_bytes"] < size["source_bytes"] * 0.98:
        claims.append(f"{1 - size['output_bytes'] / size['source_bytes']:.0%} smaller")
    faster = _faster(speed) if speed else []
    claims += faster
    text = _listed(claims) if claims else "faster than transformers as it comes"
    if speed and not faster:
        text += ", but no faster than a good dense kernel"
    if quality.get("before") and quality.get("after"):
        text += f"; quality {quality_word(quality['after']['perplexity'] / quality['before']['perplexity'])}"
    return text[:1].upper() + text[1:] + "."


def _faster(speed: dict[str, Any]) -> list[str]:
    """Claims of speed that hold against the best dense kernel too."""
    claims: list[str] = []
    for phase in ("decode", "prefill"):
        parts = speed["attribution"][phase]
        total, sparsity = ratio_text(parts["total"]), ratio_text(parts["sparsity"])
        if min(parts["sparsity"], parts["total"]) < 1 + NOISE:
            continue
        if claims:
            claims.append(f"{total} in {phase} ({sparsity})")
        else:
            claims.append(f"{total} transformers' speed in {phase} ({sparsity} the best dense kernels')")
    return claims


def _listed(claims: list[str]) -> str:
    return claims[0] if len(claims) == 1 else f"{', '.join(claims[:-1])} and {claims[-1]}"
