# SPDX-License-Identifier: Apache-2.0
"""Swaps the linears of a model for their sparse form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lissom import ops
from lissom.models import matches, packing_obstacles
from lissom.nn.sparse24_linear import Sparse24Linear
from lissom.reference.sparse24 import DTYPES, packed_bytes


@dataclass
class SparsifyReport:
    """What `sparsify` did: names swapped, (name, reason) of those it left, bytes of the weights before and after."""

    touched: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    dense_bytes: int = 0
    packed_bytes: int = 0

    def __str__(self) -> str:
        if not self.touched:
            return f"no linear was swapped; {len(self.left)} left"
        ratio = self.dense_bytes / self.packed_bytes
        counts = f"{len(self.touched)} linears swapped, {len(self.left)} left"
        return f"{counts}; their weights take {ratio:.2f}x fewer bytes"


def _as_linear(module: nn.Module) -> nn.Linear | None:
    """The module as an nn.Linear on the same weight, or None; Conv1D of transformers (GPT-2) is transposed."""
    if isinstance(module, nn.Linear):
        return None if isinstance(module, Sparse24Linear) else module
    if type(module).__name__ != "Conv1D" or not hasattr(module, "nf"):
        return None
    conv: Any = module
    linear = nn.Linear(conv.weight.shape[0], conv.weight.shape[1], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(conv.weight.detach().t(), requires_grad=False), conv.bias
    return linear.train(module.training)


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _reason_to_leave(linear: nn.Linear, *, shared: bool, hooked: bool) -> str | None:
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, not a plain nn.Linear"
    if shared:
        return "weight is shared with another module (tied)"
    if hooked:
        return "has hooks, which a swap would drop"
    if linear.weight.is_meta:
        return "weight has no data (meta device)"
    if linear.weight.dtype not in DTYPES:
        return f"dtype {linear.weight.dtype} has no kernel"
    if linear.in_features % 4:
        return f"in_features {linear.in_features} is not a multiple of 4"
    ok, row, quad = ops.sparse24_check(linear.weight.detach())
    return None if ok else f"not 2:4: row {row}, quad {quad} has more than two non-zeros"


def sparsify(
    model: nn.Module, *, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> SparsifyReport:
    """Swaps every nn.Linear (and GPT-2's Conv1D) whose weight is 2:4 for a `Sparse24Linear`, in place.

    Args:
        model: any module. include, exclude: module names, or "re:<regex>" matched against the whole name.

    Returns:
        What was touched, and what was left and why.

    >>> layer = nn.Linear(32, 16); _ = layer.weight.data.view(-1, 4)[:, :2].zero_()
    >>> print(sparsify(nn.Sequential(layer, nn.Linear(16, 3))))
    1 linears swapped, 1 left; their weights take 1.78x fewer bytes
    """
    report = SparsifyReport()
    uses: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        if parameter.dim() == 3 and "expert" in name:
            report.left.append((name, "is a fused weight of experts, for which there is no 2:4 kernel yet"))
    obstacles = packing_obstacles(model)
    for name, module in list(model.named_modules()):
        linear = _as_linear(module)
        if linear is None:
            continue
        if not name:
            report.left.append((name, "is the model itself: use Sparse24Linear.from_linear"))
            continue
        if (include is not None and not matches(name, include)) or (exclude and matches(name, exclude)):
            report.left.append((name, "excluded"))
            continue
        shared = uses.get(id(module.weight), 0) > 1
        reason = obstacles.get(name) or _reason_to_leave(linear, shared=shared, hooked=_has_hooks(module))
        if reason is not None:
            report.left.append((name, reason))
            continue
        sparse = Sparse24Linear.from_linear(linear)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, sparse)
        report.touched.append(name)
        report.dense_bytes += linear.weight.numel() * linear.weight.element_size()
        report.packed_bytes += packed_bytes(linear.out_features, linear.in_features, linear.weight.dtype)
    return report
