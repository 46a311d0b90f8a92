# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from lissom.evaluation import perplexity
from lissom.evaluation.data import leading_token, tokenize
from lissom.models.tiny import build_tiny

TEXT = "The quick brown fox — naïve, as ever — jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def model():
    return build_tiny("llama", vocab_size=259)


def _losses(model, tokenizer, ids, low, high):
    """Loss of every token of a window after its first, in float64, from one plain forward."""
    window = ids[low:high].clone()
    if leading_token(tokenizer) is not None:
        window[0] = tokenizer.bos_token_id
    with torch.no_grad():
        logits = model(window[None]).logits[0].double()
    return -logits.log_softmax(-1)[:-1].gather(1, window[1:, None])[:, 0]


def _bytes(tokenizer, ids):
    return len(tokenizer.decode(ids).encode())


@pytest.mark.parametrize("windows", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_spread_windows(model, tokenizer, windows, batch):
    ids = tokenize([TEXT], tokenizer)
    step = (len(ids) - 48) // max(windows - 1, 1) if windows > 1 else 0
    total = torch.cat([_losses(model, tokenizer, ids, i * step, i * step + 48) for i in range(windows)])
    size = sum(_bytes(tokenizer, ids[i * step + 1 : i * step + 48]) for i in range(windows))
    result = perplexity(model, tokenizer, TEXT, windows=windows, seq_len=48, batch=batch)
    assert result.tokens == 47 * windows
    assert result.nats_per_token == pytest.approx(total.mean().item(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    assert result.bits_per_byte == pytest.approx(total.sum().item() / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("stride", [1, 7, 16, 47])
def test_sliding_window_scores_every_token_once_with_context(model, tokenizer, stride):
    text = TEXT[:130]
    ids = tokenize([text], tokenizer)
    expected = list(_losses(model, tokenizer, ids, 0, 48))
    low = 0
    while len(expected) < len(ids) - 1:
        low = min(low + stride, len(ids) - 48)
        fresh = low + 48 - 1 - len(expected)
        assert 48 - fresh >= 48 - stride
        expected += list(_losses(model, tokenizer, ids, low, low + 48)[-fresh:])
    result = perplexity(model, tokenizer, text, seq_len=48, stride=stride, batch=4)
    assert result.tokens == len(ids) - 1 == len(expected)
    assert result.nats_per_token == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_more_context_is_what_a_stride_buys(model, tokenizer):
    results = {s: perplexity(model, tokenizer, TEXT, seq_len=64, stride=s) for s in (8, 63)}
    assert results[8].tokens == results[63].tokens
    assert results[8].perplexity != results[63].perplexity


def test_files_and_modes(model, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    model.train()
    model.model.norm.eval()
    from_file = perplexity(model, tokenizer, path, windows=2, seq_len=32)
    assert model.training
    assert not model.model.norm.training
    model.eval()
    assert (
        from_file.nats_per_token == perplexity(model, tokenizer, TEXT, windows=2, seq_len=32).nats_per_token
    )


def test_loss_is_float32_for_16_bit_models(tokenizer):
    model = build_tiny("llama", vocab_size=259, dtype=torch.bfloat16)
    ids = tokenize([TEXT], tokenizer)
    exact = _losses(model, tokenizer, ids, 0, 64).mean().item()
    result = perplexity(model, tokenizer, TEXT, windows=1, seq_len=64)
    assert result.nats_per_token == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"seq_len": 10_000}, "fewer than one window of 10000"),
        ({"windows": 0}, "windows >= 1"),
        ({"seq_len": 1}, "seq_len >= 2"),
        ({"stride": 0}, "stride must be at least 1 and below seq_len = 32, got 0"),
        ({"stride": 32}, "stride must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_rejections(model, tokenizer, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        perplexity(model, tokenizer, TEXT, **{"seq_len": 32, **arguments})
