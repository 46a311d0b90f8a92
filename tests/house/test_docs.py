# SPDX-License-Identifier: Apache-2.0
"""Links of the Markdown pages lead somewhere, and the examples in docstrings run."""

import doctest
import importlib
import pkgutil
import re

import pytest

import lissom

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lissom.__path__, "lissom.")
    if module.name not in ("lissom.__main__", "lissom._C")
)


def anchors(text: str) -> set[str]:
    """Return the anchors that a Markdown viewer makes of the headings of `text`."""
    headings = re.findall(r"^#+\s+(.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_resolve(markdown, root):
    text = re.sub(r"```.*?```", "", markdown.read_text(encoding="utf-8"), flags=re.S)
    for link in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (markdown.parent / name).resolve() if name else markdown
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(root), f"{link} leads out of the repository"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{link}: no such heading"


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0, (
        f"{result.failed} of {result.attempted} examples of {name} fail (see the output)"
    )
