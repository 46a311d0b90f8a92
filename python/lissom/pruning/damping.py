# SPDX-License-Identifier: Apache-2.0
"""How much to damp a Gram matrix: as usual, or what does best on held-out tokens when there are few."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .gram import Gram, damp_
from .pattern import Pattern, mark
from .refit import refit
from .solver import relative_error

FEW_TOKENS_DAMP = 0.1  # where no tokens can be held out
_LEAST_DAMP, _MOST_DAMP, _SPREAD = 0.01, 0.15, 0.3  # the most is that of 2 C tokens
_CANDIDATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def usual_damp(columns: int, tokens: int) -> float:
    """The damping for 2 C tokens and more, 0.3 C / T but at least 0.01: the fewer tokens, the more is chance in H.

    On inputs of a real model the best damping for other tokens was 0.15 at T = 3.4 C, 0.03 to 0.1 at 18 C
    (docs/notes/pruning.md).

    Args:
        columns: inputs C.
        tokens: calibration tokens T.

    Returns:
        Share of the mean diagonal.

    Example:
        >>> usual_damp(1536, 65536), usual_damp(4864, 16384) > 0.08
        (0.01, True)
    """
    return min(max(_LEAST_DAMP, _SPREAD * columns / tokens), _MOST_DAMP)


def choose_damp(weights: Sequence[torch.Tensor], whole: Gram, half: Gram, pattern: Pattern) -> float:
    """The damping for all tokens, from the one whose solution for either half of them does best on the other.

    A Gram matrix of few tokens has directions that are small by chance; a solution that trusts them fits the
    calibration tokens and nothing else. The probe is Wanda's mask with refitted weights: the more a method
    compensates, the more damping it needs, and all methods end with the refit. Twice the tokens need less damping
    than a half, about one candidate less (docs/notes/pruning.md has the figures).

    Args:
        weights: matrices [R_i, C] that read the same input.
        whole: Gram matrix of all tokens.
        half: Gram matrix of about half of them.
        pattern: what is pruned.

    Returns:
        One of 0.01, 0.03, 0.1, 0.3.
    """
    first = half.matrix(torch.float32)
    second = whole.matrix(torch.float32) - first
    weight = torch.cat([each.float() for each in weights])
    rows = tuple(len(each) for each in weights)
    lost = dict.fromkeys(_CANDIDATES, 0.0)
    for fitted, held_out in ((first, second), (second, first)):
        scores = weight.abs() * fitted.diagonal().clamp_min(0).sqrt()
        pruned = mark(scores, pattern, scope="row", rows=rows, block=128)
        for damp in _CANDIDATES:
            solved = refit(weight, damp_(fitted.clone(), damp, whole.name), pruned)
            lost[damp] += relative_error(weight, solved, held_out)
    best = min(range(len(_CANDIDATES)), key=lambda place: lost[_CANDIDATES[place]])
    return _CANDIDATES[max(best - 1, 0)]
