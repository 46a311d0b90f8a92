# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from lissom.models.tiny import build_tiny
from lissom.models.walk import describe
from lissom.pruning.pattern import Pattern
from lissom.pruning.selection import PatternMap, read_pattern, select_linears


@pytest.fixture(scope="module")
def parts():
    return describe(build_tiny("llama"))


MIXED = {
    "model.layers.0.mlp.down_proj": "70%",
    "re:.*down_proj": "dense",
    "re:.*mlp.*": "2:4+70%",
    "re:.*q_proj": 0.5,
}


def test_first_match_wins():
    patterns = PatternMap(MIXED)
    expected = {
        "model.layers.0.mlp.down_proj": "70%",
        "model.layers.1.mlp.down_proj": None,
        "model.layers.0.mlp.up_proj": "2:4+70%",
        "model.layers.0.self_attn.q_proj": "50%",
        "model.layers.0.self_attn.k_proj": None,
    }
    assert {name: patterns.of(name) and str(patterns.of(name)) for name in expected} == expected
    backwards = PatternMap(dict(reversed(MIXED.items())))
    assert str(backwards.of("model.layers.0.mlp.down_proj")) == "2:4+70%"


def test_map_is_a_mapping_and_plain_text():
    patterns = PatternMap(MIXED)
    assert list(patterns) == list(MIXED)
    assert patterns["re:.*down_proj"] is None
    assert patterns.to_dict() == {**MIXED, "re:.*q_proj": "50%"}
    assert PatternMap(json.loads(str(patterns))) == patterns
    assert PatternMap({"a": None})["a"] is None


@pytest.mark.parametrize(
    "entries, error, message",
    [
        ({"a": "5:4"}, ValueError, "pattern map entry 'a': pattern '5:4'"),
        ({"a": "half"}, ValueError, "'half' is not understood.*or 'dense'"),
        ({"a": ["2:4"]}, TypeError, "pattern map entry 'a': pattern must be text"),
        ({"re:(": "2:4"}, ValueError, r"'re:\(' is not a valid regular expression"),
    ],
)
def test_maps_that_are_refused(entries, error, message):
    with pytest.raises(error, match=message):
        PatternMap(entries)


def test_read_pattern():
    assert read_pattern("2:4") == Pattern.parse("2:4")
    patterns = read_pattern({"re:.*": 0.5})
    assert patterns.of("anything") == Pattern.parse("50%")
    assert read_pattern(patterns) is patterns


def test_each_layer_gets_its_pattern(parts):
    selection = select_linears(parts, PatternMap(MIXED))
    assert {name: str(selection.patterns[name]) for name in selection.patterns} == {
        linear.name: str(PatternMap(MIXED).of(linear.name)) for linear in selection.linears()
    }
    first, second = selection.steps[:2]
    assert str(first.pattern_of("model.layers.0.mlp.down_proj")) == "70%"
    # gate and up share their input with no one else; q is alone of its group; down of block 1 is left.
    assert [len(group) for group in first.groups().values()] == [1, 2, 1]
    assert [len(group) for group in second.groups().values()] == [1, 2]
    assert selection.left["model.layers.1.mlp.down_proj"] == (
        "entry 're:.*down_proj' of the pattern map leaves it dense"
    )
    assert selection.left["model.layers.0.self_attn.k_proj"] == "no entry of the pattern map means it"
    everything = {linear.name for linear in parts.linears()} | {"lm_head"}
    assert set(selection.patterns) | set(selection.left) == everything
    assert not set(selection.patterns) & set(selection.left)


def test_one_group_with_two_patterns(parts):
    selection = select_linears(parts, PatternMap({"re:.*gate_proj": "2:4", "re:.*up_proj": "50%"}))
    (group,) = selection.steps[0].groups().values()
    assert [str(selection.patterns[linear.name]) for linear in group] == ["2:4", "50%"]


def test_one_pattern_for_all(parts):
    pattern = Pattern.parse("2:4")
    selection = select_linears(parts, pattern)
    assert set(selection.left) == {"lm_head"}
    assert all(selection.patterns[linear.name] is pattern for linear in parts.linears())
    assert selection.linears() == parts.linears()


def test_lists_come_before_the_map(parts):
    selection = select_linears(
        parts, PatternMap({"re:.*": "50%"}), include=["re:.*mlp.*"], exclude=["re:.*\\.1\\..*"]
    )
    assert selection.left["model.layers.0.self_attn.q_proj"] == "not included"
    assert selection.left["model.layers.1.mlp.up_proj"] == "excluded"
    assert len(selection.linears()) == 6
    assert [step.name for step in selection.steps] == [f"model.layers.{i}" for i in range(3)]
    assert not selection.steps[1].linears


@pytest.mark.parametrize("key", ["model.layers.0.mlp.up", "re:mlp", "re:lm_head", "model.norm"])
def test_entry_that_means_no_layer_is_refused(parts, key):
    with pytest.raises(ValueError, match="means none of the 21 linear layers"):
        select_linears(parts, PatternMap({key: "2:4", "re:.*": "50%"}))


def test_output_layer_is_taken_when_the_map_names_it(parts):
    selection = select_linears(parts, PatternMap({"lm_head": "50%", "re:.*": "2:4"}))
    assert selection.steps[-1].name == "lm_head"
    assert str(selection.patterns["lm_head"]) == "50%"
    selection = select_linears(parts, PatternMap({"lm_head": "dense", "re:.*": "2:4"}))
    assert "dense" in selection.left["lm_head"]
    selection = select_linears(parts, PatternMap({"re:.*": "2:4"}))
    assert "only when include names it" in selection.left["lm_head"]
    selection = select_linears(parts, PatternMap({"re:.*": "2:4"}), include=["lm_head"])
    assert [linear.name for linear in selection.linears()] == ["lm_head"]


def test_layer_that_cannot_take_its_pattern(parts):
    patterns = PatternMap({"re:.*down_proj": "3:7", "re:.*": "2:4t"})
    with pytest.raises(ValueError, match=r"down_proj cannot be pruned: its \d+ inputs do not divide"):
        select_linears(parts, patterns)
    selection = select_linears(parts, patterns, strict=False)
    assert "groups of 7" in selection.left["model.layers.2.mlp.down_proj"]
    odd = describe(build_tiny("llama", intermediate_size=66))
    with pytest.raises(ValueError, match=r"gate_proj cannot be pruned: its 66 outputs do not divide"):
        select_linears(odd, Pattern.parse("2:4t"))


def test_nothing_to_prune(parts):
    with pytest.raises(ValueError, match="nothing would be pruned"):
        select_linears(parts, PatternMap({"re:.*": "dense"}))
    with pytest.raises(ValueError, match="nothing would be pruned"):
        select_linears(parts, PatternMap({}))
