# SPDX-License-Identifier: Apache-2.0
"""Where the inputs of linear layers can be seen while a block runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from .experts import matrix


class TapError(RuntimeError):
    """A module was called with something else than one row per token."""


@dataclass(frozen=True)
class Seen:
    """One call of a tapped module.

    Attributes:
        args: its positional arguments.
        output: what it returned; None for a tap that reads before the module runs.
        count: tokens of the batch with its padding, B * T.
        real: bool [B * T], False for padding; None when every token is real.
        shares: of routed groups: read this share of all tokens, evenly spread, instead of those routed there.
    """

    args: tuple[Any, ...]
    output: Any
    count: int
    real: torch.Tensor | None
    shares: Mapping[str, float] = field(default_factory=dict)

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """The real tokens of [B, T, C] or [B * T, C] states, as [N, C].

        Raises:
            TapError: the states do not hold one row per token.
        """
        rows = states.reshape(-1, states.shape[-1])
        if len(rows) != self.count:
            raise TapError(f"its input has {len(rows)} rows where the batch has {self.count} tokens")
        return rows if self.real is None else rows[self.real]


@dataclass(frozen=True)
class Tap:
    """Reads the input of one group: the first argument of `module`.

    Attributes:
        module: the module whose call is watched.
        groups: the groups whose inputs it shows.
    """

    module: nn.Module
    groups: tuple[str, ...]
    after: ClassVar[bool] = False  # read behind the module's forward pass instead of in front of it

    def read(self, seen: Seen, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        """The inputs of the wanted groups, real tokens only.

        Args:
            seen: the call of the module.
            wanted: some of `groups`.

        Returns:
            Group name -> [N, C], in token order.

        Raises:
            TapError: the call does not hold one row per token.
        """
        return {group: seen.tokens(seen.args[0]) for group in wanted}


@dataclass(frozen=True)
class SliceTap(Tap):
    """Reads the input of a linear that is never called off the output of the linear before it.

    Attributes:
        width: leading columns of the output of `module` that are the input.
        norm: applied to them in between, or None.
    """

    width: int
    norm: nn.Module | None
    after: ClassVar[bool] = True

    def read(self, seen: Seen, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        tokens = seen.tokens(seen.output)[:, : self.width]
        return {group: tokens if self.norm is None else self.norm(tokens) for group in wanted}


@dataclass(frozen=True)
class ExpertsTap(Tap):
    """Reads the inputs of fused experts: of each projection in front, the tokens that the router sends there.

    `module` is called with (hidden states [B * T, C], indices of the chosen experts [B * T, k], ...).
    `groups` holds one group per expert for gate_up_proj, then one per expert for down_proj; the input of
    the latter is computed from that of the former as the module itself does.
    """

    def read(self, seen: Seen, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        experts, asked = len(self.groups) // 2, set(wanted)
        tokens, choice = seen.tokens(seen.args[0]), seen.tokens(seen.args[1])
        counts = choice.flatten().bincount(minlength=experts).tolist()
        if len(counts) > experts:
            raise TapError(f"a token is routed to expert {len(counts) - 1} of {experts}")
        # A stable sort by expert keeps the tokens of an expert in order.
        rows = choice.flatten().argsort(stable=True) // choice.shape[1]
        shown = {}
        for number, mine in enumerate(rows.split(counts)):
            gate_up, down = self.groups[number], self.groups[experts + number]
            if gate_up in asked:
                shown[gate_up] = tokens[_spread(len(tokens), seen.shares.get(gate_up), mine)]
            if down in asked:
                sent = tokens[_spread(len(tokens), seen.shares.get(down), mine)]
                shown[down] = self._between(number, sent)
        return shown

    def _between(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
        """What one expert's down_proj reads, [N, I], for the tokens [N, C] that its gate_up_proj reads."""
        module: Any = self.module
        weight = matrix(module, "gate_up_proj", number)
        bias = module.gate_up_proj_bias[number] if module.has_bias else None
        out: torch.Tensor = module._apply_gate(F.linear(tokens.to(weight.dtype), weight, bias))
        return out


def _spread(count: int, share: float | None, routed: torch.Tensor) -> torch.Tensor:
    """Rows of a share of `count` tokens, evenly spread, at least one; the routed rows where no share is given."""
    if share is None:
        return routed
    steps = (torch.arange(count + 1, dtype=torch.float64) * share).ceil()
    return (steps[1:] > steps[:-1]).nonzero()[:, 0].to(routed.device)
