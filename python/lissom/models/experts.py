# SPDX-License-Identifier: Apache-2.0
"""Routed experts whose weights transformers keeps in one 3-D parameter per projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PROJECTIONS = ("gate_up_proj", "down_proj")


def matrix(module: nn.Module, projection: str, expert: int) -> torch.Tensor:
    """One expert's weight as a view `[out, in]` that shares memory with the fused parameter.

    Args:
        module: a fused experts module of transformers; its parameters are [E, out, in], or [E, in, out] where
            it says `is_transposed`.
        projection: name of the parameter.
        expert: which one.

    Returns:
        Tensor [out, in], detached.
    """
    fused: Any = module
    weight: torch.Tensor = getattr(fused, projection).detach()[expert]
    return weight.t() if fused.is_transposed else weight


def count(module: nn.Module) -> int | None:
    """The number of experts of a fused experts module; None when a module is not one that lissom can read.

    Args:
        module: any module.
    """
    fused: Any = module
    weights = [getattr(fused, projection, None) for projection in PROJECTIONS]
    if not all(isinstance(weight, torch.Tensor) and weight.dim() == 3 for weight in weights):
        return None
    if not getattr(fused, "has_gate", False) or not hasattr(fused, "_apply_gate"):
        return None
    return len(fused.gate_up_proj)
