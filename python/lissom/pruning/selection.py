# SPDX-License-Identifier: Apache-2.0
"""Which linear layers of a model a run prunes and to which pattern, and why it leaves the others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..models.names import matches, select
from ..models.walk import LinearRef, ModelMap
from .pattern import Pattern

DENSE = "dense"  # what a pattern map says of layers that are left as they are


class PatternMap(Mapping[str, "Pattern | None"]):
    """A pattern for each layer: the first entry that means a layer decides; None leaves it dense.

    Args:
        entries: pattern, its text, or "dense", by layer name or `re:<regex>` matched against the whole name;
            in order. A layer that no entry means is left dense.

    Raises:
        TypeError, ValueError: an entry that is no pattern, or an invalid regular expression.

    Example:
        >>> patterns = PatternMap({"re:.*down_proj": "dense", "re:.*mlp.*": "2:4", "re:.*": "50%"})
        >>> [str(patterns.of(name)) for name in ("0.mlp.up_proj", "0.mlp.down_proj", "0.attn.q_proj")]
        ['2:4', 'None', '50%']
    """

    def __init__(self, entries: Mapping[str, str | float | Pattern | None]) -> None:
        self._entries: dict[str, Pattern | None] = {}
        for key, value in entries.items():
            matches("", [key])  # refuses an invalid expression now, not layer by layer
            try:
                dense = value is None or value == DENSE
                self._entries[key] = None if dense else Pattern.parse(value)  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                raise type(error)(f"pattern map entry {key!r}: {error}, or 'dense'") from error

    def __getitem__(self, key: str) -> Pattern | None:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def key_of(self, name: str) -> str | None:
        """The first entry that means a layer, or None."""
        return next((key for key in self._entries if matches(name, [key])), None)

    def of(self, name: str) -> Pattern | None:
        """The pattern of a layer; None where it is left dense."""
        key = self.key_of(name)
        return None if key is None else self._entries[key]

    def why_dense(self, name: str) -> str | None:
        """Why the map leaves a layer dense, or None when it does not."""
        key = self.key_of(name)
        if key is None:
            return "no entry of the pattern map means it"
        return f"entry {key!r} of the pattern map leaves it dense" if self._entries[key] is None else None

    def check(self, names: Iterable[str]) -> None:
        """Refuse a map with an entry that means no layer (a typing error would otherwise pass unseen).

        Args:
            names: every layer that can be chosen.

        Raises:
            ValueError: such an entry.
        """
        candidates = list(names)
        for key in self._entries:
            if not any(matches(name, [key]) for name in candidates):
                raise ValueError(
                    f"pattern map entry {key!r} means none of the {len(candidates)} linear layers that can be "
                    f"chosen; names look like {candidates[:1]}, patterns start with 're:'"
                )

    def to_dict(self) -> dict[str, str]:
        """The map as plain text, in order, for JSON and YAML."""
        return {key: DENSE if value is None else str(value) for key, value in self._entries.items()}

    def __str__(self) -> str:
        return json.dumps(self.to_dict())

    def __repr__(self) -> str:
        return f"PatternMap({self.to_dict()})"


def read_pattern(
    spec: str | float | Pattern | Mapping[str, str | float | Pattern | None],
) -> Pattern | PatternMap:
    """Read what a user may give as the pattern of a run: one pattern, or a map of layers to patterns.

    Args:
        spec: as for `Pattern.parse`, or as for `PatternMap`.

    Returns:
        The pattern, or the map.

    Raises:
        TypeError, ValueError: as for `Pattern.parse` and `PatternMap`.
    """
    if isinstance(spec, PatternMap):
        return spec
    return PatternMap(spec) if isinstance(spec, Mapping) else Pattern.parse(spec)


def unpackable(spec: str | float | Pattern | Mapping[str, str | float | Pattern | None]) -> str | None:
    """What of a pattern the packed form, two of every four, cannot hold.

    Args:
        spec: as for `read_pattern`.

    Returns:
        The pattern or the entry of the map, quoted; None when all fit or are "dense".

    Example:
        >>> unpackable("2:4"), unpackable("50%"), unpackable({"mlp": "4:8", "attn": None})
        (None, "'50%'", "'mlp': '4:8'")
    """
    if not isinstance(spec, Mapping):
        pattern = None if spec == DENSE else Pattern.parse(spec)
        return repr(str(spec)) if pattern is not None and not pattern.fits_quads else None
    for key, pattern in PatternMap(spec).items():
        if pattern is not None and not pattern.fits_quads:
            return f"{key!r}: {str(pattern)!r}"
    return None


@dataclass(frozen=True)
class Step:
    """One stage of a run: a block with its layers to prune (perhaps none), or the output layer.

    Attributes:
        name: of the block, or of the output layer.
        linears: layers to prune.
        patterns: the pattern of each layer to prune in the whole run.
    """

    name: str
    linears: list[LinearRef]
    patterns: Mapping[str, Pattern]

    def groups(self) -> dict[str, list[LinearRef]]:
        """The layers by the input they share, in running order; their patterns may differ."""
        groups: dict[str, list[LinearRef]] = {}
        for linear in self.linears:
            groups.setdefault(linear.group, []).append(linear)
        return groups

    def pattern_of(self, name: str) -> Pattern:
        """The pattern of a layer to prune."""
        return self.patterns[name]


@dataclass(frozen=True)
class Selection:
    """What a run touches.

    Attributes:
        steps: in depth order, up to the last with work.
        left: a reason for each layer left.
        patterns: the pattern of each layer to prune, by name.
    """

    steps: list[Step]
    left: dict[str, str]
    patterns: Mapping[str, Pattern]

    def linears(self) -> list[LinearRef]:
        """Every layer to prune, in running order."""
        return [linear for step in self.steps for linear in step.linears]

    @property
    def touched_parameters(self) -> int:
        """Weights in the layers to prune."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears())


def select_linears(
    parts: ModelMap,
    pattern: Pattern | PatternMap,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    strict: bool = True,
) -> Selection:
    """Choose the layers that a run prunes.

    Args:
        parts: map of the model.
        pattern: what to prune everywhere, or a map of layers to patterns; n:m needs a number of inputs that
            m divides.
        include: names or `re:` patterns; None takes every linear of every block. The output layer, and
            layers whose weight the block reads by itself (`LinearRef.aside`), are taken only when they are
            named literally, here or by an entry of the map.
        exclude: names or `re:` patterns to leave.
        strict: raise for a chosen layer that cannot be pruned (shape, tied weight) instead of leaving it.

    Returns:
        The selection.

    Raises:
        ValueError: nothing to prune, an entry of a list or of the map that means no layer, or (strict) a
            layer that cannot be pruned.
    """
    wanted = pattern if isinstance(pattern, PatternMap) else PatternMap({"re:.*": pattern})
    refs = {linear.name: linear for linear in parts.linears()}
    head = parts.head
    if head is not None and (head.name in (include or ()) or head.name in wanted):
        refs[head.name] = head
    wanted.check(refs)
    chosen, left = select(refs, include, exclude)
    if head is not None and head.name not in refs:
        tied = f" (its weight is tied to {head.shared_with})" if head.shared_with else ""
        left[head.name] = f"the output layer is pruned only when include names it{tied}"
    patterns: dict[str, Pattern] = {}
    for name in chosen:
        own = wanted.of(name)
        aside = refs[name].aside
        if aside is not None and name not in (include or ()) and name not in wanted:
            left[name] = f"{aside}; it is pruned only when named"
            continue
        reason = wanted.why_dense(name) if own is None else _obstacle(refs[name], own)
        if own is not None and reason and strict:
            raise ValueError(
                f"{name} cannot be pruned: {reason}; exclude it, or pass strict=False to leave it dense"
            )
        if reason:
            left[name] = reason
        elif own is not None:
            patterns[name] = own
    if not patterns:
        raise ValueError(f"nothing would be pruned: all {len(refs)} linear layers of the model are left out")
    return Selection(_steps(parts, patterns), left, patterns)


def _obstacle(linear: LinearRef, pattern: Pattern) -> str | None:
    if linear.shared_with is not None:
        return f"its weight is shared with {linear.shared_with}"
    outputs, inputs = linear.shape
    return pattern.obstacle(inputs, outputs)


def _steps(parts: ModelMap, patterns: Mapping[str, Pattern]) -> list[Step]:
    steps = [
        Step(block.name, [ref for ref in block.linears if ref.name in patterns], patterns)
        for block in parts.blocks
    ]
    if parts.head is not None and parts.head.name in patterns:
        steps.append(Step(parts.head.name, [parts.head], patterns))
    while not steps[-1].linears:
        steps.pop()
    return steps
