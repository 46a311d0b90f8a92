# SPDX-License-Identifier: Apache-2.0
import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.pruning.allocation import (
    Budget,
    LossCurve,
    allocate,
    choose,
    measure_curve,
    outlier_ratio,
    owl,
    predict,
)
from lissom.pruning.costs import DecodeTimer, kept_weights, layer_bytes, price
from lissom.pruning.pattern import Pattern
from lissom.reference.sparse24 import packed_bytes

SHARES = [f"{percent}%" for percent in range(10, 100, 10)]


def by_search(losses, costs, limit):
    """The least loss of all choices within the limit, or None."""
    best = None
    for picked in itertools.product(*(range(len(layer)) for layer in losses)):
        loss = sum(layer[option] for layer, option in zip(losses, picked))
        cost = sum(layer[option] for layer, option in zip(costs, picked))
        if cost <= limit and (best is None or loss < best):
            best = loss
    return best


@st.composite
def knapsacks(draw):
    layers = draw(st.integers(1, 4))
    sizes = [draw(st.integers(1, 4)) for _ in range(layers)]
    numbers = st.integers(0, 20)
    losses = [[draw(numbers) for _ in range(size)] for size in sizes]
    costs = [[draw(numbers) for _ in range(size)] for size in sizes]
    return losses, costs, draw(st.integers(1, 60))


@given(knapsacks())
def test_choice_is_within_one_move_of_the_optimum(case):
    losses, costs, limit = case
    least = by_search(losses, costs, limit)
    if least is None:
        with pytest.raises(ValueError, match="the least that the layers can cost"):
            choose(losses, costs, limit)
        return
    found = choose(losses, costs, limit)
    assert found.cost == sum(layer[option] for layer, option in zip(costs, found.options)) <= limit
    assert found.loss == sum(layer[option] for layer, option in zip(losses, found.options))
    assert found.bound - 1e-6 <= least <= found.loss
    assert found.loss - found.bound <= max(max(layer) - min(layer) for layer in losses) + 1e-6


@given(knapsacks())
def test_choice_is_optimal_where_the_lagrangian_spends_the_whole_budget(case):
    losses, costs, limit = case
    if by_search(losses, costs, limit) is None:
        return
    # What a choice costs is a budget that it spends to the end, perhaps between two corners of the hull;
    # where its bound is tight it must be the optimum, and with room for everything it always is.
    for budget in (choose(losses, costs, limit).cost, 100):
        found = choose(losses, costs, budget)
        if found.bound == pytest.approx(found.loss):
            assert found.loss == by_search(losses, costs, budget)
    assert found.bound == pytest.approx(found.loss)
    assert found.loss == sum(min(layer) for layer in losses)


def test_corners_of_convex_curves_and_what_lies_between():
    losses = [[9.0, 4.0, 1.0, 0.0], [20.0, 8.0, 2.0, 0.0]]
    costs = [[1, 2, 3, 4], [2, 4, 6, 8]]
    for limit in (3, 5, 7, 8, 9, 10, 12):  # rates: b 6, a 5, a 3, b 3, a 1, b 1
        found = choose(losses, costs, limit)
        assert found.loss == by_search(losses, costs, limit)
    assert choose(losses, costs, 5).options == [0, 1]
    assert choose(losses, costs, 5).bound == pytest.approx(choose(losses, costs, 5).loss)


def test_room_behind_the_first_move_that_does_not_fit_is_used():
    # The best rate is the move of cost 10, which does not fit; the one of cost 3 does.
    found = choose([[100.0, 0.0], [5.0, 0.0]], [[0, 10], [0, 3]], 9)
    assert found.options == [0, 1]
    assert found.bound == pytest.approx(105 - 90)
    # One gives way to the other: cost 7 of 8 is spent, and giving back 1 makes room for a move of 2.
    assert choose([[9, 4, 1, 0], [20, 8, 2, 0]], [[1, 2, 3, 4], [2, 4, 6, 8]], 8).options == [1, 2]
    # Option 1 is above the hull of its layer and still the only one within reach.
    assert choose([[10.0, 9.0, 0.0]], [[0, 5, 10]], 6).options == [1]


def test_costs_that_are_no_numbers():
    with pytest.raises(ValueError, match="costs must be finite"):
        choose([[1.0]], [[float("nan")]], 1)


@given(st.dictionaries(st.sampled_from(SHARES), st.floats(0, 10), min_size=1))
def test_interpolation_is_convex_and_below_the_measured(losses):
    curve = LossCurve("layer", losses)
    last = max(Pattern.parse(option).sparsity for option in losses)
    grid = [last * step / 24 for step in range(25)]
    points = [(x, curve.loss(str(Pattern(x)))) for x in grid if str(Pattern(x)) not in losses]
    for (x0, y0), (x1, y1), (x2, y2) in zip(points, points[1:], points[2:]):
        assert y0 <= y1 <= y0 + (y2 - y0) * float((x1 - x0) / (x2 - x0)) + 1e-9
    for option, loss in losses.items():
        assert curve.loss(option) == loss
        beside = Pattern.parse(option).sparsity - Fraction(1, 10**9)
        assert curve.loss(str(Pattern(beside))) <= loss + 1e-6


def test_interpolation_of_a_convex_curve_is_linear_between_neighbours():
    curve = LossCurve("layer", {"50%": 1.0, "20%": 0.1, "70%": 4.0, "2:4": 1.5})
    assert curve.loss("35%") == pytest.approx(0.55)
    assert curve.loss("10%") == pytest.approx(0.05)
    assert curve.loss("0.6") == pytest.approx(2.5)
    assert (curve.loss("2:4"), curve.loss("dense")) == (1.5, 0.0)


@pytest.mark.parametrize("option", ["80%", "4:8", "2:4+60%", "1:4"])
def test_losses_that_are_not_known(option):
    with pytest.raises(ValueError, match=f"layer: the loss of .*{option[0]}.* was not measured"):
        LossCurve("layer", {"50%": 1.0, "2:4": 1.5}).loss(option)


@pytest.mark.parametrize("loss", [-1.0, float("nan"), float("inf")])
def test_losses_that_are_no_losses(loss):
    with pytest.raises(ValueError, match="layer: the loss of '50%' must be finite"):
        LossCurve("layer", {"50%": loss})


def test_allocation_against_search_over_patterns():
    shapes = {"a": (16, 32), "b": (32, 32), "c": (8, 64)}
    options = ["dense", "2:4", "1:4", "50%", "4:8"]
    curves = [
        LossCurve(name, {"2:4": 0.3 * scale, "1:4": 0.9 * scale, "50%": 0.2 * scale, "4:8": 0.25 * scale})
        for name, scale in (("a", 1.0), ("b", 3.0), ("c", 0.5))
    ]
    for cost in (layer_bytes, kept_weights):
        costs = price(shapes, options, cost)
        dense = sum(layer["dense"] for layer in costs.values())
        for share in (0.65, 0.8, 0.9, 1.0):
            found = allocate(curves, costs, Budget(share, share=True))
            assert found == allocate(curves, costs, Budget(share * dense))
            loss, spent = predict(found, curves, costs)
            assert spent <= share * dense
            best = by_search(
                [[curve.loss(option) for option in options] for curve in curves],
                [[costs[curve.name][option] for option in options] for curve in curves],
                share * dense,
            )
            assert loss == pytest.approx(best)
        assert found.to_dict() == dict.fromkeys("abc", "dense")


def test_zeros_that_do_not_save_bytes_are_not_chosen():
    shapes = {f"layer{i}": (64, 64) for i in range(6)}
    curves = [LossCurve(name, {"50%": 0.01, "4:8": 0.02, "2:4": 1.0}) for name in shapes]
    chosen = allocate(
        curves, price(shapes, ["dense", "50%", "4:8", "2:4"], layer_bytes), Budget(0.8, share=True)
    )
    assert set(chosen.to_dict().values()) == {"dense", "2:4"}


def test_allocations_that_are_refused():
    curve = LossCurve("a", {"2:4": 1.0})
    costs = {"a": {"dense": 16, "2:4": 9}}
    with pytest.raises(ValueError, match="a budget of 8 is below 9"):
        allocate([curve], costs, Budget(8))
    with pytest.raises(ValueError, match="layer 'a' needs exactly one curve"):
        allocate([curve, curve], costs, Budget(20))
    with pytest.raises(ValueError, match="layer 'a' needs exactly one curve, and the cost"):
        allocate([curve], {"a": {}}, Budget(20))
    with pytest.raises(ValueError, match="needs the cost of 'dense'"):
        allocate([curve], {"a": {"2:4": 9}}, Budget(0.9, share=True))
    with pytest.raises(ValueError, match="a budget must be positive"):
        Budget(0)


def test_bytes_of_the_packed_form():
    shape = (32, 64)
    assert layer_bytes(shape, Pattern.parse("2:4")) == 32 * (32 * 2 + 8)
    # The saved form has no header and no padding; the form in memory has a header of 64 bytes.
    assert layer_bytes(shape, Pattern.parse("2:4")) == packed_bytes(*shape, torch.bfloat16) - 64
    assert layer_bytes(shape, Pattern.parse("2:4"), itemsize=4) == packed_bytes(*shape, torch.float32) - 64
    for dense in (None, Pattern.parse("50%"), Pattern.parse("4:8"), Pattern.parse("3:4")):
        assert layer_bytes(shape, dense) == 32 * 64 * 2
    assert layer_bytes((4, 6), Pattern.parse("1:2")) == 48, "six inputs are no quads"
    assert kept_weights((10, 10), Pattern.parse("33%")) == 67
    assert kept_weights((10, 10), None) == 100


def test_options_are_those_that_fit():
    costs = price({"a": (6, 8), "b": (8, 10)}, ["dense", "2:4", "0.5", "2:4t"], kept_weights)
    assert {name: list(layer) for name, layer in costs.items()} == {
        "a": ["dense", "2:4", "50%"],
        "b": ["dense", "50%"],
    }


def test_decode_timer_measures_each_shape_once(monkeypatch):
    timer = DecodeTimer(torch.float32, rounds=2, threads=1, cold_bytes=1 << 16)
    dense, packed = timer((64, 128), None), timer((64, 128), Pattern.parse("2:4"))
    assert dense > 0
    assert packed > 0
    monkeypatch.setattr(timer, "_measure", lambda shape: pytest.fail("measured twice"))
    assert timer((64, 128), Pattern.parse("50%")) == dense
    assert timer((64, 128), Pattern.parse("4:8")) == dense
    assert timer((64, 128), Pattern.parse("1:4")) == packed


def test_decode_timer_takes_a_layer_that_cannot_be_packed():
    timer = DecodeTimer(torch.float32, rounds=1, cold_bytes=1 << 12)
    assert timer((8, 6), Pattern.parse("1:2")) == timer((8, 6), None) > 0


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_measured_curve_rises(layer, method):
    weight, gram = layer(64, rows=16, tokens=256)
    curve = measure_curve("layer", weight, gram, ["dense", *SHARES, "2:4", "4:8", "2:4t"], method=method)
    shares = [curve.losses[option] for option in SHARES]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1.5
    assert curve.losses["50%"] < curve.losses["2:4"]
    assert "dense" not in curve.losses


def test_outlier_ratio():
    big = torch.ones(10, 10)
    big[0, :3] = 50.0
    small = torch.ones(7)
    # Mean 254 / 107 = 2.37 over both layers together; 5 and 20 times it lie below 50, 22 times above.
    assert outlier_ratio([big, small]) == 3 / 107
    assert outlier_ratio([big, small], threshold=20) == 3 / 107
    assert outlier_ratio([big, small], threshold=22) == 0
    assert outlier_ratio([torch.zeros(4)]) == 0
    half = torch.full((10000,), 10.0, dtype=torch.float16)  # their sum is beyond float16
    half[0] = 1000.0
    assert outlier_ratio([half]) == 1e-4
    with pytest.raises(ValueError, match="at least one weight"):
        outlier_ratio([])


@given(
    st.lists(st.floats(0, 0.5), min_size=1, max_size=8),
    st.sampled_from([0.5, 0.7]),
    st.sampled_from([0.0, 0.08, 0.2]),
    st.data(),
)
def test_owl_keeps_mean_bound_and_order(ratios, sparsity, bound, data):
    names = [f"model.layers.{number}" for number in range(len(ratios))]
    weights = {name: data.draw(st.integers(1, 1000)) for name in names}
    patterns = owl(dict(zip(names, ratios)), sparsity, bound=bound, weights=weights)
    shares = [float(patterns.of(f"{name}.mlp.up_proj").sparsity) for name in names]
    mean = sum(share * size for share, size in zip(shares, weights.values())) / sum(weights.values())
    assert mean == pytest.approx(sparsity, abs=1e-6)
    assert all(abs(share - sparsity) <= bound + 1e-6 for share in shares)
    for (low, less), (high, more) in itertools.combinations(sorted(zip(ratios, shares)), 2):
        assert low <= high
        assert more <= less + 1e-6
    if max(ratios) - min(ratios) > 1e-6:
        assert max(abs(share - sparsity) for share in shares) == pytest.approx(bound, abs=1e-6)


def test_owl_names_every_layer_of_its_block_only():
    patterns = owl({"model.layers.1": 0.1, "model.layers.11": 0.2}, 0.7)
    assert str(patterns.of("model.layers.1.mlp.up_proj")) == "78%"
    assert str(patterns.of("model.layers.11.mlp.up_proj")) == "62%"
    assert patterns.of("modelxlayers.1.mlp.up_proj") is None


def test_blocks_that_differ_by_rounding_are_alike():
    # The weighted mean of these equal ratios is off by one unit in the last place.
    ratios = dict.fromkeys(("a", "b", "c"), 0.019580250075788678)
    patterns = owl(ratios, 0.5, weights={"a": 1, "b": 1, "c": 338})
    assert {str(pattern) for pattern in patterns.values()} == {"50%"}
    for ratios in ({"a": 0.1, "b": 0.1 + 2e-17}, {"a": 0.0, "b": 5e-324}):
        patterns = owl(ratios, 0.5)
        assert {str(pattern) for pattern in patterns.values()} == {"50%"}
    patterns = owl({"a": 0.1, "b": 0.1 + 2e-17}, 0.5)
    assert {str(pattern) for pattern in patterns.values()} == {"50%"}


def test_owl_refuses():
    with pytest.raises(ValueError, match="at least one block"):
        owl({}, 0.5)
    for sparsity, bound in ((0.95, 0.08), (0.05, 0.08), (0.5, -0.1)):
        with pytest.raises(ValueError, match="choose a smaller bound"):
            owl({"a": 0.1}, sparsity, bound=bound)
