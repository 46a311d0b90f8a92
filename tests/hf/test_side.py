# SPDX-License-Identifier: Apache-2.0
"""Licence, notices and the card's word on them go from a model folder into what is made of it."""

import fnmatch

import pytest
import yaml
from transformers import AutoModelForCausalLM

from lissom.hf.card import CardFacts, render_card
from lissom.hf.loading import load_model
from lissom.hf.side import ancestry, ancestry_of
from lissom.models.tiny import build_tiny
from lissom.pruning import prune, prune_folder

CARD = """---
library_name: transformers
license: other
license_name: tiny
# a remark
license_link: LICENSE
language:
- en
- no
tags:
  - language: nothing
base_model: somebody/else
---
# Tiny
license: not a field
"""
RIGHTS = {
    "LICENSE": "do as you like",
    "licence.de": "nach Belieben",
    "NOTICE.txt": "made here",
    "COPYING": "!",
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "tiny"
    build_tiny("llama").save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    for name, text in RIGHTS.items():
        (folder / name).write_text(text)
    return folder


def _header(folder):
    text = (folder / "README.md").read_text()
    return text.split("---\n")[1], yaml.safe_load(text.split("---\n")[1])


def _check(folder):
    assert {name: (folder / name).read_text() for name in RIGHTS} == RIGHTS
    text, header = _header(folder)
    assert (header["license"], header["license_name"], header["license_link"]) == ("other", "tiny", "LICENSE")
    assert "language:\n- en\n- no\n" in text
    assert header["base_model"] == "tiny"
    assert "lissom" in header["tags"]
    assert "| Base model | tiny |" in (folder / "README.md").read_text()


def test_pruning_a_folder_keeps_the_licence(source, tmp_path):
    prune_folder(source, tmp_path / "out", pattern="2:4", method="magnitude")
    _check(tmp_path / "out")


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_saving_a_model_keeps_the_licence_of_its_folder(source, tmp_path, format):
    import lissom

    model = prune(AutoModelForCausalLM.from_pretrained(source), pattern="2:4", method="magnitude")
    report = lissom.save(model, tmp_path / "out", format=format)
    _check(tmp_path / "out")
    assert set(RIGHTS) < set(report.files)


def test_the_licence_of_the_target_is_no_obstacle_when_it_is_the_same(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "LICENSE").write_text(RIGHTS["LICENSE"])
    prune_folder(source, out, pattern="2:4", method="magnitude")
    _check(out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "LICENSE").write_text("all rights reserved")
    with pytest.raises(FileExistsError, match="already has LICENSE"):
        prune_folder(source, tmp_path / "other", pattern="2:4", method="magnitude")


def test_a_licence_that_is_said_wins(source):
    text = render_card(CardFacts(license="mit"), {}, format="dense", packed_modules=0, base=ancestry(source))
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "mit"
    assert "license_name" not in header
    assert header["base_model"] == "tiny"


@pytest.mark.parametrize(
    "card", ["", "# No header\nlicense: mit\n", "---\nlicense: mit\n", None, "---\nmodel: a\n---\n", "\0\xff"]
)
def test_a_card_without_such_fields_gives_none(source, card):
    (source / "README.md").unlink()
    if card is not None:
        (source / "README.md").write_text(card)
    assert ancestry(source).fields == ()


def test_a_model_of_the_hub_is_named_by_its_owner(source, tmp_path):
    revision = tmp_path / "models--org--tiny-1.5" / "snapshots" / "0123abc"
    revision.parent.mkdir(parents=True)
    source.rename(revision)
    assert ancestry(revision).front_matter[-1] == "base_model: org/tiny-1.5"


def test_a_model_that_was_not_loaded_has_no_origin():
    assert ancestry_of(build_tiny("llama")) is None
    model = build_tiny("llama")
    model.config._name_or_path = model.name_or_path = "nobody/nothing-of-that-name"
    assert ancestry_of(model).front_matter == ["base_model: nobody/nothing-of-that-name"]
    model.name_or_path = "/a/folder/that/is gone"
    assert ancestry_of(model) is None


def test_a_download_brings_the_licence(source, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **given: asked.update(given) or source
    )
    load_model("org/tiny", local_files_only=False)
    for name in ("LICENSE", "LICENCE.txt", "NOTICE", "COPYING", "README.md", "model.safetensors"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"]), name
