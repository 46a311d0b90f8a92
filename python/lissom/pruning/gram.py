# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of calibration inputs, and their inverse Cholesky factor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .parallel import Ranks

_PANEL = 512  # columns per panel of a product: of the symmetric one, only panels on and above the diagonal are computed


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Fix what a float32 matmul computes with, on CPU (oneDNN) and GPU, whatever the user's own setting is.

    Args:
        precision: "ieee" (true float32) or "bf16" (operands rounded to bfloat16, float32 sums; CPU only).
    """
    backends: list[Any] = [getattr(torch.backends, name).matmul for name in ("mkldnn", "cuda")]
    before = [backend.fp32_precision for backend in backends]
    backends[0].fp32_precision = precision
    backends[1].fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.fp32_precision = value


class Gram:
    """Running sum of X X^T over calibration tokens: float32 products per batch, float64 sum over batches.

    Args:
        features: inputs of the layer, C.
        name: the layer, for error messages.
        device: where the sum lives.

    Example:
        >>> gram = Gram(2, "layer")
        >>> gram.add(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> gram.matrix().tolist()
        [[1.0, 2.0], [2.0, 5.0]]
    """

    def __init__(self, features: int, name: str, *, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.tokens = 0
        self._features = features
        # What lies on and above the diagonal, in panels of rows: half the memory of the matrix.
        self._panels = [
            torch.zeros(min(_PANEL, features - low), features - low, dtype=torch.float64, device=device)
            for low in range(0, features, _PANEL)
        ]

    def __len__(self) -> int:
        return self._features

    def diagonal(self) -> torch.Tensor:
        """Squared norms of the inputs, float64 [C]."""
        return torch.cat([panel.diagonal() for panel in self._panels])

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of layer inputs.

        Args:
            inputs: [N, C] floating; padding left out.

        Raises:
            ValueError: an input is infinite or NaN, or has another width than the matrix.
        """
        columns = len(self)
        if inputs.shape[1:] != (columns,):
            raise ValueError(f"{self.name}: inputs must be [tokens, {columns}], got {list(inputs.shape)}")
        with _product(inputs) as values:
            for low, panel in zip(range(0, columns, _PANEL), self._panels):
                panel += values[:, low : low + _PANEL].t() @ values[:, low:]
        self.tokens += len(inputs)
        # |G_ij| <= sqrt(G_ii G_jj): the diagonal alone shows a non-finite input.
        if not torch.isfinite(self.diagonal()).all():
            raise ValueError(
                f"{self.name}: calibration inputs are infinite or NaN (overflow in an earlier layer?); "
                "load the model in bfloat16 or float32"
            )

    def merge(self, other: Gram, share: float = 1.0) -> None:
        """Add another sum, or a share of it: as many of its tokens, of average size."""
        for panel, added in zip(self._panels, other._panels):
            panel.add_(added, alpha=share)
        self.tokens += round(other.tokens * share)

    def sum_over(self, ranks: Ranks) -> None:
        """Add up what all processes of a run have seen."""
        for panel in self._panels:
            ranks.sum_(panel)
        tokens = torch.tensor([self.tokens])
        self.tokens = int(ranks.sum_(tokens))

    def clear(self) -> None:
        """Give the memory of the sum back; width, name and number of tokens stay."""
        self._panels = []

    def matrix(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The sum as a full symmetric matrix.

        Args:
            dtype: of the result.

        Returns:
            Tensor [C, C].

        Raises:
            ValueError: no token was added.
        """
        if self.tokens == 0:
            raise ValueError(f"{self.name}: no calibration token reached this layer (is everything padding?)")
        first = self._panels[0]
        full = torch.empty(len(self), len(self), dtype=dtype, device=first.device)
        for low, panel in zip(range(0, len(self), _PANEL), self._panels):
            high = low + len(panel)
            corner = panel[:, : len(panel)].triu()
            full[low:high, low:high] = corner + corner.triu(1).t()
            full[low:high, high:] = panel[:, len(panel) :]
            full[high:, low:high] = panel[:, len(panel) :].t()
        return full


class CrossGram:
    """Running sum of X_dense X^T: what a layer reads in the dense model against what it reads in the pruned one.

    Args:
        features: inputs of the layer, C.
        device: where the sum lives.
    """

    def __init__(self, features: int, *, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, dense: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the same tokens [N, C] as both models see them."""
        with _product(dense) as left, _product(inputs) as right:
            for low in range(0, len(self._sum), _PANEL):
                self._sum[low : low + _PANEL] += left[:, low : low + _PANEL].t() @ right

    def sum_over(self, ranks: Ranks) -> None:
        """Add up what all processes of a run have seen."""
        ranks.sum_(self._sum)

    def matrix(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The sum, [C, C]; not symmetric."""
        return self._sum.to(dtype)


@contextmanager
def _product(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tokens in the type of a sum of products over them, and the precision that suits.

    Products of bfloat16 inputs lose nothing when the operands are rounded to bfloat16 (they are bfloat16), so
    the fast units of the CPU give the float32 sum; every other type is multiplied in true float32.
    """
    with matmul_precision("bf16" if tokens.dtype == torch.bfloat16 else "ieee"):
        yield tokens if tokens.dtype == torch.float64 else tokens.float()


def check_gram(gram: torch.Tensor, columns: int, name: str) -> None:
    """Refuse what cannot be a Gram matrix of a layer with `columns` inputs.

    Args:
        gram: the candidate.
        columns: C.
        name: the layer, for the message.

    Raises:
        ValueError: not a floating [C, C] matrix, not finite, a negative diagonal, or not symmetric.
    """
    wanted = f"{name}: H must be the symmetric [{columns}, {columns}] sum of x x^T over calibration inputs"
    if gram.shape != (columns, columns) or not gram.is_floating_point():
        raise ValueError(f"{wanted}, got {list(gram.shape)} {gram.dtype}")
    if not all(torch.isfinite(part).all() for part in gram.split(_PANEL)):
        raise ValueError(f"{wanted}, got infinite or NaN entries")
    diagonal = gram.diagonal()
    if (diagonal < 0).any():
        raise ValueError(f"{wanted}, got a negative diagonal entry ({diagonal.min().item():.3g})")
    panels = [slice(low, low + _PANEL) for low in range(0, columns, _PANEL)]
    skew = max(((gram[panel] - gram[:, panel].t()).abs().max().item() for panel in panels), default=0.0)
    if columns and skew > 1e-4 * diagonal.max().item():
        raise ValueError(f"{wanted}, got entries that differ by {skew:.3g} across the diagonal")


def damp_(gram: torch.Tensor, damp: float, name: str) -> torch.Tensor:
    """H + lambda I with lambda = damp * mean(diag(H)), raised until the matrix is positive definite. In place.

    Args:
        gram: H [C, C], symmetric; inputs that were zero on every token get a diagonal of 1.
        damp: lambda as a share of the mean diagonal.
        name: the layer, for warnings.

    Returns:
        The same matrix, positive definite.

    Raises:
        ValueError: the matrix is not positive definite even with damp 1.
    """
    diagonal = gram.diagonal().clone()
    mean = diagonal.mean()
    while True:
        gram.diagonal().copy_(torch.where(diagonal == 0, 1, diagonal) + damp * mean)
        if torch.linalg.cholesky_ex(gram).info.item() == 0:
            return gram
        if damp >= 1.0:
            raise ValueError(
                f"{name}: the Gram matrix is not positive definite even with damp 1; check the inputs"
            )
        raised = min(1.0, max(damp * 10, 1e-4))
        warnings.warn(
            f"{name}: Cholesky factorisation failed with damp {damp:g}; trying {raised:g}", stacklevel=2
        )
        damp = raised


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with inv(H) = U^T U.

    U is the inverse of the *upper* triangular R of H = R R^T: a Cholesky factorisation read backwards and one
    triangular inverse, without ever forming inv(H).

    Args:
        hessian: H [C, C], positive definite.

    Returns:
        Tensor [C, C], upper triangular.
    """
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True, out=eye)
