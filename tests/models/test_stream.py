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
    stream = BlockStream(model, describe(model), ids, batch=batch)
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
    stream = BlockStream(model, describe(model), ids, mask, batch=2)  # batches of one size, other masks
    stream.advance()
    stream.advance()
    real = mask.bool()
    torch.testing.assert_close(stream.hidden[real], expected[2][real], rtol=1e-4, atol=1e-4)
    assert stream.tokens == int(mask.sum())
    masks = [part for _, part in stream.batches()]
    assert torch.equal(torch.cat(masks), real.flatten())


def test_observe_shows_inputs_once_and_stops_behind_the_last():
    model = build_tiny("llama")
    parts = describe(model)
    ids = torch.randint(3, 97, (4, 8))
    stream = BlockStream(model, parts, ids, batch=2)
    block = parts.blocks[0]
    q, down = block.linears[0].module, block.linears[6].module
    shown, ran = [], []
    handle = down.register_forward_hook(lambda *_: ran.append(1))
    stream.observe({q: lambda x, mask: shown.append(x.clone())})
    handle.remove()
    torch.testing.assert_close(torch.cat(shown), block.module.input_layernorm(stream.hidden))
    assert not ran
    assert stream.index == 0
    assert not q._forward_pre_hooks


def test_module_that_is_never_called_is_an_error():
    model = build_tiny("llama")
    parts = describe(model)
    stream = BlockStream(model, parts, torch.randint(3, 97, (2, 8)))
    stray = torch.nn.Linear(2, 2)
    parts.blocks[0].module.stray = stray
    with pytest.raises(RuntimeError, match=r"model.layers.0: stray was never called"):
        stream.observe({stray: lambda x, mask: None})


def test_model_is_as_before_after_recording():
    model = build_tiny("llama")
    ids = torch.randint(3, 97, (2, 8))
    before = model(ids).logits
    layer = model.model.layers[1]
    layer.forward = kept = layer.forward  # an override that was there before
    BlockStream(model, describe(model), ids)
    assert layer.__dict__["forward"] is kept
    assert "forward" not in model.model.layers[0].__dict__
    assert torch.equal(model(ids).logits, before)


def test_batch_below_one_is_refused():
    model = build_tiny("llama")
    with pytest.raises(ValueError, match="batch must be at least 1"):
        BlockStream(model, describe(model), torch.zeros(1, 4, dtype=torch.long), batch=0)
