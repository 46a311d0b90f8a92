# SPDX-License-Identifier: Apache-2.0
"""The bundled tiny model, and a way to call the command inside this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lissom import assets


@dataclass(frozen=True)
class Answer:
    """What a call of the command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as JSON: fails when anything else is on it."""
        return json.loads(self.out)


@pytest.fixture
def tiny_model() -> Path:
    """Folder of the bundled model: 4 Llama blocks, with tokenizer."""
    return assets.TINY_LLAMA


@pytest.fixture
def calibration() -> Path:
    return assets.CALIBRATION_TEXT


@pytest.fixture
def validation() -> Path:
    return assets.VALIDATION_TEXT


@pytest.fixture
def command() -> Callable[..., Answer]:
    """Calls `lissom` with arguments."""
    from lissom.cli import app

    def call(*arguments: object) -> Answer:
        found = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return Answer(found.exit_code, found.stdout, found.stderr)

    return call


@pytest.fixture
def few(calibration: Path) -> list[str]:
    """Flags of the smallest useful calibration."""
    return ["--data", str(calibration), "--samples", "2", "--seq-len", "32", "--threads", "1"]
