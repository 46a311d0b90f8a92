# SPDX-License-Identifier: Apache-2.0
import pytest

from lissom.reporting.verdict import judge, quality_word


def test_gains_and_costs_are_both_told(report):
    verdict = judge(report)
    assert not verdict["nothing_gained"]
    assert verdict["headline"].startswith("35% smaller, 2.19× transformers' speed in decode (1.38×")
    assert "clearly worse" in verdict["headline"]
    assert len(verdict["gains"]) == 3
    assert "21.7 to 52.4" in verdict["costs"][0]
    assert verdict["unknown"] == []


def test_nothing_gained_is_said_plainly(report):
    report["output"]["format"] = "dense"
    report["size"]["output_bytes"] = report["size"]["source_bytes"]
    report["speed"] = None
    verdict = judge(report)
    assert verdict["headline"] == "You gain nothing on this machine."
    assert "format 'dense' writes the zeros out" in verdict["costs"][0]
    assert "Speed was not measured." in verdict["unknown"]


@pytest.mark.parametrize(
    ("total", "sparsity", "where", "words"),
    [
        (2.0, 1.5, "gains", "Decode runs at 2.00× transformers"),
        (2.0, 0.97, "gains", "a good dense kernel would do as much without pruning"),
        (2.0, 0.9, "gains", "a good dense kernel would be faster without pruning"),
        (1.0, 0.8, "costs", "as fast as before"),
        (0.8, 0.7, "costs", "got slower"),
    ],
)
def test_speed_is_judged_against_the_best_dense_kernel(report, total, sparsity, where, words):
    report["speed"]["attribution"]["decode"].update(total=total, sparsity=sparsity)
    assert any(words in text for text in judge(report)[where])


def test_headline_does_not_boast_with_the_peers_weakness(report):
    for phase in ("decode", "prefill"):
        report["speed"]["attribution"][phase].update(total=2.0, sparsity=1.0)
    headline = judge(report)["headline"]
    assert headline.startswith("35% smaller, but no faster than a good dense kernel; quality")


def test_unmeasured_quality_is_named(report):
    report["quality"] = None
    assert any("--eval-text" in text for text in judge(report)["unknown"])


def test_quality_words_get_worse():
    words = [quality_word(ratio) for ratio in (0.99, 1.05, 1.3, 2.0, 30.0)]
    assert len(set(words)) == 5
    assert words[0] == "practically unchanged"
    assert words[-1].startswith("damaged")
