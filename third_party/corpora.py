#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build offline English text for calibration and perplexity from Debian packages.

    python third_party/corpora.py [CACHE] [--only NAME ...] [--optional]

Packages are downloaded by name with apt-get (run `apt-get update` once if apt
has no lists yet) and unpacked with dpkg -x below CACHE: nothing is installed.
Written to CACHE, every corpus skipped when its files are there:

    prose.{train,valid}.txt    book-like English about computing (small, stable)
    manuals.{train,valid}.txt  reference manuals (large)
    kjv.{train,valid}.txt      King James Bible, public domain (17th-century prose)
    manifest.json              package versions, licences, bytes and sha256 of each file

Documents are split by a hash of their name, so train and valid share none and
do not move when other documents change. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "lissom"
LICENCES = {
    "debian-handbook": "GPL-2.0-or-later or CC-BY-SA-3.0",
    "debian-reference-en": "GPL-2.0-or-later",
    "developers-reference": "GPL-2.0-or-later",
    "postgresql-doc-15": "PostgreSQL licence",
    "python3.11-doc": "PSF-2.0",
    "perl-doc": "Artistic or GPL-1.0-or-later",
    "bible-kjv": "GPL-2.0-or-later (the reader program, used for unpacking only)",
    "bible-kjv-text": "public domain",
}
# Packages that get no updates in Debian 12, so the figures in docs/ rest on exactly these bytes.
PINNED = {
    "prose.train.txt": "fd3a068966e2f984ad7ec96ac3aa43e911d9a1763ca87949c2fc2c9fdb4edaaf",
    "prose.valid.txt": "a17dd8b5f515df302876eb299dfcc661d2948969f7aee418f4e90eec495bec9d",
    "kjv.train.txt": "73cca25fe978d62994c59adfc5cbe85323c37274f0ba36c1c912405bed7fa25d",
    "kjv.valid.txt": "87cd31b1d2679da6ad27af1035c62a3caceee1f4f4f7eb689218e93d241a668f",
}
SENTENCE = re.compile(r"[a-z]{2,}.*[.:;!?)]$", re.S)
Document = tuple[str, str]  # name, text


class FetchError(RuntimeError):
    """A corpus cannot be had or is not what was expected."""


def log(message: str) -> None:
    """Print progress where it does not mix with results."""
    print(message, file=sys.stderr, flush=True)


@dataclass
class Packages:
    """Debian packages unpacked below `folder`; remembers the version of each one used."""

    folder: Path
    versions: dict[str, str]

    def unpack(self, name: str) -> Path:
        """Download and unpack one package, return the root of its files."""
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise FetchError("apt-get and dpkg are needed to fetch text (a Debian-like machine)")
        self.folder.mkdir(parents=True, exist_ok=True)
        root = self.folder / name
        if not any(self.folder.glob(f"{name}_*.deb")):
            log(f"apt-get download {name}")
            # as root apt would warn that its sandbox user cannot write here
            command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name]
            if subprocess.run(command, cwd=self.folder).returncode:
                raise FetchError(f"apt-get cannot download {name}; run `apt-get update` once and try again")
        archive = next(self.folder.glob(f"{name}_*.deb"))
        if not root.is_dir():
            partial = self.folder / (name + ".tmp")
            subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
            partial.rename(root)
        query = ["dpkg-deb", "-f", str(archive), "Version"]
        self.versions[name] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
        return root


class ProseParser(html.parser.HTMLParser):
    """Collects (tag, text) of paragraphs, list items, definitions and headings."""

    BLOCKS = frozenset(["p", "li", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "td", "th", "caption"])
    SKIPPED = frozenset(["script", "style", "head", "nav", "pre", "table", "footer", "header", "form"])
    VOID = frozenset(["br", "hr", "img", "link", "meta", "input", "col", "area", "base", "wbr"])
    SKIPPED_CLASS = re.compile(
        r"\b(navheader|navfooter|sphinxsidebar|related|toc|footer|docnav|mobile-nav|highlight|indextable|"
        r"footnotes|literallayout|synopsis|breadcrumbs_and_search|toctree-wrapper)\b"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[str, str]] = []
        self.pieces: list[str] = []
        self.kind = "p"
        self.open_tags: list[tuple[str, bool]] = []  # (tag, whether it starts a skipped part)
        self.skip_depth = 0

    def flush(self) -> None:
        """Close the current block."""
        text = re.sub(r"\s+", " ", "".join(self.pieces)).replace("\u00b6", "").strip()
        if text:
            self.blocks.append((self.kind, text))
        self.pieces, self.kind = [], "p"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a tag; a skipped one hides all it contains."""
        if tag in self.VOID:
            if tag == "br":
                self.pieces.append(" ")
            return
        css = dict(attrs).get("class") or ""
        skipped = tag in self.SKIPPED or bool(self.SKIPPED_CLASS.search(css))
        skipped = skipped or (tag == "a" and "headerlink" in css)
        if tag == "p":  # <p> ends an open <p>
            while self.open_tags and self.open_tags[-1][0] == "p":
                self.skip_depth -= self.open_tags.pop()[1]
        self.open_tags.append((tag, skipped))
        self.skip_depth += skipped
        if tag in self.BLOCKS and not self.skip_depth:
            self.flush()
            self.kind = tag

    def handle_endtag(self, tag: str) -> None:
        """Close a tag and every unclosed one inside it."""
        if tag in self.VOID or tag not in [name for name, _ in self.open_tags]:
            return
        closed = ""
        while closed != tag:
            closed, skipped = self.open_tags.pop()
            self.skip_depth -= skipped
        if tag in self.BLOCKS and not self.skip_depth:
            self.flush()

    def handle_data(self, data: str) -> None:
        """Keep text outside skipped parts."""
        if not self.skip_depth:
            self.pieces.append(data)


def html_prose(path: Path) -> str:
    """Return headings and the paragraphs of an HTML page that look like sentences."""
    parser = ProseParser()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.flush()
    kept: list[str] = []
    heading = ""
    for kind, text in parser.blocks:
        if kind[0] == "h":
            heading = text
        elif len(text) >= 60 and SENTENCE.search(text):
            kept += [heading, text] if heading else [text]
            heading = ""
    return "\n\n".join(kept)


def strip_pod(text: str) -> str:
    """Remove the inline markup of Perl's documentation format."""
    for _ in range(3):  # markup nests
        text = re.sub(r"[BIFSCX]<<+ (.*?) >>+", r"\1", text, flags=re.S)
        text = re.sub(r"L<(?:([^|<>]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
        text = re.sub(r"X<[^<>]*>", "", text)
        text = re.sub(r"[BIFSC]<([^<>]*)>", r"\1", text)
    for name, symbol in {"gt": ">", "lt": "<", "sol": "/", "verbar": "|"}.items():
        text = text.replace(f"E<{name}>", symbol)
    return text


def pod_prose(path: Path) -> str:
    """Return headings and the paragraphs of a POD page that look like sentences."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")):
        if paragraph[:1] in " \t":
            continue
        text = paragraph
        if paragraph.startswith("="):
            command = re.match(r"=(?:head\d|item)\s+(.*)", paragraph, re.S)
            text = command[1] if command else ""
        text = re.sub(r"\s+", " ", strip_pod(text)).strip()
        heading = paragraph.startswith("=head") and text
        if heading or (len(text) >= 60 and SENTENCE.search(text)):
            kept.append(text)
    return "\n\n".join(kept)


def pages(root: Path, pattern: str, *, skip: str) -> Iterator[tuple[str, Path]]:
    """Yield (file name, path) of the files that match, in the order of their path, less those in `skip`."""
    for path in sorted(root.glob(pattern), key=lambda p: str(p.relative_to(root))):
        if not re.search(skip, path.name):
            yield path.name, path


def prose(packages: Packages) -> list[Document]:
    """Books about Debian."""
    documents = []
    for package, pattern in (
        ("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html"),
        ("debian-reference-en", "usr/share/debian-reference/*.en.html"),
        ("developers-reference", "usr/share/developers-reference/*.html"),
    ):
        skip = r"(index|genindex|search|foreword|pr01|ix01)[^/]*$"
        for name, path in pages(packages.unpack(package), pattern, skip=skip):
            documents.append((f"{package}/{name}", html_prose(path)))
    return documents


def manuals(packages: Packages) -> list[Document]:
    """Reference manuals of PostgreSQL, Python and Perl."""
    documents = []
    root = packages.unpack("postgresql-doc-15") / "usr/share/doc/postgresql-doc-15/html"
    for name, path in pages(root, "*.html", skip=r"^(bookindex|index|release-\d.*|biblio|acronyms)\.html$"):
        documents.append((f"postgresql/{name}", html_prose(path)))
    root = packages.unpack("python3.11-doc") / "usr/share/doc/python3.11/html"
    for part in ("library", "c-api", "reference", "tutorial", "howto", "whatsnew", "extending", "using"):
        for name, path in pages(root, f"{part}/*.html", skip=r"^changelog\.html$"):
            documents.append((f"python/{part}/{name}", html_prose(path)))
    root = packages.unpack("perl-doc")
    for name, path in pages(
        root, "usr/share/perl/*/pod/*.pod", skip=r"^perl(faq|\d+delta|cn|jp|ko|tw|hist|toc)"
    ):
        documents.append((f"perl/{name}", pod_prose(path)))
    return documents


def kjv(packages: Packages) -> list[Document]:
    """The King James Bible, one document a chapter."""
    text, program = packages.unpack("bible-kjv-text"), packages.unpack("bible-kjv")
    command = [str(program / "usr/bin/bible"), "-p", str(text / "usr/lib"), "-f", "gen1:1-rev22:21"]
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    chapters: dict[str, list[str]] = {}
    for line in result.stdout.decode("latin-1").split("\n"):
        verse = re.match(r"\s*(\S+?)(\d+):(\d+)\s+(.*)", line)
        if verse:
            chapters.setdefault(f"{verse[1]}{int(verse[2]):03d}", []).append(verse[4].strip())
    if sum(map(len, chapters.values())) < 30000:
        reason = result.stderr.decode("utf-8", "replace").strip() or "too few verses"
        raise FetchError(f"the bible reader gave unexpected output ({reason}); it needs libreadline8")
    return [(name, "\n".join(verses)) for name, verses in chapters.items()]


# name -> (function that gives its documents, one document in how many goes to valid)
CORPORA: dict[str, tuple[Callable[[Packages], list[Document]], int]] = {
    "prose": (prose, 8),
    "manuals": (manuals, 20),
    "kjv": (kjv, 20),
}


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def split(documents: list[Document], valid_every: int) -> dict[str, str]:
    """Split documents into train and valid by a hash of their names, join and tidy each part."""
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for name, text in sorted(documents):
        text = re.sub(r"[ \t]+\n", "\n", text.replace("\r", "").replace("\u00a0", " ")).strip()
        if len(text) >= 200:
            digest = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            parts["train" if digest % valid_every else "valid"].append(text)
    return {part: "\n\n\n".join(texts) + "\n" for part, texts in parts.items()}


def build(name: str, cache: Path) -> None:
    """Build one corpus in `cache` unless it is there, and note it in manifest.json."""
    documents_of, valid_every = CORPORA[name]
    if all((cache / f"{name}.{part}.txt").exists() for part in ("train", "valid")):
        log(f"{name}: present, skipped")
        return
    packages = Packages(cache / "pkg", {})
    manifest_path = cache / "manifest.json"
    manifest = {"packages": {}, "licences": {}, "files": {}}
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text())
    for part, text in split(documents_of(packages), valid_every).items():
        file, data = f"{name}.{part}.txt", text.encode()
        digest = hashlib.sha256(data).hexdigest()
        if PINNED.get(file, digest) != digest:
            log(
                f"{file}: not the text that the figures in docs/ rest on (sha256 {digest}); compare with care"
            )
        write_atomically(cache / file, text)
        manifest["files"][file] = {"bytes": len(data), "words": len(data.split()), "sha256": digest}
        log(f"{file}: {len(data)} bytes")
    manifest["packages"].update(packages.versions)
    manifest["licences"].update({package: LICENCES[package] for package in packages.versions})
    write_atomically(manifest_path, json.dumps(manifest, indent=1, sort_keys=True))


def main() -> int:
    """Parse the command line and build what it names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cache", nargs="?", type=Path, default=DEFAULT_CACHE, help="default: .cache/lissom")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(CORPORA), default=["prose"], help="default: prose"
    )
    parser.add_argument("--optional", action="store_true", help="exit 0 where a corpus cannot be had")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in options.only:
        try:
            build(name, options.cache.resolve())
        except (FetchError, OSError, subprocess.CalledProcessError) as error:
            log(f"corpora.py: {name}: {error}")
            failed = True
    return 1 if failed and not options.optional else 0


if __name__ == "__main__":
    sys.exit(main())
