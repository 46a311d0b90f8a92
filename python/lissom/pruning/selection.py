# SPDX-License-Identifier: Apache-2.0
"""Which linear layers of a model a run prunes, and why it leaves the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.names import select
from ..models.walk import LinearRef, ModelMap
from .pattern import Pattern


@dataclass(frozen=True)
class Step:
    """One stage of a run: a block with its layers to prune (perhaps none), or the output layer.

    Attributes:
        name: of the block, or of the output layer.
        linears: layers to prune.
    """

    name: str
    linears: list[LinearRef]

    def groups(self) -> dict[str, list[LinearRef]]:
        """The layers by the input they share, in running order."""
        groups: dict[str, list[LinearRef]] = {}
        for linear in self.linears:
            groups.setdefault(linear.group, []).append(linear)
        return groups


@dataclass(frozen=True)
class Selection:
    """What a run touches: steps in depth order up to the last with work; a reason for each layer left."""

    steps: list[Step]
    left: dict[str, str]

    def linears(self) -> list[LinearRef]:
        """Every layer to prune, in running order."""
        return [linear for step in self.steps for linear in step.linears]

    @property
    def touched_parameters(self) -> int:
        """Weights in the layers to prune."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears())


def select_linears(
    parts: ModelMap,
    pattern: Pattern,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    strict: bool = True,
) -> Selection:
    """Choose the layers that a run prunes.

    Args:
        parts: map of the model.
        pattern: what to prune; n:m needs a number of inputs that m divides.
        include: names or `re:` patterns; None takes every linear of every block. The output layer is taken
            only when it is named literally.
        exclude: names or `re:` patterns to leave.
        strict: raise for a chosen layer that cannot be pruned (shape, tied weight) instead of leaving it.

    Returns:
        The selection.

    Raises:
        ValueError: nothing to prune, an entry that means no layer, or (strict) a layer that cannot be pruned.
    """
    refs = {linear.name: linear for linear in parts.linears()}
    head = parts.head
    if head is not None and include is not None and head.name in include:
        refs[head.name] = head
    chosen, left = select(refs, include, exclude)
    if head is not None and head.name not in refs:
        tied = f" (its weight is tied to {head.shared_with})" if head.shared_with else ""
        left[head.name] = f"the output layer is pruned only when include names it{tied}"
    for name in chosen:
        reason = _obstacle(refs[name], pattern)
        if reason and strict:
            raise ValueError(
                f"{name} cannot be pruned: {reason}; exclude it, or pass strict=False to leave it dense"
            )
        if reason:
            left[name] = reason
    kept = [name for name in chosen if name not in left]
    if not kept:
        raise ValueError(f"nothing would be pruned: all {len(refs)} linear layers of the model are left out")
    steps = [
        Step(block.name, [ref for ref in block.linears if ref.name in set(kept)]) for block in parts.blocks
    ]
    if head is not None and head.name in kept:
        steps.append(Step(head.name, [head]))
    while not steps[-1].linears:
        steps.pop()
    return Selection(steps, left)


def _obstacle(linear: LinearRef, pattern: Pattern) -> str | None:
    if linear.shared_with is not None:
        return f"its weight is shared with {linear.shared_with}"
    return pattern.obstacle(linear.shape[1])
