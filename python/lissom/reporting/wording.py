# SPDX-License-Identifier: Apache-2.0
"""Numbers, and what a pruning run did, as people read them."""

from __future__ import annotations

from collections import Counter
from typing import Any

_METHODS = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "mrp": "MRP", "alps": "ALPS"}


def ratio_text(ratio: float) -> str:
    """A factor as people read it.

    Example:
        >>> ratio_text(2.043), ratio_text(0.987), ratio_text(112.4)
        ('2.04×', '0.99×', '112×')
    """
    return f"{ratio:.0f}×" if ratio >= 100 else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def byte_text(count: float) -> str:
    """Bytes in decimal units.

    Example:
        >>> byte_text(269_000_000), byte_text(999)
        ('269 MB', '999 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return (
                f"{value:.0f} {unit}"
                if value >= 100
                else f"{value:.1f} {unit}"
                if value >= 10
                else f"{value:.2f} {unit}"
            )
    return f"{count:.0f} B"


def rate_text(value: float) -> str:
    """Tokens per second, three digits.

    Example:
        >>> rate_text(1234.5), rate_text(21.53), rate_text(7.064)
        ('1,234', '21.5', '7.06')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def thread_text(count: int) -> str:
    """A number of threads."""
    return f"{count} thread" if count == 1 else f"{count} threads"


def duration_text(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> duration_text(4.2), duration_text(75), duration_text(7320)
        ('4 s', '1 min 15 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def prune_text(prune: dict[str, Any]) -> str:
    """What one pruning step did: patterns, method, how much of the model.

    Args:
        prune: a `PruneReport` as plain values; those of older reports lack `refit`.

    Returns:
        One line.

    Example:
        >>> layers = [{"pattern": "2:4"}, {"pattern": "2:4"}, {"pattern": "50%"}]
        >>> prune_text({"method": "alps", "refit": True, "layers": layers, "touched_parameters": 3,
        ...     "total_parameters": 4})
        '2:4 in 2 and 50% in 1 of 3 layers by ALPS with refit, 75% of the parameters'
    """
    counts = Counter(layer["pattern"] for layer in prune["layers"])
    if len(counts) > 1:
        parts = [f"{pattern} in {count}" for pattern, count in counts.most_common()]
        where = f"{', '.join(parts[:-1])} and {parts[-1]} of {len(prune['layers'])} layers"
    else:
        where = f"{next(iter(counts), prune.get('pattern'))} in {len(prune['layers'])} layers"
    share = prune["touched_parameters"] / max(prune["total_parameters"], 1)
    return f"{where} by {method_text(prune)}, {share:.0%} of the parameters"


def method_text(prune: dict[str, Any]) -> str:
    """Method and refit of a pruning step.

    Example:
        >>> method_text({"method": "wanda", "refit": "exact"}), method_text({"method": "magnitude"})
        ('Wanda with exact refit', 'magnitude')
    """
    refit = {True: " with refit", "exact": " with exact refit"}.get(prune.get("refit", False), "")
    return f"{_METHODS.get(prune['method'], prune['method'])}{refit}"


def training_text(prune: dict[str, Any]) -> str | None:
    """What the training of the blocks of a pruning step gained; None where none was trained.

    Example:
        >>> training_text({"blocks": [{"losses": [0.2, 0.1]}, {"losses": [0.4, 0.2]}, {"losses": None}]})
        "2 blocks trained: relative error of a block's output 0.3000 in the first pass, 0.1500 in the last"
    """
    losses = [block["losses"] for block in prune.get("blocks", []) if block.get("losses")]
    if not losses:
        return None
    first, last = (sum(values) / len(losses) for values in zip(*losses, strict=True))
    blocks = "1 block" if len(losses) == 1 else f"{len(losses)} blocks"
    return (
        f"{blocks} trained: relative error of a block's output {first:.4f} in the first pass, "
        f"{last:.4f} in the last"
    )
