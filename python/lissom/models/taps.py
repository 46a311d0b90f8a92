# SPDX-License-Identifier: Apache-2.0
"""Where the inputs of linear layers can be seen while a block runs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn


@dataclass(frozen=True)
class Seen:
    """One call of a tapped module.

    Attributes:
        args: its positional arguments.
        output: what it returned; None for a tap that reads before the module runs.
        count: tokens of the batch with its padding, B * T.
        real: bool [B * T], False for padding; None when every token is real.
    """

    args: tuple[Any, ...]
    output: Any
    count: int
    real: torch.Tensor | None

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """The real tokens of [B, T, C] or [B * T, C] states, as [N, C].

        Raises:
            RuntimeError: the states do not hold one row per token.
        """
        rows = states.reshape(-1, states.shape[-1])
        if len(rows) != self.count:
            raise RuntimeError(f"its input has {len(rows)} rows where the batch has {self.count} tokens")
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
        """
        return {group: self._tokens(seen) for group in wanted}

    def _tokens(self, seen: Seen) -> torch.Tensor:
        return seen.tokens(seen.args[0])
