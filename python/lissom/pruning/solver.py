# SPDX-License-Identifier: Apache-2.0
"""Prunes the weights that read one input: checks, precision, the method, and the error that remains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .gram import check_gram, matmul_precision
from .pattern import Pattern
from .problem import Options, Problem, Solution
from .sparsegpt import prune_by_sparsegpt
from .wanda import prune_by_magnitude, prune_by_wanda

METHODS: dict[str, Callable[[Problem], Solution]] = {
    "magnitude": prune_by_magnitude,
    "wanda": prune_by_wanda,
    "sparsegpt": prune_by_sparsegpt,
}


@dataclass(frozen=True)
class Pruned:
    """One pruned weight.

    Attributes:
        weight: [R, C] in the storage dtype, exact zeros where pruned.
        mask: bool [R, C], True where a weight was pruned (a kept weight may round to zero as well).
        relative_error: ||W' X - W X||^2 / ||W X||^2 of the stored weight, undamped; None without a Gram
            matrix.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    relative_error: float | None


def prune_weight(
    weight: torch.Tensor,
    gram: torch.Tensor | None = None,
    *,
    pattern: str | float | Pattern,
    method: str,
    damp: float = 0.01,
    options: Options | None = None,
) -> torch.Tensor:
    """Prune one weight matrix against the Gram matrix of its inputs. A pure function.

    Args:
        weight: [R, C] floating; rows are outputs, patterns run along the C inputs.
        gram: H = X X^T [C, C] over calibration inputs, at any scale; "magnitude" needs none.
        pattern: "n:m" (n kept of m neighbouring inputs), "50%" or 0.5 (share pruned).
        method: "magnitude", "wanda" or "sparsegpt".
        damp: lambda = damp * mean(diag(H)) is added to H before it is inverted.
        options: block size, scope of comparison, order of the columns.

    Returns:
        Tensor [R, C] in the dtype of `weight`. Solved in float32 (float64 for float64) and cast last; with
        sparsity 0 it is the input, bit for bit.

    Raises:
        ValueError: shapes, values or options that cannot be pruned.

    Source: Frantar and Alistarh, arXiv 2301.00774, algorithm 1; Sun et al., arXiv 2306.11695, equation 1.

    Example:
        >>> prune_weight(torch.tensor([[4.0, -1.0, 2.0, 3.0]]), pattern="2:4", method="magnitude").tolist()
        [[4.0, 0.0, 0.0, 3.0]]
    """
    parsed = Pattern.parse(pattern)
    solved = prune_group([weight], gram, pattern=parsed, method=method, damp=damp, options=options)
    return solved[0].weight


@torch.no_grad()
def prune_group(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor | None,
    *,
    pattern: Pattern,
    method: str,
    damp: float = 0.01,
    options: Options | None = None,
    name: str = "weight",
) -> list[Pruned]:
    """Prune weights that read the same input together: one Gram matrix, one factorisation, one pass.

    Args:
        weights: matrices [R_i, C] of one dtype.
        gram: H = X X^T [C, C], undamped; None only for "magnitude".
        pattern: what to prune.
        method: key of METHODS.
        damp: as for `prune_weight`.
        options: as for `prune_weight`.
        name: of the group, for messages.

    Returns:
        One result for each weight, in order.

    Raises:
        ValueError: as for `prune_weight`.
    """
    solve = find_method(method)
    check_damp(damp)
    for weight in weights:
        _check_weight(weight, pattern, name)
    columns = weights[0].shape[1]
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    if gram is None and method != "magnitude":
        raise ValueError(f"{name}: method {method!r} needs the Gram matrix H of the layer's inputs; got None")
    if gram is not None:
        check_gram(gram, columns, name)
        gram = gram.to(dtype)
    if pattern.sparsity == 0:
        return [Pruned(weight.clone(), torch.zeros_like(weight, dtype=torch.bool), 0.0) for weight in weights]
    rows = tuple(len(weight) for weight in weights)
    stacked = torch.cat([weight.to(dtype) for weight in weights])
    with matmul_precision("ieee"):
        solution = solve(Problem(stacked, gram, pattern, rows, damp, options or Options(), name))
        results = []
        for weight, solved, mask in zip(weights, solution.weight.split(rows), solution.pruned.split(rows)):
            # The cast comes last and the zeros are written after it, so that the error is that of the stored
            # weight.
            stored = solved.to(weight.dtype).masked_fill_(mask, 0)
            error = None if gram is None else relative_error(weight, stored, gram)
            results.append(Pruned(stored, mask, error))
    return results


def relative_error(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """||W' X - W X||_F^2 / ||W X||_F^2 from the undamped H = X X^T.

    Args:
        weight: W [R, C].
        pruned: W' [R, C].
        gram: H [C, C]; any scale.

    Returns:
        The ratio; 0 when both are zero.
    """
    original = weight.to(gram.dtype)
    change = pruned.to(gram.dtype) - original
    lost = ((change @ gram) * change).sum(dtype=torch.float64).item()
    whole = ((original @ gram) * original).sum(dtype=torch.float64).item()
    if whole <= 0:
        return 0.0 if lost <= 0 else float("inf")
    return max(lost, 0.0) / whole


def find_method(method: str) -> Callable[[Problem], Solution]:
    """The solver of a method's name.

    Raises:
        ValueError: the name is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


def check_damp(damp: float) -> None:
    """Refuse a damping outside [0, 1].

    Raises:
        ValueError: it is outside.
    """
    if not 0 <= damp <= 1:
        raise ValueError(f"damp must lie in [0, 1], got {damp!r}; 0.01 is usual")


def _check_weight(weight: torch.Tensor, pattern: Pattern, name: str) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name}: weight must be a floating [out, in] matrix, got {list(weight.shape)} {weight.dtype}"
        )
    if weight.is_meta:
        raise ValueError(f"{name}: weight is on the meta device and holds no values; load the model first")
    obstacle = pattern.obstacle(weight.shape[1])
    if obstacle:
        raise ValueError(f"{name}: pattern {pattern} does not fit: {obstacle}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: weight holds infinite or NaN values")
