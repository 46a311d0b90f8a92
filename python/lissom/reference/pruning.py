# SPDX-License-Identifier: Apache-2.0
"""Torch twin of the pruning operators: the same search in the same order, in float64 where C++ counts in integers."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_ROWS, MOST_GROUP = 1 << 24, 64


def check(levels: Tensor, kept: int, group: int, rounds: int, window: int) -> None:
    """The checks of `pruning_permute`."""
    op = "lissom::pruning_permute"
    if levels.dtype != torch.uint8:
        raise TypeError(f"{op}: levels must be uint8; got {levels.dtype}")
    if levels.dim() != 2 or levels.shape[0] > MOST_ROWS:
        raise ValueError(
            f"{op}: levels must be [R, C] with at most {MOST_ROWS} rows; got {list(levels.shape)}"
        )
    if not 1 <= kept < group <= MOST_GROUP:
        raise ValueError(f"{op}: wanted 1 <= kept < group <= {MOST_GROUP}; got kept {kept}, group {group}")
    if levels.shape[1] % group:
        raise ValueError(
            f"{op}: the C columns must divide into groups of {group}; got levels {list(levels.shape)}"
        )
    if rounds < 0:
        raise ValueError(f"{op}: rounds must not be negative; got {rounds}")
    if window < group:
        raise ValueError(f"{op}: window must be at least one group of {group}; got {window}")


def permute(levels: Tensor, kept: int, group: int, rounds: int, window: int) -> Tensor:
    """Twin of `pruning_permute`."""
    check(levels, kept, group, rounds, window)
    found = []
    columns = levels.shape[1]
    share = -(-columns // max(-(-columns // window), 1))
    share = max(-(-share // group) * group, 1)
    for first in range(0, columns, share):
        part = levels[:, first : first + share].t().double()
        found.append(first + _search(part, kept, group, rounds))
    if not found:
        return torch.empty(0, dtype=torch.int64, device=levels.device)
    groups = torch.cat(found).sort(1).values
    groups = groups[groups[:, 0].argsort()]
    lost = levels.t().double()[groups].sort(1).values[:, : group - kept].sum((1, 2))
    return groups[lost.argsort(descending=True, stable=True)].flatten()


def _search(levels: Tensor, kept: int, group: int, rounds: int) -> Tensor:
    """Groups [G, m] of the columns of levels [C, R]: rounds of the best exchanges between disjoint pairs of groups."""
    groups = torch.arange(len(levels), device=levels.device).view(-1, group)
    for _ in range(rounds):
        x = levels[groups.flatten()]  # by place
        d = torch.cdist(_thresholds(x.unflatten(0, (-1, group)), kept).flatten(0, 1), x, p=1)
        gains = d + d.t() - d.diagonal() - d.diagonal()[:, None]
        exchanges = _partners(gains.unflatten(0, (-1, group)).unflatten(2, (-1, group)).transpose(1, 2))
        if not exchanges:
            break
        flat = groups.view(-1)
        for a, b in exchanges:
            flat[[a, b]] = flat[[b, a]]
    return groups


def _thresholds(x: Tensor, kept: int) -> Tensor:
    """What a member of each group x [G, m, R] must exceed to be kept: the kept-th largest of the others."""
    sorted_ = x.sort(1, descending=True).values
    last, following = sorted_[:, kept - 1 : kept], sorted_[:, kept : kept + 1]
    return torch.where(x >= last, following, last)


def _partners(gains: Tensor) -> list[tuple[int, int]]:
    """Places to exchange, from gains [G, G, m, m]: each group with its best partner, greatest gains first."""
    number, size = gains.shape[0], gains.shape[-1]
    pairs = gains.flatten(2).clone()
    pairs[range(number), range(number)] = 0
    best = pairs.amax(2)
    partner = _first_largest(best)
    gain = best.amax(1) if number else best.new_empty(0)
    used: set[int] = set()
    exchanges = []
    for g in gain.argsort(descending=True, stable=True).tolist():
        h = int(partner[g])
        if gain[g] > 0 and not {g, h} & used:
            used |= {g, h}
            mine, theirs = divmod(int(_first_largest(pairs[g, h][None])), size)
            exchanges.append((g * size + mine, h * size + theirs))
    return exchanges


def _first_largest(values: Tensor) -> Tensor:
    """Index of the first of the largest values along the last dimension [..., N]."""
    index = torch.arange(values.shape[-1], device=values.device).expand_as(values)
    return index.masked_fill(values < values.amax(-1, keepdim=True), values.shape[-1]).amin(-1)
