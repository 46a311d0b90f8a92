# SPDX-License-Identifier: Apache-2.0
from itertools import combinations

import pytest
import torch

from lissom.models.tiny import build_tiny
from lissom.pruning import Options, prune_model, prune_weight
from lissom.pruning.pattern import Pattern
from lissom.pruning.refit import refit_exactly
from lissom.pruning.solver import relative_error


def _reference(weight, gram, pattern, variant, block, damp=0.01):
    """Block by block and row by row, every inverse formed anew (arXiv 2410.15567, equations 11 to 14)."""
    columns = weight.shape[1]
    hessian = gram + damp * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    work, gone = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    width = pattern.group if variant == "MS" else block
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        inverse = torch.linalg.inv(hessian[start:, start:])
        tile = work[:, start:stop]
        if pattern.group is None:
            scores = tile**2 / inverse.diagonal()[: stop - start]
            count = pattern.count(len(weight) * stop) - pattern.count(len(weight) * start)
            lowest = scores.flatten().sort(stable=True).indices[:count]
            gone[:, start:stop] = (
                torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, lowest, True).view_as(scores)
            )
        else:
            for row in range(len(weight)):
                for low in range(0, stop - start, pattern.group):
                    sets = list(combinations(range(low, low + pattern.group), pattern.pruned_per_group))
                    if variant[0] == "M":
                        losses = [
                            tile[row, list(q)]
                            @ torch.linalg.inv(inverse[list(q)][:, list(q)])
                            @ tile[row, list(q)]
                            for q in sets
                        ]
                    else:
                        losses = [sum(tile[row, j] ** 2 / inverse[j, j] for j in q) for q in sets]
                    best = min(range(len(sets)), key=lambda k: losses[k].item())
                    gone[row, [start + j for j in sets[best]]] = True
        for row in range(len(weight)):
            if variant[1] == "M":
                out = gone[row, start:stop].nonzero()[:, 0]
                share = tile[row, out] @ torch.linalg.inv(inverse[out][:, out])
                work[row, start:] -= share @ inverse[out]
            else:
                for j in range(start, stop):
                    if gone[row, j]:
                        trailing = torch.linalg.inv(hessian[j:, j:])
                        work[row, j:] -= work[row, j] / trailing[0, 0] * trailing[0]
        work[:, start:stop][gone[:, start:stop]] = 0
    return work


@pytest.mark.parametrize(
    "pattern, variant",
    [("2:4", "SM"), ("2:4", "MM"), ("2:4", "MS"), ("1:4", "MM"), ("2:6", "MM"), ("50%", "SM"), ("70%", "SM")],
)
@pytest.mark.parametrize("block", [12, 48])
def test_equals_its_definition(layer, pattern, variant, block):
    weight, gram = layer(48, rows=7, tokens=300)
    expected = _reference(weight, gram, Pattern.parse(pattern), variant, block)
    options = Options(refit=False, variant=variant, blocksize=block)
    pruned = prune_weight(weight, gram, pattern=pattern, method="mrp", options=options)
    torch.testing.assert_close(pruned, expected, rtol=1e-8, atol=1e-10)


def test_one_block_over_the_whole_row_is_the_optimum(layer):
    weight, gram = layer(48, rows=16, tokens=300)
    options = Options(refit=False, variant="MM", blocksize=48)
    pruned = prune_weight(weight, gram, pattern="2:4", method="mrp", options=options)
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(48, dtype=gram.dtype)
    torch.testing.assert_close(pruned, refit_exactly(weight, hessian, pruned == 0), rtol=1e-8, atol=1e-9)


def test_variants_keep_their_known_order(layer):
    """Joint compensation is where the gain is; the joint score by itself is worth little."""
    errors = dict.fromkeys(("SS", "SM", "MS", "MM"), 0.0)
    for seed in range(2):
        weight, gram = layer(256, seed=seed)
        for variant in errors:
            options = Options(refit=False, variant=variant)
            pruned = prune_weight(weight, gram, pattern="2:4", method="mrp", options=options)
            errors[variant] += relative_error(weight, pruned, gram)
    assert errors["SS"] * 0.95 > errors["SM"]
    assert errors["MM"] == pytest.approx(errors["SM"], rel=0.02)
    assert errors["MS"] == pytest.approx(errors["SS"], rel=0.03)


def test_mask_m_needs_groups(layer):
    weight, gram = layer(32, rows=4, tokens=100)
    with pytest.raises(ValueError, match=r"mrp variant MM: .* pattern 50% has no groups; use SM"):
        prune_weight(weight, gram, pattern="50%", method="mrp", options=Options(variant="MM"))
    with pytest.raises(ValueError, match="variant must be SS, SM, MS or MM"):
        Options(variant="mm")


def test_groups_with_too_many_choices_take_the_other_mask(layer):
    weight, gram = layer(64, rows=8)
    usual = prune_weight(weight, gram, pattern="16:32", method="mrp")
    single = prune_weight(weight, gram, pattern="16:32", method="mrp", options=Options(variant="SM"))
    assert torch.equal(usual, single)
    assert ((usual != 0).reshape(8, 2, 32).sum(-1) == 16).all()
    with pytest.raises(ValueError, match=r"16:32 has 601,080,390 of them .* use SM"):
        prune_weight(weight, gram, pattern="16:32", method="mrp", options=Options(variant="MM"))
    tokens = torch.randint(3, 97, (4, 24))
    with pytest.raises(ValueError, match="mask M tries every choice"):  # before any layer is solved
        prune_model(
            build_tiny("llama"),
            pattern={"re:.*": "16:32"},
            method="mrp",
            data=tokens,
            options=Options(variant="MM"),
        )
