# SPDX-License-Identifier: Apache-2.0
"""Methods that only choose a mask: magnitude, and Wanda (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

import torch

from .pattern import mark
from .problem import Problem, Solution


def prune_by_magnitude(problem: Problem) -> Solution:
    """Zero the weights of least absolute value; an unstructured pattern compares within a layer.

    Args:
        problem: the layers and the pattern; the Gram matrix is not used.

    Returns:
        The weights as they are, and the mask.
    """
    return _zero_lowest(problem, problem.weight.abs(), scope="layer")


def prune_by_wanda(problem: Problem) -> Solution:
    """Zero the weights of least |w_rj| ||X_j||_2; an unstructured pattern compares within a row.

    Args:
        problem: the layers, the Gram matrix (its diagonal holds the squared input norms) and the pattern.

    Returns:
        The weights as they are, and the mask.
    """
    assert problem.gram is not None, "prune_group checks it"
    return _zero_lowest(problem, problem.weight.abs() * problem.gram.diagonal().sqrt(), scope="row")


def _zero_lowest(problem: Problem, scores: torch.Tensor, *, scope: str) -> Solution:
    options = problem.options
    pruned = mark(
        scores, problem.pattern, scope=options.scope or scope, rows=problem.rows, block=options.blocksize
    )
    return Solution(problem.weight, pruned)
