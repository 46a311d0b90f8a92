# SPDX-License-Identifier: Apache-2.0
"""The page as text: complete, self-contained, escaped, readable by machines."""

import re
from html.parser import HTMLParser

import pytest

from lissom.reporting import render_report, write_report
from lissom.reporting.chart import Bar, Gain, bars, factors
from lissom.reporting.markup import Markup, element, pairs

EVIL = "<script>alert(1)</script>\"'&"


class Outline(HTMLParser):
    """Tags, ids and text of a page; complains about tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.words = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_page_has_every_section(report):
    page = Outline(render_report(report))
    text = " ".join(page.words)
    for title in (
        "Size",
        "Speed on this machine",
        "Quality",
        "Error of every pruned layer",
        "Kernels",
        "Details",
    ):
        assert title in page.words
    assert "269 MB" in text
    assert "52.40" in text
    assert "model.layers.29.mlp.down_proj" in text
    assert page.tags.count("svg") == 6 + 7 + 1
    assert len(page.ids) == len(set(page.ids))


def test_how_a_model_was_pruned_is_told(report):
    prune = report["prunes"][0]
    spent = {f"{part}_seconds": 1.0 for part in ("collect", "solve", "reconstruct", "advance")}
    prune |= {
        "method": "alps",
        "refit": "exact",
        "blend": 0.3,
        "permuted": True,
        "sparsity": 0.5,
        "seconds": 100.0,
    }
    prune["blocks"] = [{"name": f"b{n}", **spent, "losses": [0.2, 0.1 * n]} for n in range(2)]
    prune["layers"][0]["pattern"] = "dense enough"
    text = " ".join(Outline(render_report(report)).words)
    assert (
        "2:4 in 209 and dense enough in 1 of 210 layers by ALPS with exact refit, 79% of the parameters"
        in text
    )
    assert "30% the dense model's outputs" in text
    assert "channels permuted yes" in text
    assert "106,168,320 of 134,515,008 (78.9%)" in text
    assert "0.2000 in the first pass, 0.0500 in the last" in text
    assert "All 2 blocks" in text
    prune["blocks"][1]["losses"] = None  # the output layer
    text = " ".join(Outline(render_report(report)).words)
    assert "1 block trained" in text


def test_every_drawing_says_what_it_shows(report):
    page = render_report(report)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for drawing in drawings:
        names = re.search(r'aria-labelledby="(\S+) (\S+)"', drawing)
        assert re.search(rf'<title id="{names[1]}">[^<]+</title>', drawing)
        assert re.search(rf'<desc id="{names[2]}">[^<]+</desc>', drawing)


def test_nothing_comes_from_outside(report):
    page = render_report(report)
    assert not re.search(r"(src|href)=|url\(|@import|<script|http", page.replace("http-equiv", ""))
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_names_from_outside_are_text(report):
    report["model"]["source"] = f"models/{EVIL}"
    report["prunes"][0]["method"] = EVIL
    report["prunes"][0]["layers"][0]["name"] = f"model.layers.0.{EVIL}"
    report["speed"]["variants"][0]["label"] = EVIL
    report["kernels"]["rows"][0]["peers"] = {EVIL: 1.0}
    report["environment"] = {EVIL: EVIL, "list": [EVIL]}
    report["recipe"]["model"] = EVIL
    page = render_report(report)
    assert "<script" not in page
    Outline(page)


@pytest.mark.parametrize(
    "part", ["size", "speed", "quality", "kernels", "recipe", "provenance", "environment"]
)
def test_a_missing_part_is_left_out(report, part):
    report[part] = None
    Outline(render_report(report))


def test_tasks_are_shown_without_perplexity(report):
    report["quality"] = {"tasks": {"arc_easy, acc": {"before": 0.5123, "after": 0.4012}}}
    text = " ".join(Outline(render_report(report)).words)
    assert "0.5123" in text
    assert "0.4012" in text


def test_the_emptiest_report_is_a_page():
    text = " ".join(Outline(render_report({})).words)
    assert "You gain nothing" in text


def test_writing_replaces_the_page_whole(report, tmp_path):
    path = tmp_path / "lissom-report.html"
    path.write_text("old")
    write_report(report, path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["lissom-report.html"]


def test_elements_escape_text_and_attributes_but_not_elements():
    inner = element("b", EVIL, title=EVIL)
    assert isinstance(inner, Markup)
    assert element("p", inner, None, [1, "<"]) == f"<p>{inner}1&lt;</p>"
    assert "<script" not in inner
    assert inner.count('"') == 2


def test_nested_facts_are_told_in_words():
    page = pairs({"a_b": {"x": None, "y": True}, "k": {"f": {"1": "p"}}, "gone": None, "l": [1, "<"]})
    assert re.findall(r"<td>(.*?)</td>", page) == ["x not set, y yes", "f: 1 p", "1, &lt;"]
    assert "a b" in page


def test_bars_are_in_proportion():
    drawn = bars("k", [Bar("a", 10, "10", "dense"), Bar("b", 5, "5", "packed")], title="t", description="d")
    assert re.findall(r'width="([\d.]+)%" height="12" class="(?:dense|packed)"', drawn) == [
        "100.000",
        "50.000",
    ]


def test_a_loss_is_drawn_as_a_loss():
    drawn = factors("k", [Gain("decode", 2.0, 0.8)], title="t", description="d")
    assert "what 2:4 loses" in drawn
    assert "1.60× = 2.00 × 0.80" in drawn
