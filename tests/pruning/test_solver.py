# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.pruning import prune_weight
from lissom.pruning.pattern import Pattern
from lissom.pruning.problem import Options
from lissom.pruning.solver import METHODS, Moments, prune_group, relative_error

ALONE = Options(refit=False)  # a method's own weights


def _reference_sparsegpt(weight, gram, pattern, damp=0.01, block=128):
    """The algorithm as it is defined: every inverse is formed anew from the trailing matrix."""
    columns = weight.shape[1]
    gram = gram + damp * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    inverses = [torch.linalg.inv(gram[j:, j:]) for j in range(columns)]
    corner = torch.stack([inverse[0, 0] for inverse in inverses])
    work, gone = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    width = pattern.group or block
    for j in range(columns):
        if j % width == 0:
            part = slice(j, min(j + width, columns))
            scores = work[:, part] ** 2 / corner[part]
            flat = scores if pattern.group else scores.reshape(1, -1)
            count = (
                pattern.group - pattern.kept
                if pattern.group
                else pattern.count(len(weight) * part.stop) - pattern.count(len(weight) * part.start)
            )
            order = flat.sort(dim=-1, stable=True).indices[:, :count]
            gone[:, part] = torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, True).view_as(scores)
        error = torch.where(gone[:, j], work[:, j], 0.0) / corner[j]
        work[:, j:] -= error[:, None] * inverses[j][0]
    return work.masked_fill(gone, 0)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:4", "50%", "70%"])
@pytest.mark.parametrize("block", [1, 12, 32, 128])
def test_sparsegpt_equals_its_definition(layer, pattern, block):
    weight, gram = layer(48, rows=9, tokens=300)
    expected = _reference_sparsegpt(weight, gram, Pattern.parse(pattern), block=block)
    pruned = prune_weight(
        weight, gram, pattern=pattern, method="sparsegpt", options=Options(refit=False, blocksize=block)
    )
    torch.testing.assert_close(pruned, expected, rtol=1e-9, atol=1e-11)
    assert torch.equal(pruned == 0, expected == 0)


def test_float32_solve_reaches_the_float64_error(layer):
    weight, gram = layer(256)
    for pattern in ("2:4", "50%"):
        exact = prune_weight(weight, gram, pattern=pattern, method="sparsegpt")
        single = prune_weight(weight.float(), gram.float(), pattern=pattern, method="sparsegpt")
        assert single.dtype == torch.float32
        ratio = relative_error(weight, single.double(), gram) / relative_error(weight, exact, gram)
        assert abs(ratio - 1) < 2e-3  # a few near-ties choose another mask


def test_single_removal_is_the_obs_step(layer):
    """One weight per row in the first column: the closed form, and stationarity on all that is kept."""
    weight, gram = layer(40, rows=6, tokens=200)
    weight[:, 0] *= 1e-3
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40, dtype=gram.dtype)
    inverse = torch.linalg.inv(damped)
    pruned = prune_weight(
        weight, gram, pattern=1 / 40, method="sparsegpt", options=Options(refit=False, scope="row")
    )
    expected = weight - weight[:, :1] / inverse[0, 0] * inverse[0]
    expected[:, 0] = 0
    torch.testing.assert_close(pruned, expected, rtol=1e-10, atol=1e-13)
    residual = ((pruned - weight) @ damped)[:, 1:]
    assert residual.norm() <= 1e-10 * (weight[:, :1] * damped[0]).norm()


@pytest.mark.parametrize(
    "columns, pattern, wanda, magnitude",
    [(512, "2:4", 2.14, 5.25), (512, "4:8", 2.23, 5.70)],
)
def test_methods_keep_their_known_distance(layer, columns, pattern, wanda, magnitude):
    """Errors relative to SparseGPT's on the synthetic layer; the reference drew other random numbers."""
    errors = dict.fromkeys(METHODS, 0.0)
    for seed in range(2):
        weight, gram = layer(columns, seed=seed)
        for method in METHODS:
            errors[method] += relative_error(
                weight, prune_weight(weight, gram, pattern=pattern, method=method, options=ALONE), gram
            )
    assert errors["wanda"] / errors["sparsegpt"] == pytest.approx(wanda, rel=0.10)
    assert errors["magnitude"] / errors["sparsegpt"] == pytest.approx(magnitude, rel=0.25)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_masks_are_exact_under_ties(data):
    method = data.draw(st.sampled_from(list(METHODS)))
    group = data.draw(st.integers(1, 6))
    kept = data.draw(st.integers(1, group))
    rows, columns = data.draw(st.integers(1, 5)), group * data.draw(st.integers(1, 5))
    values = st.sampled_from([0.0, 1.0, -1.0, 2.0])
    numbers = data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(numbers).view(rows, columns)
    gram = torch.eye(columns)
    dead = data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns))
    gram.diagonal()[torch.tensor(dead)] = 0
    (grouped,) = prune_group([weight], Moments(gram), pattern=Pattern.parse(f"{kept}:{group}"), method=method)
    if kept < group:
        assert (grouped.mask.view(rows, -1, group).sum(-1) == group - kept).all()
        assert (grouped.weight[grouped.mask] == 0).all()
        assert not torch.signbit(grouped.weight[grouped.mask]).any()
    share = Pattern.parse(data.draw(st.sampled_from(["50%", "33%", "90%"])))
    (loose,) = prune_group([weight], Moments(gram), pattern=share, method=method)
    expected = rows * share.count(columns) if method in ("wanda", "alps") else share.count(rows * columns)
    assert loose.mask.sum() == expected


def test_dead_inputs_go_first_and_count(layer):
    weight, gram = layer(32, rows=16, tokens=300)
    weight[:, [1, 4]] = 0  # as cheap to prune as a dead input, and further left
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 5, 6, 31, 8, 9, 10, 11]] = True  # of the last four, two stay and are zero all the same
    gram[dead] = 0
    gram[:, dead] = 0
    gram[[1, 4]], gram[:, [1, 4]] = 0, 0
    gram[[1, 4], [1, 4]] = 1  # alive, but correlated with nothing: these weights stay zero
    for pattern in ("2:4", "50%"):
        (result,) = prune_group([weight], Moments(gram), pattern=Pattern.parse(pattern), method="sparsegpt")
        assert (result.weight[:, dead] == 0).all()
        assert result.mask[:, [0, 5, 6, 31]].all()
        assert torch.isfinite(result.weight).all()
        if pattern == "2:4":
            assert (result.mask.view(16, -1, 4).sum(-1) == 2).all()
        else:
            assert result.mask.sum() == 16 * 16


def test_group_equals_its_members_alone(layer):
    weight, gram = layer(64, rows=24, tokens=400)
    parts = list(weight.split([4, 12, 8]))
    for method in METHODS:
        for pattern in ("2:4", "50%"):
            together = prune_group(parts, Moments(gram), pattern=Pattern.parse(pattern), method=method)
            for part, result in zip(parts, together):
                alone = prune_weight(part, gram, pattern=pattern, method=method)
                torch.testing.assert_close(result.weight, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["4:4", 0.0, "0%"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_sparsity_returns_the_input_bit_for_bit(method, pattern, dtype):
    weight = torch.randn(8, 16).to(dtype)
    weight[0, :2] = torch.tensor([-0.0, 0.0])
    gram = torch.eye(16)
    gram[3, 3] = 0
    pruned = prune_weight(weight, gram, pattern=pattern, method=method)
    assert pruned.dtype == dtype
    assert torch.equal(pruned.view(torch.uint8), weight.view(torch.uint8))
    assert pruned.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_changed_and_scale_of_gram_does_not_matter(layer, method):
    weight, gram = layer(32, rows=8, tokens=100)
    copies = weight.clone(), gram.clone()
    pruned = prune_weight(weight, gram, pattern="2:4", method=method)
    assert torch.equal(weight, copies[0])
    assert torch.equal(gram, copies[1])
    torch.testing.assert_close(prune_weight(weight, 2 * gram, pattern="2:4", method=method), pruned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_is_that_of_the_stored_weight(layer, dtype):
    weight, gram = layer(64, rows=16, tokens=300)
    weight = weight.to(dtype)
    (result,) = prune_group([weight], Moments(gram.float()), pattern=Pattern.parse("2:4"), method="sparsegpt")
    assert result.weight.dtype == dtype
    assert result.relative_error == pytest.approx(relative_error(weight, result.weight, gram), rel=1e-4)
    exact = prune_weight(weight.double(), gram, pattern="2:4", method="sparsegpt")
    assert result.relative_error != pytest.approx(relative_error(weight.double(), exact, gram), rel=1e-9)


def test_relative_error_is_that_of_the_outputs():
    weight, other, inputs = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5, 50)
    expected = ((other - weight) @ inputs).square().sum() / (weight @ inputs).square().sum()
    assert relative_error(weight, other, inputs @ inputs.t()) == pytest.approx(expected.item(), rel=1e-4)
    assert relative_error(torch.zeros(3, 5), torch.zeros(3, 5), torch.eye(5)) == 0


def test_act_order_undoes_its_permutation(layer):
    weight, gram = layer(64, rows=8, tokens=400)
    order = gram.diagonal().argsort(descending=True)
    expected = torch.empty_like(weight)
    expected[:, order] = prune_weight(
        weight[:, order], gram[order][:, order], pattern="50%", method="sparsegpt", options=ALONE
    )
    options = Options(refit=False, act_order=True)
    pruned = prune_weight(weight, gram, pattern="50%", method="sparsegpt", options=options)
    torch.testing.assert_close(pruned, expected)
    assert not torch.equal(pruned, prune_weight(weight, gram, pattern="50%", method="sparsegpt"))


def test_solves_ignore_the_users_matmul_setting(layer):
    weight, gram = layer(256, rows=256, tokens=600, dtype=torch.float32)
    expected = prune_weight(weight, gram, pattern="2:4", method="sparsegpt")
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(prune_weight(weight, gram, pattern="2:4", method="sparsegpt"), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


EYE = torch.eye(8)
NAN = EYE.clone()
NAN[1, 1] = float("nan")
SKEW = EYE.clone()
SKEW[0, 1] = 0.5
NEGATIVE = EYE.clone()
NEGATIVE[2, 2] = -1


@pytest.mark.parametrize(
    "weight, gram, arguments, sentence",
    [
        (torch.zeros(4, 6), torch.eye(6), {}, "6 inputs do not divide into groups of 4"),
        (torch.zeros(4, 8, 1), EYE, {}, r"weight must be a floating \[out, in\] matrix, got \[4, 8, 1\]"),
        (torch.zeros(4, 8, dtype=torch.int8), EYE, {}, "got .* torch.int8"),
        (torch.zeros(4, 8, device="meta"), EYE, {}, "meta device"),
        (torch.full((4, 8), float("nan")), EYE, {}, "weight holds infinite or NaN"),
        (torch.zeros(4, 8), torch.eye(7), {}, r"H must be the symmetric \[8, 8\].*got \[7, 7\]"),
        (torch.zeros(4, 8), NAN, {}, "H must .* got infinite or NaN"),
        (torch.zeros(4, 8), SKEW, {}, "H must .* differ by 0.5 across the diagonal"),
        (torch.zeros(4, 8), NEGATIVE, {}, "H must .* negative diagonal"),
        (torch.zeros(4, 8), None, {}, "'sparsegpt' needs the Gram matrix"),
        (
            torch.zeros(4, 8),
            EYE,
            {"method": "obd"},
            "method must be one of magnitude, wanda, sparsegpt, mrp, alps, got 'obd'",
        ),
        (torch.zeros(4, 8), EYE, {"damp": -0.1}, r"damp must lie in \[0, 1\], got -0.1"),
        (torch.zeros(4, 8), EYE, {"options": {"blocksize": 0}}, "blocksize must be at least 1"),
        (torch.zeros(4, 8), EYE, {"options": {"scope": "model"}}, "scope must be"),
        (
            torch.zeros(4, 8),
            EYE,
            {"options": {"scope": "layer"}, "pattern": "50%"},
            "sparsegpt takes 'row' or 'block'",
        ),
        (
            torch.zeros(4, 8),
            EYE,
            {"options": {"act_order": True}},
            "act_order .* breaks the groups of pattern 2:4",
        ),
        (
            torch.zeros(4, 8),
            EYE,
            {"options": {"variant": "MM"}},
            "variant 'MM' is a choice within method 'mrp', got method 'sparsegpt'",
        ),
        (
            torch.zeros(4, 8),
            EYE,
            {"options": {"act_order": True}, "method": "alps", "pattern": "50%"},
            "act_order is about .* 'sparsegpt' .*, got method 'alps'",
        ),
        (
            torch.zeros(4, 8),
            EYE,
            {"options": {"act_order": True, "variant": "SM"}, "method": "mrp", "pattern": "50%"},
            "act_order is about .* 'sparsegpt' .*, got method 'mrp'",
        ),
        (torch.zeros(4, 8), EYE, {"pattern": 1.5}, "pruned share must be at least 0 and below 1"),
    ],
)
def test_rejections(weight, gram, arguments, sentence):
    arguments = dict(arguments)
    choices = arguments.pop("options", {})
    arguments = {"pattern": "2:4", "method": "sparsegpt", **arguments}
    with pytest.raises(ValueError, match=sentence):
        prune_weight(weight, gram, options=Options(**choices), **arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [-60, -7, 5, 67, 100])
def test_a_power_of_two_in_gram_changes_no_bit(layer, method, power):
    weight, gram = layer(64, rows=16, tokens=300, dtype=torch.float32)
    expected = prune_weight(weight, gram, pattern="2:4", method=method)
    assert torch.equal(prune_weight(weight, gram * 2.0**power, pattern="2:4", method=method), expected)


@pytest.mark.parametrize("options", [None, Options(refit="exact")])
def test_a_huge_gram_is_solved_as_well_as_any(layer, options):
    weight, gram = layer(64, rows=16, tokens=300, dtype=torch.float32)
    moments = [Moments(gram, 0.9 * gram, 0.3), Moments(gram * 1e20, 0.9 * gram * 1e20, 0.3)]
    small, large = (
        prune_group([weight], each, pattern=Pattern.parse("2:4"), method="wanda", options=options)[0]
        for each in moments
    )
    torch.testing.assert_close(large.weight, small.weight, rtol=0, atol=3e-3)
    assert large.relative_error == pytest.approx(small.relative_error, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["50%", "2:4", "2:4+70%", "2:4t"])
@pytest.mark.parametrize("size", [1e19, 1e-25])
def test_the_count_is_exact_where_squares_leave_float32(layer, method, pattern, size):
    weight, gram = layer(64, rows=16, tokens=300, dtype=torch.float32)
    options = Options(refit=False)
    parsed = Pattern.parse(pattern)
    (usual,) = prune_group([weight], Moments(gram), pattern=parsed, method=method, options=options)
    (found,) = prune_group([weight * size], Moments(gram), pattern=parsed, method=method, options=options)
    assert found.mask.sum() == usual.mask.sum()
    assert (found.mask != usual.mask).float().mean() < 0.02  # near-ties
    assert found.relative_error == pytest.approx(usual.relative_error, rel=0.02)


@pytest.mark.parametrize("method", ["sparsegpt", "mrp", "alps"])
def test_weights_that_outgrow_their_type_are_named(method):
    weight = torch.tensor([[39000.0, 40000.0]], dtype=torch.float16)
    moments = Moments(torch.ones(2, 2))  # equal inputs: what is left takes the weight of both
    with pytest.raises(ValueError, match=r"mlp.up_proj: 1 kept weights .* too large for float16 .* bfloat16"):
        prune_group([weight], moments, pattern=Pattern.parse("1:2"), method=method, name="mlp.up_proj")
    (fits,) = prune_group([weight.bfloat16()], moments, pattern=Pattern.parse("1:2"), method=method)
    assert fits.weight.abs().max() > 70000


@pytest.mark.parametrize("shape", [(4, 0), (0, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_without_entries_stays_one(shape, method):
    pruned = prune_weight(torch.zeros(shape), torch.eye(shape[1]), pattern="2:4", method=method)
    assert pruned.shape == shape


def test_act_order_takes_dead_inputs_last(layer):
    weight, gram = layer(64, rows=8, tokens=400)
    dead = torch.arange(8) * 8
    gram[dead], gram[:, dead] = 0, 0
    options = Options(refit=False, act_order=True, blocksize=16)
    small, large = (
        prune_weight(weight, gram * scale, pattern="50%", method="sparsegpt", options=options)
        for scale in (1e-6, 1e6)
    )
    torch.testing.assert_close(small, large)
