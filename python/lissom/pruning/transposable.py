# SPDX-License-Identifier: Apache-2.0
"""Transposable n:m masks: the pattern holds along inputs and outputs, so W and W^T both run packed."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch

LARGEST_TILE = 4  # 90 masks of a tile for 2:4; for m = 6 there would be up to 297,200
_TILES_AT_ONCE = 1 << 12  # a strip's kept scores, V x tiles in float64, then take 3 MB
_LARGEST_SCORE = 1e300  # stands for infinity: 0 * inf would be NaN in the product with the masks


def transposable_mask(
    scores: torch.Tensor, kept: int, size: int, *, frozen: torch.Tensor | None = None
) -> torch.Tensor:
    """Prune each m x m tile by the mask that keeps the greatest sum of scores with n per row and column.

    All valid masks of a tile are compared (90 for 2:4), so the choice is exact; float32 scores are added in
    float64. Among equal sums the mask that prunes earlier entries, read row by row, is taken.

    Args:
        scores: [R, C] floating, free of NaN, R and C divisible by m; the lowest are pruned.
        kept: n, entries kept in each row and column of a tile.
        size: m <= 4, rows and columns of a tile.
        frozen: bool [R, C], entries that are pruned already: as many as possible are part of the tile's mask,
            and the others stay pruned beside it.

    Returns:
        Bool tensor [R, C], True where a weight is pruned.

    Raises:
        ValueError: R or C is not divisible by m, n outside 1 to m, or m > 4.

    Source: the problem is that of Hubara et al., arXiv 2102.08124, section 4.

    Example:
        >>> scores = torch.tensor([[5.0, 9.0], [2.0, 5.0]])
        >>> transposable_mask(scores, 1, 2).int().tolist()
        [[1, 0], [0, 1]]
    """
    if not 0 < kept <= size <= LARGEST_TILE:
        raise ValueError(
            f"transposable masks are made for n:m patterns with m up to {LARGEST_TILE}, got {kept}:{size}"
        )
    rows, columns = scores.shape
    if rows % size or columns % size:
        raise ValueError(
            f"pattern {kept}:{size}t takes a weight whose outputs and inputs both divide by {size}, "
            f"got {list(scores.shape)}"
        )
    masks = _tile_masks(kept, size).to(scores.device)
    keep = masks.logical_not().double()
    pruned = torch.empty(rows, columns, dtype=torch.bool, device=scores.device)
    across = columns // size
    height = max(1, _TILES_AT_ONCE // max(across, 1)) * size
    for top in range(0, rows, height):
        strip = slice(top, top + height)
        held = None if frozen is None else _tiles(frozen[strip], size)
        best = _best_masks(_tiles(scores[strip], size), keep, held)
        chosen = masks[best].view(-1, across, size, size).permute(0, 2, 1, 3)
        pruned[strip] = chosen.reshape(-1, columns)
    return pruned if frozen is None else pruned | frozen


def _best_masks(tiles: torch.Tensor, keep: torch.Tensor, frozen: torch.Tensor | None) -> torch.Tensor:
    """Index [tiles] of the mask [V, m*m] that keeps fewest frozen entries and then the greatest score."""
    tiles = tiles.clamp(-_LARGEST_SCORE, _LARGEST_SCORE)
    if frozen is None:
        return (keep @ tiles).argmax(0)
    reopened = keep @ frozen
    total = keep @ tiles.masked_fill_(frozen.bool(), 0)
    return total.masked_fill_(reopened > reopened.amin(0), -torch.inf).argmax(0)


def _tiles(values: torch.Tensor, size: int) -> torch.Tensor:
    """The tiles of [R, C] as float64 columns [m*m, tiles]; tiles and their entries run row by row."""
    rows, columns = values.shape
    split = values.reshape(rows // size, size, columns // size, size)
    return split.permute(1, 3, 0, 2).to(torch.float64).reshape(size * size, -1)


@lru_cache
def _tile_masks(kept: int, size: int) -> torch.Tensor:
    """Every pruned mask [V, m*m] with m - n True per row and column, those that prune early entries first."""
    choices = itertools.combinations(range(size), size - kept)
    lines = [[column in choice for column in range(size)] for choice in choices]
    tiles = itertools.product(lines, repeat=size)
    valid = [tile for tile in tiles if all(sum(column) == size - kept for column in zip(*tile))]
    return torch.tensor(valid).view(len(valid), size * size)
