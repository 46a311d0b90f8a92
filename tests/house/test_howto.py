# SPDX-License-Identifier: Apache-2.0
"""The guides of docs/howto run as they stand, with the bundled model in place of the fetched one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lissom import assets

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs" / "howto").glob("*.md"))
STAND_INS = {
    ".cache/lissom/smollm2-135m-instruct": str(assets.TINY_LLAMA),
    ".cache/lissom/prose.train.txt": str(assets.CALIBRATION_TEXT),
    ".cache/lissom/prose.valid.txt": str(assets.VALIDATION_TEXT),
    "A free operating system is": "And it came to pass",
}
SETS_UP = ("third_party/", ".venv/bin/activate")  # this test runs inside what these lines make


def commands_of(guide: Path) -> list[str]:
    """Return what a reader types: of each section its Python as one script, then its shell lines."""
    text = guide.read_text(encoding="utf-8")
    for fetched, bundled in STAND_INS.items():
        text = text.replace(fetched, bundled)
    commands = []
    for section in text.split("\n## "):
        script = "".join(re.findall(r"^```python\n(.*?)^```", section, re.S | re.M))
        if script:
            commands.append(f"{sys.executable} - <<'EOF'\n{script}EOF")
        for shell in re.findall(r"^```sh\n(.*?)^```", section, re.S | re.M):
            lines = shell.replace("\\\n", " ").splitlines()
            commands += [line for line in lines if line and not any(mark in line for mark in SETS_UP)]
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guide_runs(guide, tmp_path):
    commands = commands_of(guide)
    assert len(commands) > 5
    script = "\n".join(["set -eu", *commands])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{script}\n{result.stderr[-3000:]}"
