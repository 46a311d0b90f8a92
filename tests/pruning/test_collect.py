# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

from lissom.models.stream import BlockStream
from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import describe
from lissom.pruning import prune_model
from lissom.pruning.collect import Statistics, Texts, borrow, read_texts
from lissom.pruning.damping import choose_damp
from lissom.pruning.gram import Gram
from lissom.pruning.parallel import Ranks
from lissom.pruning.pattern import Pattern
from lissom.pruning.settings import Settings
from lissom.pruning.solver import prune_weight, relative_error

IDS = torch.randint(3, 97, (5, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens(layer):
    """Inputs of a layer whose second moments are those of the synthetic layer, and its weight."""

    def make(columns, count, seed=0):
        weight, gram = layer(columns, seed=seed)
        root = torch.linalg.cholesky(gram / 4096)
        random = torch.Generator().manual_seed(seed + 100)
        return weight, torch.randn(count, columns, generator=random, dtype=torch.float64) @ root.t(), gram

    return make


@pytest.mark.parametrize("share", [0.5, 1.0, 1.9])
def test_chosen_damping_is_near_the_best_for_other_tokens(tokens, share):
    """Within 6 % of the best of five, and never far behind a fixed 0.1 or 0.01."""
    found, best = 0.0, dict.fromkeys((0.01, 0.03, 0.1, 0.3, 1.0), 0.0)
    for seed in range(3):
        weight, inputs, truth = tokens(128, int(128 * share), seed)
        whole, half = Gram(128, "layer"), Gram(128, "layer")
        whole.add(inputs)
        half.add(inputs[::2])
        chosen = choose_damp([weight], whole, half, Pattern.parse("2:4"))
        for damp in best:
            pruned = prune_weight(
                weight, whole.matrix(torch.float64), pattern="2:4", method="sparsegpt", damp=damp
            )
            error = relative_error(weight, pruned, truth)
            best[damp] += error
            found += error if damp == chosen else 0.0
    assert found <= 1.06 * min(best.values())


def test_damping_falls_with_the_tokens():
    found = {}
    for sequences in (10, 400):
        ids = torch.randint(3, 97, (sequences, 24), generator=torch.Generator().manual_seed(0))
        report = prune_model(build_tiny("llama"), pattern="2:4", method="sparsegpt", data=ids)
        found[sequences] = {layer.shape[1]: layer.damp for layer in report.layers}
    assert found[10] == pytest.approx({32: 0.3 * 32 / 240, 48: 0.3 * 48 / 240})
    assert found[400] == {32: 0.01, 48: 0.01}


@pytest.mark.parametrize("padded", [False, True])
def test_halves_do_not_depend_on_batches_or_processes(padded):
    model = build_tiny("llama").eval()
    inputs = {"input_ids": IDS}
    if padded:
        inputs["attention_mask"] = (torch.arange(8) >= torch.tensor([[0], [3], [1], [0], [7]])).long()

    def marked(low, high, batch):
        shard = {name: tensor[low:high] for name, tensor in inputs.items()}
        stream = BlockStream(model, describe(model), shard, batch=batch)
        return torch.cat([texts.first for texts in read_texts(stream, low, len(IDS))])

    whole = marked(0, 5, 5)
    assert torch.equal(whole, marked(0, 5, 2))
    assert torch.equal(whole, torch.cat([marked(0, 3, 1), marked(3, 5, 2)]))
    real = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
    assert torch.equal(whole, (torch.arange(5) % 2 == 0)[:, None].expand(5, 8)[real])


def test_a_single_sequence_is_halved():
    model = build_tiny("llama").eval()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    for inputs, wanted in (
        ({"input_ids": IDS[:1]}, [True] * 4 + [False] * 4),
        ({"input_ids": IDS[:1], "attention_mask": mask}, [True] * 3 + [False] * 2),
    ):
        stream = BlockStream(model, describe(model), inputs)
        texts = next(read_texts(stream, 0, 1))
        assert texts.first.tolist() == wanted
        assert texts.lengths == [len(wanted)]


def test_a_token_far_off_does_not_decide_what_a_layer_aims_at():
    """Its own input stands for the dense one; all other tokens, and the plain sum, are as they were."""
    random = torch.Generator().manual_seed(0)
    tokens, dense = torch.randn(2, 24, 16, generator=random)
    dense[[0, 12]] *= 300
    linear = describe(build_tiny("llama")).blocks[0].linears[0]
    settings = Settings(data="unused", blend=0.3)
    statistics = Statistics(
        [replace(linear, module=torch.nn.Linear(16, 4))], settings, 1000, torch.device("cpu")
    )
    statistics.add(tokens, Texts([12, 0, 12], torch.ones(24, dtype=torch.bool)), dense)
    moments = statistics.moments(torch.float64)
    seen = dense.clone()
    seen[[0, 12]] = tokens[[0, 12]]
    torch.testing.assert_close(moments.cross, (seen.t() @ tokens).double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.gram, (tokens.t() @ tokens).double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_borrow_tokens_through_their_own_weights(family):
    """An expert that sees few tokens ends with 2 for each input, and with none but its own hidden channels."""
    model = build_tiny(family).eval()
    parts = describe(model)
    experts = [linear for linear in parts.blocks[0].linears if linear.expert == 0]
    stream = BlockStream(model, parts, tiny_inputs(family, sequences=4, length=24))
    settings = Settings(data="unused", blend=0.0)
    found = {each.group: Statistics([each], settings, stream.tokens, torch.device("cpu")) for each in experts}
    with pytest.warns(
        UserWarning, match="saw fewer than 2 tokens per input; tokens that the router sent elsewhere"
    ):
        borrow(found, stream, stream.tokens, Ranks())
    wanted = {group: min(2 * len(each.gram), stream.tokens) for group, each in found.items()}
    assert {group: each.gram.tokens for group, each in found.items()} == pytest.approx(wanted, abs=4)

    everything = {}
    for shown in stream.inputs(
        [each.group for each in experts], shares={each.group: 1.0 for each in experts}
    ):
        for group, tokens in shown.items():
            everything.setdefault(group, []).append(tokens)
    gate_up, down = (torch.cat(everything[each.group]) for each in experts)
    assert len(gate_up) == len(down) == stream.tokens
    module = experts[0].module
    through = gate_up @ experts[0].weight().t()
    if module.has_bias:
        through = through + module.gate_up_proj_bias[0]
    torch.testing.assert_close(down, module._apply_gate(through))
    for each, tokens in zip(experts, (gate_up, down), strict=True):
        if found[each.group].gram.tokens == stream.tokens:
            torch.testing.assert_close(
                found[each.group].gram.matrix(), tokens.t() @ tokens, rtol=1e-4, atol=1e-4
            )
