# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, as its reader gets it."""

import re
import shutil
import struct
import subprocess

import pytest

from lissom.reporting import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)


@pytest.fixture
def browse(tmp_path):
    """Runs headless Chromium on a file and returns what it prints."""

    def run(page, *flags):
        quiet = ["--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        call = [CHROMIUM, "--headless", "--no-sandbox", *quiet, profile, *flags, page.as_uri()]
        return subprocess.run(call, capture_output=True, text=True, timeout=60, check=True)

    return run


def test_chromium_builds_the_whole_page(report, tmp_path, browse):
    page = write_report(report, tmp_path / "page.html")
    dom = browse(page, "--dump-dom").stdout
    assert dom.count("<svg") == 14
    assert "<title>smollm2-135m-instruct: lissom report</title>" in dom
    assert dom.rstrip().endswith("</html>")
    # An element that the parser had to move or repair would change the order of the sections.
    assert re.findall(r"<h2>([^<]+)</h2>", dom)[0] == "Size"


def test_chromium_paints_light_and_dark(report, tmp_path, browse):
    page = write_report(report, tmp_path / "page.html")
    pictures = {}
    for scheme, flags in {
        "light": [],
        "dark": ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"],
    }.items():
        picture = tmp_path / f"{scheme}.png"
        browse(page, f"--screenshot={picture}", "--window-size=1100,2000", *flags)
        pictures[scheme] = picture.read_bytes()
        assert struct.unpack(">II", pictures[scheme][16:24]) == (1100, 2000)
        assert len(pictures[scheme]) > 50_000  # an unstyled or blank page compresses to far less
    assert pictures["light"] != pictures["dark"]


def test_chromium_runs_nothing_that_a_name_contains(report, tmp_path, browse):
    report["model"]["source"] = "<img src=x onerror=\"document.title='owned'\">"
    page = write_report(report, tmp_path / "page.html")
    dom = browse(page, "--dump-dom").stdout
    assert "<title>owned" not in dom
    assert "<img" not in dom.split("<body>")[1]
