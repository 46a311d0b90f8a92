# SPDX-License-Identifier: Apache-2.0
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lissom.models.names import matches, select

NAMES = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    "name, patterns, expected",
    [
        ("lm_head", ["lm_head"], True),
        ("lm_head2", ["lm_head"], False),
        ("model.lm_head", ["lm_head"], False),
        ("a.mlp.up", ["re:.*mlp.*"], True),
        ("a.mlp.up", ["re:mlp"], False),  # the whole name has to match,
        ("a.mlp.up", ["re:a.mlp"], False),  # to its end
        ("a.mlp.up", [".*mlp.*"], False),  # without re: a name is a name
        ("a", [], False),
        ("a", None, False),
    ],
)
def test_matches(name, patterns, expected):
    assert matches(name, patterns) is expected


@given(st.text(min_size=1), st.text(min_size=1))
def test_plain_entries_and_escaped_patterns_mean_the_same(name, other):
    assert matches(name, [f"re:{re.escape(other)}"]) == matches(name, ["re:" + re.escape(other), "\0"])
    if not other.startswith("re:"):
        assert matches(name, [other]) == (name == other)


def test_bare_string_is_refused():
    with pytest.raises(TypeError, match="list of names"):
        matches("lm_head", "lm_head")


def test_invalid_expression_is_refused():
    with pytest.raises(ValueError, match=r"re:\(.*regular expression"):
        matches("lm_head", ["re:("])


def test_select_gives_reasons_and_keeps_order():
    chosen, left = select(NAMES, ["re:.*up_proj", "re:.*q_proj"], ["re:.*\\.0\\..*"])
    assert chosen == NAMES[2:]
    assert left == {NAMES[0]: "excluded", NAMES[1]: "excluded"}
    chosen, left = select(NAMES, [NAMES[3]])
    assert chosen == [NAMES[3]]
    assert set(left.values()) == {"not included"}


@pytest.mark.parametrize("role", ["include", "exclude"])
def test_entry_that_means_nothing_is_refused(role):
    with pytest.raises(ValueError, match=f"{role} entry 'mlp.up_proj' means none"):
        select(NAMES, **{role: ["mlp.up_proj"]})
