# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lissom.models.stream import BlockStream
from lissom.models.tiny import build_tiny
from lissom.models.walk import FAMILIES, describe


def _hidden_states(model, ids, mask=None):
    """Inputs of every block, and the last block's output before the final norm, from one plain forward."""
    parts = describe(model)
    seen = []
    handles = [
        block.module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
        for block in parts.blocks
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return [inputs for inputs, _ in seen] + [seen[-1][1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_stream_equals_the_plain_forward(family, batch):
    model = build_tiny(family)
    ids = torch.randint(3, 97, (5, 24), generator=torch.Generator().manual_seed(0))
    expected = _hidden_states(model, ids)
    stream = BlockStream(model, describe(model), {"input_ids": ids}, batch=batch)
    for states in expected:
        torch.testing.assert_close(stream.hidden, states, rtol=1e-4, atol=1e-4)
        if stream.index < 3:
            stream.advance()
    assert stream.tokens == 5 * 24


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(family, side):
    model = build_tiny(family)
    ids = torch.randint(3, 97, (4, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((20, 13, 9, 17)):
        mask[row, slice(length, None) if side == "right" else slice(0, 20 - length)] = 0
    expected = _hidden_states(model, ids, mask)
    given = {"input_ids": ids, "attention_mask": mask}
    stream = BlockStream(model, describe(model), given, batch=2)  # batches of one size, other masks
    stream.advance()
    stream.advance()
    real = mask.bool()
    torch.testing.assert_close(stream.hidden[real], expected[2][real], rtol=1e-4, atol=1e-4)
    assert stream.tokens == int(mask.sum())
    masks = [part for _, part in stream.batches()]
    assert torch.equal(torch.cat(masks), real.flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_advancing_pass_shows_the_same_inputs(family):
    model = build_tiny(family)
    parts = describe(model)
    given = {"input_ids": torch.randint(3, 97, (5, 12)), "attention_mask": torch.ones(5, 12)}
    given["attention_mask"][1, 7:] = 0
    once, twice = (BlockStream(model, parts, given, batch=2) for _ in range(2))
    for index in range(3):
        shown = [{k: v.clone() for k, v in x.items()} for x in once.inputs(once.groups(), advance=True)]
        for first, second in zip(shown, twice.inputs(twice.groups()), strict=True):
            assert first.keys() == second.keys() == set(twice.groups())
            assert all(torch.equal(first[group], second[group]) for group in first)
        assert (once.index, twice.index) == (index + 1, index)
        twice.advance()
        assert torch.equal(once.hidden, twice.hidden)


def test_inputs_stop_behind_the_last_tap():
    model = build_tiny("llama")
    parts = describe(model)
    stream = BlockStream(model, parts, {"input_ids": torch.randint(3, 97, (4, 8))}, batch=2)
    block = parts.blocks[0]
    q, down = block.linears[0], block.linears[6]
    ran = []
    handle = down.module.register_forward_hook(lambda *_: ran.append(1))
    before = stream.hidden.clone()
    shown = [tokens[q.group] for tokens in stream.inputs([q.group])]
    handle.remove()
    torch.testing.assert_close(torch.cat(shown), block.module.input_layernorm(before).flatten(0, 1))
    assert not ran
    assert stream.index == 0
    assert torch.equal(stream.hidden, before)
    assert not q.module._forward_pre_hooks


def test_module_that_is_never_called_is_an_error():
    model = build_tiny("llama")
    parts = describe(model)
    stream = BlockStream(model, parts, {"input_ids": torch.randint(3, 97, (2, 8))})
    parts.blocks[0].module.mlp.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"layers.0.mlp.gate_proj\+mlp.up_proj was never called"):
        list(stream.inputs(stream.groups()))


def test_module_that_sees_other_rows_is_an_error():
    model = build_tiny("llama")
    parts = describe(model)
    stream = BlockStream(model, parts, {"input_ids": torch.randint(3, 97, (2, 8))})
    down = parts.blocks[0].module.mlp.down_proj
    parts.blocks[0].module.mlp.forward = lambda x: down(x.new_zeros(2, 7, 48))
    with pytest.raises(RuntimeError, match=r"down_proj cannot be calibrated: its input has 14 rows where"):
        list(stream.inputs(["model.layers.0.mlp.down_proj"]))


def test_module_that_is_called_twice_is_an_error():
    model = build_tiny("llama")
    parts = describe(model)
    stream = BlockStream(model, parts, {"input_ids": torch.randint(3, 97, (2, 8))})
    mlp = parts.blocks[0].module.mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x)) + mlp.down_proj(mlp.up_proj(x))
    with pytest.raises(RuntimeError, match=r"down_proj is called more than once"):
        list(stream.inputs(["model.layers.0.mlp.down_proj"], advance=True))


def test_advancing_pass_left_half_way_cannot_be_used():
    model = build_tiny("llama")
    stream = BlockStream(model, describe(model), {"input_ids": torch.randint(3, 97, (4, 8))}, batch=2)
    steps = stream.inputs((), advance=True)
    next(steps)
    steps.close()
    with pytest.raises(RuntimeError, match="left half way"):
        stream.advance()


def test_unknown_group_is_refused():
    model = build_tiny("llama")
    stream = BlockStream(model, describe(model), {"input_ids": torch.randint(3, 97, (4, 8))}, batch=2)
    with pytest.raises(
        ValueError, match=r"layers.0 has no group 'mlp.down_proj'; it has model.layers.0.self"
    ):
        stream.inputs(["mlp.down_proj"])


def test_model_is_as_before_after_recording():
    model = build_tiny("llama")
    ids = torch.randint(3, 97, (2, 8))
    before = model(ids).logits
    layer = model.model.layers[1]
    layer.forward = kept = layer.forward  # an override that was there before
    BlockStream(model, describe(model), {"input_ids": ids})
    assert layer.__dict__["forward"] is kept
    assert "forward" not in model.model.layers[0].__dict__
    assert torch.equal(model(ids).logits, before)


def test_batch_below_one_is_refused():
    model = build_tiny("llama")
    with pytest.raises(ValueError, match="batch must be at least 1"):
        BlockStream(model, describe(model), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, batch=0)
