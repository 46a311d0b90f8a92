# SPDX-License-Identifier: Apache-2.0
"""Methods that only choose a mask: magnitude, and Wanda (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from .problem import Problem, Solution


def prune_by_magnitude(problem: Problem) -> Solution:
    """Zero the weights of least absolute value; an unstructured pattern compares within a layer.

    Args:
        problem: the layers and the pattern; statistics are not used.

    Returns:
        The weights as they are, and the mask.
    """
    return Solution(problem.weight, problem.mark(problem.weight.abs(), scope="layer"))


def prune_by_wanda(problem: Problem) -> Solution:
    """Zero the weights of least |w_rj| ||X_j||_2; an unstructured pattern compares within a row.

    Args:
        problem: the layers, the norms of their inputs and the pattern.

    Returns:
        The weights as they are, and the mask.
    """
    assert problem.norms is not None, "prune_group checks it"
    return Solution(problem.weight, problem.mark(problem.weight.abs() * problem.norms, scope="row"))
