# SPDX-License-Identifier: Apache-2.0
import hashlib
import json

import pytest

PAGE = """<html><head><title>no</title></head><body><div class="navheader"><p>No navigation, please, this is
no prose at all.</p></div><h2>Caf&eacute;s<a class="headerlink" href="#x">&para;</a></h2>
<p>This paragraph is long enough to be kept, and it ends like a sentence does.<p>Short.
<pre>this is code, which is long enough to be kept but is not prose at all.</pre>
<p>An unclosed paragraph<br>with a break that is long enough to be kept as well.</body></html>"""

POD = """=head1 NAME

perlthing - B<a C<nested> thing> that does L<something useful|perlfunc> with E<lt>angleE<gt> brackets.

    code();  # is indented, and long enough that only its indentation tells it from prose.

=over 4

=cut
"""


def test_html_keeps_sentences_with_their_heading(corpora, tmp_path):
    (tmp_path / "page.html").write_text(PAGE, encoding="utf-8")
    assert corpora.html_prose(tmp_path / "page.html").split("\n\n") == [
        "Cafés",
        "This paragraph is long enough to be kept, and it ends like a sentence does.",
        "An unclosed paragraph with a break that is long enough to be kept as well.",
    ]


def test_pod_keeps_sentences_without_markup(corpora, tmp_path):
    (tmp_path / "page.pod").write_text(POD, encoding="utf-8")
    assert corpora.pod_prose(tmp_path / "page.pod").split("\n\n") == [
        "NAME",
        "perlthing - a nested thing that does something useful with <angle> brackets.",
    ]


def test_split_depends_on_names_only(corpora):
    documents = [(f"page-{i}", f"{i:03d} " * 100) for i in range(80)]
    parts = corpora.split(documents, 8)
    assert corpora.split(list(reversed(documents)), 8) == parts
    fewer = corpora.split(documents[10:], 8)
    valid, fewer_valid = set(parts["valid"].split("\n\n\n")), set(fewer["valid"].split("\n\n\n"))
    assert {text.strip() for text in fewer_valid} <= {text.strip() for text in valid}
    assert 2 <= len(valid) <= 20
    assert corpora.split([("tiny", "too short")], 8) == {"train": "\n", "valid": "\n"}


def test_missing_package_manager_is_one_sentence(corpora, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(corpora.FetchError, match="apt-get and dpkg are needed"):
        corpora.build("prose", tmp_path)
    assert not list(tmp_path.glob("*.txt"))


@pytest.mark.real
@pytest.mark.parametrize("name", ["prose.train.txt", "prose.valid.txt"])
def test_fetched_text_is_the_pinned_one(corpora, name):
    path = corpora.DEFAULT_CACHE / name
    if not path.exists():
        pytest.skip(f"{name} is absent; run python third_party/corpora.py")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == corpora.PINNED[name]
    assert json.loads((path.parent / "manifest.json").read_text())["files"][name]["sha256"] == digest
