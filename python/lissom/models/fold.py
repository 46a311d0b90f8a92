# SPDX-License-Identifier: Apache-2.0
"""Lets channels of a model change places without changing its function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from .channels import Channels, Slice


@torch.no_grad()
def fold_permutation(
    model: nn.Module,
    channels: Sequence[Channels],
    orders: Mapping[str, torch.Tensor],
    *,
    within: str = "",
) -> None:
    """Let channels of a model change places in all parameters at once, in place; values are only moved.

    The function of the model stays what it is, up to the order of summation. The residual stream itself comes out
    permuted: intermediate hidden states are no longer those of the original model. A model that is sparse in groups
    already loses its groups.

    Args:
        model: a model with weights.
        channels: from `find_channels`.
        orders: name of the channels -> int64 [sets, size]: what comes to each place, as in weight[:, order]. Channels
            that are not named stay.
        within: only parameters whose names begin with this ("model.layers.3."), for models whose blocks are in memory
            one at a time. Each parameter must be moved exactly once.

    Raises:
        ValueError: an unknown name, or an order that is not a permutation of each set.
    """
    by_name = {entry.name: entry for entry in channels}
    for name, order in orders.items():
        if name not in by_name:
            raise ValueError(f"orders names {name!r}, which is not a set of channels of this model")
        _check_order(by_name[name], order)
    moved: set[tuple[int, Slice]] = set()
    for name, order in orders.items():
        for piece in by_name[name].slices:
            if not piece.parameter.startswith(within):
                continue
            parameter = model.get_parameter(piece.parameter)
            # A tied parameter is reached by two names.
            once = (id(parameter), replace(piece, parameter=""))
            if once not in moved:
                moved.add(once)
                _move(parameter, piece, order.to(parameter.device))


def positions(piece: Slice, order: torch.Tensor) -> torch.Tensor:
    """Entries of a slice's dimension, in the order [sets, size] of its channels: int64 [sets * repeat * size]."""
    order = order.repeat_interleave(piece.repeat, 0)
    first = piece.start + piece.step * torch.arange(len(order), device=order.device)
    return (first[:, None] + order * piece.spacing).flatten()


def _move(parameter: torch.Tensor, piece: Slice, order: torch.Tensor) -> None:
    part = parameter if piece.expert is None else parameter[piece.expert]
    identity = torch.arange(order.shape[1], device=order.device).expand_as(order)
    index = torch.arange(part.shape[piece.dim], device=order.device)
    index[positions(piece, identity)] = positions(piece, order)
    part.copy_(part.index_select(piece.dim, index))


def _check_order(channels: Channels, order: torch.Tensor) -> None:
    wanted = (channels.sets, channels.size)
    if order.dtype != torch.int64 or tuple(order.shape) != wanted:
        raise ValueError(
            f"the order of {channels.name} must be int64 {list(wanted)}, got {order.dtype} {list(order.shape)}"
        )
    places = torch.arange(channels.size, device=order.device).expand(wanted)
    if not torch.equal(order.sort(1).values, places):
        raise ValueError(
            f"the order of {channels.name} must hold each of 0..{channels.size - 1} once in every row"
        )
