# SPDX-License-Identifier: Apache-2.0
"""Unmodified lm-eval on a packed folder, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lissom.hf.save import save

TASK = """
task: local_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra `eval`)"
    ),
]


def score(folder: Path, tasks: Path, output: Path) -> dict[str, float]:
    arguments = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder}",
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    arguments += ["--tasks", "local_text", "--include_path", str(tasks), "--output_path", str(output)]
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *arguments],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tasks / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (report,) = output.rglob("results_*.json")
    found = json.loads(report.read_text())["results"]["local_text"]
    return {name: value for name, value in found.items() if isinstance(value, float)}


def test_packed_scores_as_dense(llama, tmp_path):
    words = [f"w{number}" for number in range(128)]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="w1", pad_token="w2", bos_token="w3"
    )
    lines = [{"text": " ".join(words[start : start + 20])} for start in (5, 40, 80)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "local_text.yaml").write_text(TASK.format(data=tmp_path / "text.jsonl"))
    model = llama(initializer_range=0.5)
    scores = {}
    for format in ("packed", "dense"):
        save(model, tmp_path / format, format=format, tokenizer=tokenizer)
        scores[format] = score(tmp_path / format, tmp_path, tmp_path / f"{format}-scores")
    assert scores["packed"] == pytest.approx(scores["dense"], rel=1e-5)
    assert scores["packed"]["word_perplexity,none"] > 100
