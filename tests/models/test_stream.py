# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from lissom.models.families import FAMILIES
from lissom.models.stream import BlockStream
from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import describe

TEXT = [family for family in FAMILIES if "input_ids" in tiny_inputs(family)]


def _hidden_states(model, given):
    """Inputs of every block, and the last block's output before the final norm, from one plain forward."""
    parts = describe(model)
    seen = []

    def note(module, args, kwargs, out):
        states = args[0] if args else kwargs["hidden_states"]
        seen.append((states, out[0] if isinstance(out, tuple) else out))

    handles = [block.module.register_forward_hook(note, with_kwargs=True) for block in parts.blocks]
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    return [inputs for inputs, _ in seen] + [seen[-1][1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2, None])
def test_stream_equals_the_plain_forward(family, batch):
    model = build_tiny(family)
    given = tiny_inputs(family)
    expected = _hidden_states(model, given)
    stream = BlockStream(model, describe(model), given, batch=batch)
    assert stream.tokens == 5 * (24 if family in TEXT else 10)
    for states in expected:
        torch.testing.assert_close(stream.hidden, states, rtol=1e-4, atol=1e-4)
        if stream.index < len(stream.parts.blocks):
            stream.advance()


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(family, side):
    model = build_tiny(family)
    given = tiny_inputs(family, sequences=4, length=20)
    mask = given["attention_mask"] = torch.ones_like(given["input_ids"])
    for row, length in enumerate((20, 13, 9, 17)):
        mask[row, slice(length, None) if side == "right" else slice(0, 20 - length)] = 0
    expected = _hidden_states(model, given)
    stream = BlockStream(model, describe(model), given, batch=2)  # batches of one size, other masks
    stream.advance()
    stream.advance()
    real = mask.bool()
    torch.testing.assert_close(stream.hidden[real], expected[2][real], rtol=1e-4, atol=1e-4)
    assert stream.tokens == int(mask.sum())
    masks = [part for _, part in stream.batches()]
    assert torch.equal(torch.cat(masks), real.flatten())


def test_inputs_that_differ_by_sequence_reach_every_batch():
    model = build_tiny("llama")
    given = tiny_inputs("llama", sequences=4)
    given["position_ids"] = torch.arange(24) * torch.tensor([[1], [2], [3], [4]])  # rotary: only steps count
    expected = _hidden_states(model, {**given, "use_cache": False})
    stream = BlockStream(model, describe(model), given, batch=2)
    stream.advance()
    torch.testing.assert_close(stream.hidden, expected[1], rtol=1e-5, atol=1e-5)


def test_sequences_per_batch_follow_the_tokens_of_an_image(monkeypatch):
    monkeypatch.setattr("lissom.models.stream.BATCH_TOKENS", 25)
    model = build_tiny("vit")
    stream = BlockStream(model, describe(model), tiny_inputs("vit"))
    assert [len(states) for states, _ in stream.batches()] == [2, 2, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_advancing_pass_shows_the_same_inputs(family):
    model = build_tiny(family)
    parts = describe(model)
    given = tiny_inputs(family, length=12)
    if family in TEXT:
        given["attention_mask"] = torch.ones(5, 12)
        given["attention_mask"][1, 7:] = 0
    once, twice = (BlockStream(model, parts, given, batch=2) for _ in range(2))
    for index in range(len(parts.blocks)):
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


def test_model_in_training_mode_is_refused():
    model = build_tiny("mamba")
    model.backbone.layers[1].mixer.train()
    with pytest.raises(ValueError, match="in training mode"):
        BlockStream(model, describe(model), tiny_inputs("mamba"))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"input_ids": torch.zeros(0, 4)},
        {"input_ids": torch.zeros(2, 4), "position_ids": torch.zeros(1, 4)},
    ],
)
def test_inputs_of_other_lengths_are_refused(given):
    model = build_tiny("llama")
    with pytest.raises(ValueError, match="same number of sequences"):
        BlockStream(model, describe(model), given)


def test_block_that_is_not_called_is_an_error():
    model = build_tiny("llama")
    parts = describe(model)
    model.config.num_hidden_layers = 2  # the model goes through its first blocks only
    with pytest.raises(RuntimeError, match="LlamaModel called 2 of 3 blocks"):
        BlockStream(model, parts, tiny_inputs("llama"))
