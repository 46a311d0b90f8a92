# SPDX-License-Identifier: Apache-2.0
"""Prunes the weights that read one input: checks, precision, the method, and the error that remains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from .alps import prune_by_alps
from .gram import check_gram, damp_, matmul_precision
from .mrp import prune_by_mrp
from .pattern import Pattern, check_frozen
from .problem import Options, Problem, Solution
from .refit import refit, refit_exactly
from .sparsegpt import prune_by_sparsegpt
from .wanda import prune_by_magnitude, prune_by_wanda

METHODS: dict[str, Callable[[Problem], Solution]] = {
    "magnitude": prune_by_magnitude,
    "wanda": prune_by_wanda,
    "sparsegpt": prune_by_sparsegpt,
    "mrp": prune_by_mrp,
    "alps": prune_by_alps,
}
COMPENSATING = ("sparsegpt", "mrp", "alps")
_SWEEPS = {prune_by_sparsegpt, prune_by_mrp}
_SAFE_EXPONENT = 40  # squares of 2^40, over a small diagonal and summed over many columns, stay below 2^127


@dataclass(frozen=True)
class Moments:
    """Second moments of the calibration inputs of a group of layers.

    Attributes:
        gram: H0 = X X^T [C, C] of the inputs that the pruned model makes, undamped.
        cross: X_dense X^T [C, C], the inputs of the same tokens in the dense model against them; None when
            the target is the layer's own output.
        blend: weight of the dense model's outputs in the target, 0 to 1.
    """

    gram: torch.Tensor
    cross: torch.Tensor | None = None
    blend: float = 0.0


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
    method: str = "alps",
    damp: float = 0.01,
    options: Options | None = None,
    preserve: torch.Tensor | None = None,
) -> torch.Tensor:
    """Prune one weight matrix against the Gram matrix of its inputs. A pure function.

    Args:
        weight: [R, C] floating; rows are outputs, patterns run along the C inputs.
        gram: H = X X^T [C, C] over calibration inputs, at any scale that its type holds; "magnitude" can do
            without.
        pattern: "n:m" (n kept of m neighbouring inputs), "50%" or 0.5 (share pruned), "2:4+70%" (2:4, then
            more inside), "2:4t" (2:4 along rows and columns).
        method: "magnitude", "wanda", "sparsegpt", "mrp" or "alps".
        damp: lambda = damp * mean(diag(H)) is added to H before anything is solved.
        options: refit, variant, block size, scope of comparison, order of the columns.
        preserve: bool [R, C], True where a weight is pruned already and stays so; it counts towards the
            pattern.

    Returns:
        Tensor [R, C] in the dtype of `weight`. Solved in float32 (float64 for float64) and cast last; with
        sparsity 0 it is the input, bit for bit.

    Raises:
        ValueError: shapes, values or options that cannot be pruned.

    Source: arXiv 2410.15567 (joint removal), 2406.07831 (alps), 2301.00774 (sparsegpt), 2306.11695 (wanda).

    Example:
        >>> prune_weight(torch.tensor([[4.0, -1.0, 2.0, 3.0]]), pattern="2:4", method="magnitude").tolist()
        [[4.0, 0.0, 0.0, 3.0]]
    """
    parsed = Pattern.parse(pattern)
    find_method(method)
    check_options(method, options or Options())
    moments = None if gram is None else Moments(gram)
    solved = prune_group(
        [weight], moments, pattern=parsed, method=method, damp=damp, options=options, preserve=preserve
    )
    return solved[0].weight


@torch.no_grad()
def prune_group(
    weights: Sequence[torch.Tensor],
    moments: Moments | None,
    *,
    pattern: Pattern,
    method: str,
    damp: float = 0.01,
    options: Options | None = None,
    preserve: torch.Tensor | None = None,
    name: str = "weight",
) -> list[Pruned]:
    """Prune weights that read the same input together: one Hessian, one factorisation, one pass.

    Args:
        weights: matrices [R_i, C] of one dtype.
        moments: of their inputs; None only for "magnitude".
        pattern, method, damp, options: as for `prune_weight`.
        preserve: as for `prune_weight`, of the stacked weights [R, C].
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
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    _check_moments(moments, method, weights[0].shape[1], name)
    stacked = torch.cat([weight.to(dtype) for weight in weights])
    if preserve is not None:
        check_frozen(preserve, pattern, (len(stacked), stacked.shape[1]), name=name)
    if pattern.sparsity == 0 or not stacked.numel():
        return [Pruned(weight.clone(), torch.zeros_like(weight, dtype=torch.bool), 0.0) for weight in weights]
    rows = tuple(len(weight) for weight in weights)
    with matmul_precision("ieee"):
        # Scores are squares of weights: large ones would overflow, and infinite scores cannot be ranked.
        shift = _excess(stacked)
        solution = _solve(
            _pose(
                stacked * 2.0**-shift if shift else stacked,
                moments,
                rows=rows,
                pattern=pattern,
                damp=damp,
                options=options or Options(),
                frozen=preserve,
                name=name,
            ),
            solve,
        )
        found = solution.weight * 2.0**shift if shift else solution.weight
        results = []
        for weight, solved, mask in zip(weights, found.split(rows), solution.pruned.split(rows)):
            stored = _stored(solved, mask, weight.dtype, name)
            error = None if moments is None else relative_error(weight, stored, moments.gram.to(dtype))
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
    original, change = weight.to(gram.dtype), pruned.to(gram.dtype)
    shift = _excess(original)
    if shift:
        original, change = original * 2.0**-shift, change * 2.0**-shift
    change = change - original
    lost, whole = _energy(change, gram), _energy(original, gram)
    if whole <= 0:
        return 0.0 if lost <= 0 else float("inf")
    return max(lost, 0.0) / whole


def _energy(weight: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(W H W^T), over a power of two that belongs to H: half of it on either side, so that H is not copied."""
    scaled = weight * 2.0 ** -(_magnitude(gram) // 2)
    return (scaled @ gram).mul_(scaled).sum(dtype=torch.float64).item()


def _pose(
    weight: torch.Tensor,
    moments: Moments | None,
    *,
    rows: tuple[int, ...],
    pattern: Pattern,
    damp: float,
    options: Options,
    frozen: torch.Tensor | None,
    name: str,
) -> Problem:
    """State the problem in the precision of the solve, with a Hessian of about unit scale."""
    if moments is None:
        return Problem(weight, None, None, pattern, rows, frozen, options)
    magnitude = _magnitude(moments.gram)
    hessian = _normalised(moments.gram, weight.dtype, magnitude)
    norms = hessian.diagonal().sqrt()
    apart = None
    if moments.cross is not None and moments.blend > 0:
        apart = _normalised(moments.cross, weight.dtype, magnitude).sub_(hessian)
    damp_(hessian, damp, name)
    if apart is not None:
        weight = blended_target(weight, hessian, apart, moments.blend)
    return Problem(weight * (norms > 0), hessian, norms, pattern, rows, frozen, options)


def _magnitude(gram: torch.Tensor) -> int:
    """The power of two next to the mean diagonal."""
    mean = gram.diagonal().double().mean().item() if len(gram) else 0.0
    return math.frexp(mean)[1]


def _normalised(matrix: torch.Tensor, dtype: torch.dtype, magnitude: int) -> torch.Tensor:
    """A matrix over 2^magnitude: exact, so that a solve at another scale is the same one bit for bit."""
    limit = 1000 if matrix.dtype == torch.float64 else 126
    wide = torch.promote_types(matrix.dtype, dtype)
    return (matrix.to(wide) * 2.0 ** -max(-limit, min(magnitude, limit))).to(dtype)


def _excess(weight: torch.Tensor) -> int:
    """By how many powers of two the largest weight is outside the range whose squares and sums are safe."""
    if not weight.numel():
        return 0
    low, high = weight.aminmax()
    exponent = math.frexp(max(high.item(), -low.item()))[1]
    return exponent - max(-_SAFE_EXPONENT, min(exponent, _SAFE_EXPONENT))


def _stored(solved: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The weight as it is kept: cast last and zeros written after it, so that its error is the one reported.

    Raises:
        ValueError: a kept weight does not fit into the type.
    """
    stored = solved.to(dtype).masked_fill_(mask, 0)
    lost = int((~torch.isfinite(stored)).sum())
    if lost:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: {lost} kept weights are too large for {kind} once they make up for the pruned ones; "
            "load the model in bfloat16 or float32, raise damp, or leave the layer out (exclude)"
        )
    return stored


def blended_target(
    weight: torch.Tensor, hessian: torch.Tensor, apart: torch.Tensor, blend: float
) -> torch.Tensor:
    """The dense weight whose outputs on the pruned model's inputs come nearest to a blend of two targets.

    To minimise || W' X - (1 - b) W X - b W X_dense ||^2 + lambda || W' - W ||^2 has the normal equations
    W' H = W ((1 - b) X X^T + b X_dense X^T + lambda I), so W + b W (X_dense X^T - X X^T) inv(H) takes the
    place of W in everything else: the rest of the objective is (W' - target) H (W' - target)^T.

    Args:
        weight: W [R, C].
        hessian: H = X X^T + lambda I [C, C].
        apart: X_dense X^T - X X^T [C, C].
        blend: b, of the dense model's outputs.

    Returns:
        Tensor [R, C].
    """
    lower = torch.linalg.cholesky(hessian)
    half = torch.linalg.solve_triangular(lower.t(), weight @ apart, upper=True, left=False)
    shift = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
    return torch.add(weight, shift, alpha=blend)  # in the layout of the first, row by row


def _solve(problem: Problem, method: Callable[[Problem], Solution]) -> Solution:
    """Mask and weights: the method's stages, then the refit."""
    pattern = problem.pattern
    whole = problem
    if pattern.transposable and method in _SWEEPS:
        # A pass over columns cannot choose along rows as well: the mask is Wanda's, the pass compensates.
        problem = _within(problem, prune_by_wanda(problem).pruned)
    elif pattern.raised and method in _SWEEPS | {prune_by_alps}:
        bare = replace(pattern, sparsity=Fraction(pattern.pruned_per_group, pattern.group or 1))
        problem = _within(problem, method(replace(problem, pattern=bare)).pruned)
    solution = method(problem)
    if not problem.options.refit or whole.hessian is None:
        return solution
    if problem.options.refit == "exact":
        return Solution(refit_exactly(whole.weight, whole.hessian, solution.pruned), solution.pruned)
    # ADMM ends within 0.2 % of the optimum for its mask; a pass over columns starts 36 % above it, and 11 steps,
    # which cost 1.2 times SparseGPT itself, take that to one percent.
    iterations = 6 if method is prune_by_alps else 11
    weight = refit(whole.weight, whole.hessian, solution.pruned, start=solution.weight, iterations=iterations)
    return Solution(weight, solution.pruned)


def _within(problem: Problem, pruned: torch.Tensor) -> Problem:
    """The same problem with a first mask that stays, and the pattern's whole share left to prune."""
    return replace(problem, pattern=Pattern(problem.pattern.sparsity), frozen=pruned)


def find_method(method: str) -> Callable[[Problem], Solution]:
    """The solver of a method's name.

    Raises:
        ValueError: the name is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


def check_options(method: str, options: Options) -> None:
    """Refuse a choice that a method would pass over.

    Args:
        method: a method's name.
        options: the choices.

    Raises:
        ValueError: `variant` or `act_order` where the method has no such choice.
    """
    if options.variant is not None and method != "mrp":
        raise ValueError(
            f"variant {options.variant!r} is a choice within method 'mrp', got method {method!r}: leave it out"
        )
    if options.act_order and method != "sparsegpt" and options.variant != "SS":
        raise ValueError(
            f"act_order is about the pass of method 'sparsegpt' over the columns, got method {method!r}: leave it out"
        )


def check_damp(damp: float) -> None:
    """Refuse a damping outside [0, 1].

    Raises:
        ValueError: it is outside.
    """
    if not 0 <= damp <= 1:
        raise ValueError(f"damp must lie in [0, 1], got {damp!r}; 0.01 is usual")


def _check_moments(moments: Moments | None, method: str, columns: int, name: str) -> None:
    if moments is None and method != "magnitude":
        raise ValueError(f"{name}: method {method!r} needs the Gram matrix H of the layer's inputs; got None")
    if moments is not None and columns:
        check_gram(moments.gram, columns, name)


def _check_weight(weight: torch.Tensor, pattern: Pattern, name: str) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name}: weight must be a floating [out, in] matrix, got {list(weight.shape)} {weight.dtype}"
        )
    if weight.is_meta:
        raise ValueError(f"{name}: weight is on the meta device and holds no values; load the model first")
    obstacle = pattern.obstacle(weight.shape[1], weight.shape[0])
    if obstacle:
        raise ValueError(f"{name}: pattern {pattern} does not fit: {obstacle}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: weight holds infinite or NaN values")
