# SPDX-License-Identifier: Apache-2.0
import hashlib
import json

import pytest
import torch

from lissom.evaluation import data
from lissom.evaluation.data import calibration_windows, leading_token, read_calibration

TEXT = "".join(f"{number} " for number in range(2000))  # every stretch of it is unique


def _text_of(row, tokenizer):
    return tokenizer.decode(row[1:] if leading_token(tokenizer) is not None else row)


def test_windows_are_stretches_of_the_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    windows = calibration_windows(path, tokenizer, samples=20, seq_len=64, seed=3)
    assert windows.shape == (20, 64)
    assert windows.dtype == torch.long
    places = [TEXT.index(_text_of(row, tokenizer)) for row in windows]
    assert all(abs(a - b) >= 64 for i, a in enumerate(places) for b in places[:i])  # none overlap
    assert len({place % 64 for place in places}) == 1
    if leading_token(tokenizer) is not None:
        assert (windows[:, 0] == tokenizer.bos_token_id).all()


def test_draw_depends_on_the_seed_only(tokenizer):
    draw = [calibration_windows([TEXT], tokenizer, samples=8, seq_len=32, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_short_text_is_sampled_with_overlap(tokenizer):
    windows = calibration_windows([TEXT[:100]], tokenizer, samples=30, seq_len=64)
    assert windows.shape == (30, 64)
    assert all(_text_of(row, tokenizer) in TEXT[:100] for row in windows)


def test_of_long_texts_pieces_are_drawn(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_WHOLE", 1000)
    monkeypatch.setattr(data, "_PIECE", 100)
    seen = []
    whole = data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda texts, _: seen.append(texts) or whole(texts, tokenizer))
    short, lines = TEXT[:950], [f"line {number}\n" for number in range(3000)]
    for texts in ([short], [TEXT], ["x" * 5000], lines):
        calibration_windows(texts, tokenizer, samples=2, seq_len=8, seed=1)
    whole_text, words, one_word, many_texts = seen
    assert whole_text == [short]
    for pieces in (words, one_word, many_texts):
        assert 1000 <= sum(map(len, pieces)) < 1100
        assert all(0 < len(piece) <= 100 for piece in pieces)
    places = [TEXT.index(piece) for piece in words]
    assert places == sorted(set(places))
    assert places[-1] > 4000  # not the beginning of the text alone
    assert all(piece.endswith(" ") for piece in words)
    assert set(many_texts) <= set(lines)
    again = [data._pieces([TEXT], 1000, seed) for seed in (1, 1, 2)]
    assert again[0] == again[1] == words != again[2]


def test_cutting_loses_nothing(monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 50)
    for text in ("", "a", "a" * 50, "a" * 51, TEXT[:777], "word\n" * 40, "\n" * 120, "é ü\n" * 100):
        assert "".join(data._cut(text)) == text


def test_many_tokens_get_the_text_that_they_need(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_WHOLE", 100)
    monkeypatch.setattr(data, "_PIECE", 100)
    windows = calibration_windows([TEXT], tokenizer, samples=16, seq_len=32)
    assert windows.shape == (16, 32)
    assert len(set(map(tuple, windows.tolist()))) == 16


def test_texts_are_joined_by_the_end_token(tokenizer):
    windows = calibration_windows(["ab", "cd"], tokenizer, samples=1, seq_len=5)
    start = leading_token(tokenizer)
    expected = tokenizer("ab", add_special_tokens=False)["input_ids"] + [2]
    expected += tokenizer("cd", add_special_tokens=False)["input_ids"]
    if start is not None:
        expected[0] = start
    assert windows.tolist() == [expected]


def test_jsonl_and_provenance(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"id": i, "story": TEXT[i * 500 :][:500]}) for i in range(4)]
    path.write_text("\n".join(lines) + "\n\n")
    found = read_calibration(path, tokenizer, samples=3, seq_len=100, seed=5, field="story")
    assert found.tokens.shape == (3, 100)
    assert found.provenance() == {
        "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "samples": 3,
        "seq_len": 100,
        "seed": 5,
    }


def test_tokens_pass_as_they_are():
    tokens = torch.arange(12).view(3, 4)
    assert calibration_windows(tokens) is tokens
    found = read_calibration({"input_ids": tokens, "attention_mask": torch.ones(3, 4)})
    assert found.mask is None  # nothing is padded
    assert found.provenance()["seed"] is None
    assert found.source_sha256 != read_calibration(tokens + 1).source_sha256
    assert found.source_sha256 == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def test_inputs_of_encoders_pass_as_they_are():
    given = {"input_ids": torch.zeros(3, 4, dtype=torch.long), "token_type_ids": torch.ones(3, 4).long()}
    found = read_calibration({**given, "attention_mask": torch.eye(3, 4)})
    assert list(found.inputs) == ["input_ids", "token_type_ids", "attention_mask"]
    assert (
        found.source_sha256
        != read_calibration({**given, "token_type_ids": 0 * given["input_ids"]}).source_sha256
    )
    images = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)}
    found = read_calibration(images)
    assert found.inputs == images
    assert found.mask is None
    assert found.provenance() | {"source_sha256": ""} == {
        "source_sha256": "",
        "samples": 2,
        "size": [3, 8, 8],
        "seed": None,
    }


@pytest.mark.parametrize(
    "content, name, sentence",
    [
        ("x" * 50, "a.txt", "has 50 tokens, fewer than one window of 64"),
        ("", "a.txt", "holds no text"),
        ("x" * 500, "a.csv", "must be a .txt or .jsonl file"),
        ('{"text": "a"}\n{"body": "b"}', "a.jsonl", r"a.jsonl:2 has no text under 'text' \(it has: body\)"),
        ('{"text": 3}', "a.jsonl", "a.jsonl:1 has no text"),
        ("[1]", "a.jsonl", "a.jsonl:1 has no text"),
        ('{"text": "a"', "a.jsonl", "a.jsonl:1 is not JSON"),
    ],
)
def test_files_that_cannot_be_used(tokenizer, tmp_path, content, name, sentence):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        calibration_windows(path, tokenizer, samples=2, seq_len=64)


@pytest.mark.parametrize("text", [TEXT * 100, "two\nlines", "a word " * 40])
def test_a_text_in_the_place_of_its_file_is_not_repeated(tokenizer, text):
    with pytest.raises(
        ValueError, match=r"must be a .txt or .jsonl file; a text itself goes into a list"
    ) as told:
        calibration_windows(text, tokenizer)
    assert len(str(told.value)) < 250
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({"input_ids": [[1, 2, 3]]}, r"tensors \[S, ...\], got a list for input_ids; .* return_tensors='pt'"),
        (
            {"input_ids": torch.zeros(2, 3).long(), "attention_mask": [[1] * 3] * 2},
            "got a list for attention_mask",
        ),
        ({"input_ids": torch.tensor(3)}, "got a single number for input_ids"),
    ],
)
def test_inputs_that_are_no_tensors_are_refused(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_calibration(inputs)


def test_other_rejections(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError):
        calibration_windows(tmp_path / "none.txt", tokenizer)
    with pytest.raises(ValueError, match="list of texts"):
        calibration_windows([], tokenizer)
    with pytest.raises(ValueError, match="list of texts"):
        calibration_windows([b"bytes"], tokenizer)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        calibration_windows([TEXT])
    with pytest.raises(ValueError, match="samples >= 1 and seq_len >= 2, got 0"):
        calibration_windows([TEXT], tokenizer, samples=0)
    with pytest.raises(ValueError, match=r"LongTensor \[S, T\], got \[4\]"):
        calibration_windows(torch.arange(4))
    with pytest.raises(ValueError, match=r"one of input_ids, pixel_values, got \['images'\]"):
        read_calibration({"images": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"equally many, got \{'pixel_values': 2, 'attention_mask': 1\}"):
        read_calibration({"pixel_values": torch.zeros(2, 3), "attention_mask": torch.ones(1, 3)})
