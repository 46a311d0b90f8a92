# SPDX-License-Identifier: Apache-2.0
"""The scripts of third_party/ as modules: they are no package, and run before lissom is installed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "third_party"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"third_party_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models() -> ModuleType:
    return load("models")


@pytest.fixture(scope="session")
def corpora() -> ModuleType:
    return load("corpora")
