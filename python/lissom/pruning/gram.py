# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of calibration inputs, and their inverse Cholesky factor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PANEL = 512  # columns per panel of the symmetric product: only panels on and above the diagonal are computed


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
        self._upper = torch.zeros(features, features, dtype=torch.float64, device=device)

    def __len__(self) -> int:
        return len(self._upper)

    def add(self, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add a batch of layer inputs.

        Args:
            inputs: [..., C] floating.
            mask: bool, one entry per token of `inputs`, False for padding; None when all tokens are real.

        Raises:
            ValueError: an input is infinite or NaN, or has another width than the matrix.
        """
        columns = len(self._upper)
        if inputs.shape[-1] != columns:
            raise ValueError(f"{self.name}: inputs must be [..., {columns}], got {list(inputs.shape)}")
        tokens = inputs.reshape(-1, columns)
        if mask is not None:
            tokens = tokens[mask]
        # Products of bfloat16 inputs lose nothing when the operands are rounded to bfloat16 (they are
        # bfloat16), so the fast units of the CPU give the float32 sum; every other type is multiplied in true
        # float32.
        precision = "bf16" if tokens.dtype == torch.bfloat16 else "ieee"
        values = tokens if tokens.dtype == torch.float64 else tokens.float()
        with matmul_precision(precision):
            for low in range(0, columns, _PANEL):
                high = min(low + _PANEL, columns)
                self._upper[low:high, low:] += values[:, low:high].t() @ values[:, low:]
        self.tokens += len(tokens)
        # |G_ij| <= sqrt(G_ii G_jj): the diagonal alone shows a non-finite input.
        if not torch.isfinite(self._upper.diagonal()).all():
            raise ValueError(
                f"{self.name}: calibration inputs are infinite or NaN (overflow in an earlier layer?); "
                "load the model in bfloat16 or float32"
            )

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
        upper = self._upper.triu()
        return (upper + upper.triu(1).t()).to(dtype)


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
    if not torch.isfinite(gram).all():
        raise ValueError(f"{wanted}, got infinite or NaN entries")
    diagonal = gram.diagonal()
    if (diagonal < 0).any():
        raise ValueError(f"{wanted}, got a negative diagonal entry ({diagonal.min().item():.3g})")
    skew = (gram - gram.t()).abs().max().item() if columns else 0.0
    if skew > 1e-4 * diagonal.max().item():
        raise ValueError(f"{wanted}, got entries that differ by {skew:.3g} across the diagonal")


def inverse_factor(gram: torch.Tensor, damp: float, name: str) -> torch.Tensor:
    """Upper Cholesky factor U of the inverse of the damped matrix: inv(H + lambda I) = U^T U.

    With H = R R^T for an upper triangular R (a Cholesky factorisation of H read backwards), U is the inverse
    of R: one factorisation and one triangular inverse, and the inverse of H itself is never formed.

    Args:
        gram: [C, C] with a positive diagonal (dead inputs set to 1).
        damp: lambda as a share of the mean diagonal.
        name: the layer, for warnings.

    Returns:
        Tensor [C, C], upper triangular.

    Raises:
        ValueError: the matrix is not positive definite even with damp 1.
    """
    mean = gram.diagonal().mean()
    while True:
        damped = gram.flip(0, 1)
        damped.diagonal().add_(damp * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0:
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
        if damp >= 1.0:
            raise ValueError(
                f"{name}: the Gram matrix is not positive definite even with damp 1; check the inputs"
            )
        raised = min(1.0, max(damp * 10, 1e-4))
        warnings.warn(
            f"{name}: Cholesky factorisation failed with damp {damp:g}; trying {raised:g}", stacklevel=2
        )
        damp = raised
