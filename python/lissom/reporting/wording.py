# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

from __future__ import annotations


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
