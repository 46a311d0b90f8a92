# SPDX-License-Identifier: Apache-2.0
"""Which modules a list of names or `re:` patterns means: the one matcher behind every include and exclude."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def matches(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a module name is meant by a list of names and regular expressions.

    Args:
        name: full module name, as in `model.named_modules()`.
        patterns: exact names, or `re:<regex>` matched against the whole name; None matches nothing.

    Returns:
        True when at least one entry means this name.

    Raises:
        TypeError: `patterns` is a bare string instead of a list.
        ValueError: an entry is not a valid regular expression.

    Example:
        >>> matches("model.layers.0.mlp.up_proj", ["re:.*mlp.*"])
        True
    """
    return any(_means(entry, name) for entry in _entries(patterns))


def select(
    names: Iterable[str], include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Split names into those an include and an exclude list choose and those they leave.

    Args:
        names: candidate module names, in order.
        include: names or `re:` patterns to take; None takes every candidate.
        exclude: names or `re:` patterns to leave; wins over `include`.

    Returns:
        The chosen names in the given order, and a reason for each name that is left.

    Raises:
        ValueError: an entry means none of the candidates (a typing error would otherwise pass unseen).

    Example:
        >>> select(["a.up", "a.down"], exclude=["a.up"])
        (['a.down'], {'a.up': 'excluded'})
    """
    candidates = list(names)
    for role, patterns in (("include", include), ("exclude", exclude)):
        for entry in _entries(patterns):
            if not any(_means(entry, name) for name in candidates):
                raise ValueError(
                    f"{role} entry {entry!r} means none of the {len(candidates)} linear layers that can be "
                    f"chosen; names look like {candidates[:1]}, patterns start with 're:'"
                )
    chosen, left = [], {}
    for name in candidates:
        if matches(name, exclude):
            left[name] = "excluded"
        elif include is not None and not matches(name, include):
            left[name] = "not included"
        else:
            chosen.append(name)
    return chosen, left


def _entries(patterns: Sequence[str] | None) -> Sequence[str]:
    if isinstance(patterns, str):
        raise TypeError(
            f"include/exclude must be a list of names or 're:' patterns, got the string {patterns!r}"
        )
    return patterns or ()


def _means(entry: str, name: str) -> bool:
    if not entry.startswith("re:"):
        return entry == name
    try:
        return re.fullmatch(entry[3:], name) is not None
    except re.error as error:
        raise ValueError(f"pattern {entry!r} is not a valid regular expression: {error}") from error
