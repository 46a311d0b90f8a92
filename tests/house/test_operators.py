# SPDX-License-Identifier: Apache-2.0
"""From an operator's name to its files: schema, wrapper, twin, host, test."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = (ROOT / "csrc" / "schemas.cpp").read_text(encoding="utf-8")
OPERATORS = re.findall(r"m\.def\(\s*\"(\w+)\(", SCHEMAS)
FAMILIES = sorted(path.name for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name != "core")


def test_there_are_operators_and_families():
    assert len(OPERATORS) == len(set(OPERATORS)) == SCHEMAS.count("m.def(") > 5
    assert "sparse24" in FAMILIES


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "place",
    [
        "python/lissom/ops/{}.py",
        "python/lissom/reference/{}.py",
        "csrc/{}/cpu/{}_host.cpp",
        "tests/ops/test_{}*.py",
    ],
)
def test_operator_has_its_place(name, place):
    family = next((family for family in FAMILIES if name.startswith(family + "_")), None)
    assert family, f"{name} does not begin with the name of a folder of csrc: {FAMILIES}"
    files = list(ROOT.glob(place.format(*[family] * place.count("{}"))))
    assert files, f"there is no {place.format(*[family] * place.count('{}'))}"
    assert any(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for file in files), (
        f"{name} does not occur in {[str(file.relative_to(ROOT)) for file in files]}"
    )
