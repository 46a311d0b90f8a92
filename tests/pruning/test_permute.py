# SPDX-License-Identifier: Apache-2.0
"""Orders of channels for n:m patterns: what they keep, of which linears, and that a folded model keeps it too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.models.channels import RESIDUAL, find_channels
from lissom.models.fold import fold_permutation
from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import describe
from lissom.pruning import permute
from lissom.pruning.pattern import Pattern, mark_groups
from lissom.pruning.permute import OrderSearch, find_order, find_orders
from lissom.pruning.solver import prune_weight, relative_error


def lost(scores, pattern="2:4"):
    """Share of the scores that the pattern prunes."""
    return float(scores[mark_groups(scores, Pattern.parse(pattern))].sum() / scores.sum())


def model_and_norms(family, seed=0, **config):
    """A tiny model whose channels differ, its map, and the norms of the inputs of every group of its linears."""
    model = build_tiny(family, dtype=torch.float64, seed=seed, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= torch.randn(parameter.shape[1], generator=generator, dtype=torch.float64).exp()
    parts = describe(model)
    return model, parts, input_norms(model, parts, family)


def input_norms(model, parts, family):
    squares = {}

    def note(module, args, linear):
        squares[linear.group] = args[0].detach().reshape(-1, args[0].shape[-1]).square().sum(0)

    handles = [
        linear.module.register_forward_pre_hook(lambda m, args, linear=linear: note(m, args, linear))
        for linear in parts.linears()
        if linear.expert is None
    ]
    with torch.no_grad():
        model(**tiny_inputs(family))
    for handle in handles:
        handle.remove()
    return {group: square.sqrt() for group, square in squares.items()}


def shares_lost(parts, norms, pattern="2:4"):
    return {
        linear.name: lost((linear.weight() * norms[linear.group]).square(), pattern)
        for linear in parts.linears()
        if linear.group in norms
    }


@settings(max_examples=30, deadline=None)
@given(
    pattern=st.sampled_from(["2:4", "1:4", "4:8", "1:2"]),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_an_order_keeps_more(pattern, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, 64, generator=generator).square() * torch.randn(64, generator=generator).exp()
    order = find_order(scores.to(dtype) * scale, pattern)
    assert order.sort().values.tolist() == list(range(64))
    assert lost(scores[:, order], pattern) < 0.97 * lost(scores, pattern)
    assert torch.equal(find_order(scores.to(dtype) * scale * 4, pattern), order)


def test_degenerate_scores_give_some_order():
    for scores in (
        torch.zeros(3, 8),
        torch.ones(3, 8),
        torch.zeros(0, 8),
        torch.zeros(3, 0),
        torch.eye(8),  # loses nothing: the unit of levels cannot be what is lost
        torch.full((3, 8), 1e-45),
    ):
        order = find_order(scores, "2:4")
        assert order.sort().values.tolist() == list(range(scores.shape[1]))
    assert find_order(torch.rand(3, 8), "4:4").tolist() == list(range(8))


def test_dead_and_outlying_columns():
    """One column a million times larger than the rest must not hide the rest."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 64, generator=generator).square() * torch.randn(64, generator=generator).exp()
    scores[:, 5] *= 1e6
    scores[:, 7] = 0
    order = find_order(scores, "2:4")
    quiet = scores.clone()
    quiet[:, 5] = 0
    assert mark_groups(scores[:, order], Pattern.parse("2:4"))[:, order == 5].sum() == 0
    before = quiet[mark_groups(scores, Pattern.parse("2:4"))].sum()
    after = quiet[:, order][mark_groups(scores[:, order], Pattern.parse("2:4"))].sum()
    assert after < 0.9 * before


def test_sparsegpt_loses_less_in_the_order(layer):
    weight, gram = layer(256, rows=128, seed=1)
    order = find_order((weight * gram.diagonal().sqrt()).square(), "2:4")
    permuted = gram[order][:, order]
    for method in ("wanda", "sparsegpt"):
        plain = prune_weight(weight, gram, pattern="2:4", method=method)
        better = prune_weight(weight[:, order], permuted, pattern="2:4", method=method)
        before = relative_error(weight, plain, gram)
        assert relative_error(weight[:, order], better, permuted) < 0.9 * before


@pytest.mark.parametrize(
    "scores, words",
    [
        (torch.ones(3, 6), r"multiple of 4, got \[3, 6\]"),
        (torch.ones(8), r"got \[8\]"),
        (torch.ones(3, 8, dtype=torch.int32), "int32"),
        (torch.full((3, 8), torch.nan), "finite"),
        (torch.full((3, 8), torch.inf), "finite"),
        (-torch.ones(3, 8), "not negative"),
    ],
)
def test_wrong_scores_are_refused(scores, words):
    with pytest.raises(ValueError, match=words):
        find_order(scores, "2:4")
    with pytest.raises(ValueError, match="50% has no groups"):
        find_order(scores, "50%")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "bloom"])
def test_a_folded_model_loses_less(family):
    model, parts, norms = model_and_norms(family)
    channels = find_channels(model, parts)
    orders = find_orders(parts, channels, norms, "2:4")
    assert {entry.name: (entry.sets, entry.size) for entry in channels} == {
        name: tuple(order.shape) for name, order in orders.items()
    }
    before = shares_lost(parts, norms)
    fold_permutation(model, channels, orders)
    after = shares_lost(parts, input_norms(model, parts, family))
    for entry in channels:
        share = sum(after[name] / before[name] for name in entry.readers) / len(entry.readers)
        # A head of 8 channels has two groups: little to choose.
        assert share < (0.97 if entry.size > 8 else 1), entry.name


def test_one_order_for_the_query_heads_of_a_kv_head():
    """The order of a KV head is the one that its query heads' columns, stacked, ask for."""
    _, parts, norms = model_and_norms("llama")
    name = "model.layers.0.self_attn.o_proj"
    linear = next(linear for linear in parts.linears() if linear.name == name)
    scores = (linear.weight() * norms[linear.group]).square().float()  # [32, 4 heads * 8]
    orders = find_orders(
        parts, find_channels(build_tiny("llama"), parts), {linear.group: norms[linear.group]}, "2:4"
    )
    assert list(orders) == [name]
    for head in range(2):
        columns = scores[:, 16 * head : 16 * (head + 1)]
        stacked = columns.unflatten(1, (2, 8)).flatten(0, 1)
        plain, ordered = lost(stacked), lost(stacked[:, orders[name][head]])
        assert ordered <= plain


def test_only_what_is_pruned_counts():
    model, parts, norms = model_and_norms("llama")
    channels = find_channels(model, parts)
    down = [linear.name for linear in parts.linears() if linear.name.endswith("down_proj")]
    assert sorted(find_orders(parts, channels, norms, "2:4", only=down)) == sorted(down)
    only_q = find_orders(parts, channels, norms, "2:4", only=["model.layers.1.self_attn.q_proj"])
    q_proj = next(linear for linear in parts.linears() if linear.name == "model.layers.1.self_attn.q_proj")
    assert list(only_q) == [RESIDUAL]
    assert torch.equal(
        only_q[RESIDUAL][0], find_order((q_proj.weight() * norms[q_proj.group]).square().float(), "2:4")
    )
    some = {group: norm for group, norm in norms.items() if "layers.2" in group}
    assert all(name == RESIDUAL or "layers.2" in name for name in find_orders(parts, channels, some, "2:4"))
    assert find_orders(parts, channels, {}, "2:4") == {}
    assert find_orders(parts, channels, norms, "4:4") == {}
    with pytest.raises(ValueError, match="no groups"):
        find_orders(parts, channels, norms, 0.5)


def test_every_linear_counts_alike():
    model, parts, norms = model_and_norms("llama")
    channels = find_channels(model, parts)
    orders = find_orders(parts, channels, norms, "2:4")
    with torch.no_grad():
        for linear in parts.linears()[::2]:
            linear.parameter.mul_(1024)
    scaled = find_orders(parts, channels, norms, "2:4")
    assert all(torch.equal(orders[name], scaled[name]) for name in orders)


def test_linears_may_come_block_by_block():
    model, parts, norms = model_and_norms("mixtral")
    norms |= {
        linear.group: torch.ones(linear.shape[1]) for linear in parts.linears() if linear.expert is not None
    }
    channels = find_channels(model, parts)
    search = OrderSearch(parts, channels, "2:4")
    for block in parts.blocks:
        for linear in block.linears:
            search.add(linear, norms[linear.group])
    orders = find_orders(parts, channels, norms, "2:4")
    found = search.finish()
    assert found.keys() == orders.keys() == {entry.name for entry in channels}
    assert all(torch.equal(found[name], orders[name]) for name in orders)


def test_rows_are_sampled_evenly(monkeypatch):
    model, parts, norms = model_and_norms("llama")
    taken = {}
    monkeypatch.setattr(permute, "_WORK", 32 * 32 * 50)
    monkeypatch.setattr(
        permute, "pruning_permute", lambda levels, *_, **__: taken.setdefault(levels.shape, levels)[0]
    )
    find_orders(
        parts,
        find_channels(model, parts),
        norms,
        "2:4",
        only=[n.name for n in parts.linears() if "q_proj" in n.name],
    )
    assert list(taken) == [(48, 32)]  # 96 rows of three q_proj, at most 50


def test_what_cannot_be_ordered_is_told():
    model, parts, norms = model_and_norms("llama", head_dim=6)
    channels = find_channels(model, parts)
    with pytest.warns(UserWarning, match=r"groups of 4.*layers\.0.*layers\.2\.self_attn\.o_proj \(6\)"):
        orders = find_orders(parts, channels, norms, "2:4")
    assert not any(name.endswith("o_proj") for name in orders)
    linear = parts.linears()[0]
    with pytest.raises(ValueError, match=r"q_proj: norms must be \[32\].*\[31\]"):
        find_orders(parts, channels[:1], {linear.group: torch.ones(31)}, "2:4")
    with pytest.raises(ValueError, match="q_proj: scores must be finite"):
        find_orders(parts, channels[:1], {linear.group: torch.full((32,), torch.nan)}, "2:4")
