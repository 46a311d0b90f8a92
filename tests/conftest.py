# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests: tiers, dtypes, kernel paths, tiny models. The option --no-skip, the marker `cuda`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import lissom
from lissom import testing

CUDA_FOLDERS = [Path(__file__).parent / name for name in ("simt", "ptx", "sass")]


@dataclass(frozen=True)
class Kernel:
    """One way to compute a product: a tier, a dtype and a path of the kernels."""

    isa: str
    dtype: torch.dtype
    path: str

    def __str__(self) -> str:
        return f"{self.isa}-{str(self.dtype).removeprefix('torch.')}-{self.path}"


def _kernels() -> Iterator[Kernel]:
    """Every path once, in the lowest tier of this CPU that has it."""
    for dtype in testing.DTYPES:
        for isa in testing.tiers():
            known = testing.paths("avx512", dtype) if isa in ("avx512x", "amx") else []
            known += testing.paths("avx512x", dtype) if isa == "amx" else []
            for path in testing.paths(isa, dtype):
                if path not in known:
                    yield Kernel(isa, dtype, path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        type=int,
        metavar="N",
        default=2000,
        help="random problems of each fuzz test, over all tiers (default: %(default)s)",
    )
    parser.addoption("--no-skip", action="store_true", help="a skipped test fails, unless marked optional")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in CUDA_FOLDERS):
            item.add_marker("cuda")


def _must_not_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip into a failure that says what was missing."""
    if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"--no-skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("--no-skip") and item.get_closest_marker("optional") is None:
        _must_not_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if collector.config.getoption("--no-skip"):
        _must_not_skip(report)
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", testing.tiers(), indirect=True)
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", list(_kernels()), indirect=True, ids=str)


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    """A test may switch the tier, force a path or set the number of threads: the next one finds them as they were."""
    isa, threads = lissom.cpu_isa(), torch.get_num_threads()
    yield
    lissom._C.force_path("")
    lissom.set_cpu_isa(isa)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> str:
    """Runs the test in every tier that this CPU has."""
    lissom.set_cpu_isa(request.param)
    return request.param


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Runs the test on every path of every tier and dtype, whatever this core would choose."""
    chosen: Kernel = request.param
    lissom.set_cpu_isa(chosen.isa)
    lissom._C.force_path(chosen.path)
    assert lissom._C.path_name(str(chosen.dtype).removeprefix("torch."), 8) == chosen.path
    return chosen


@pytest.fixture(scope="session")
def all_kernels() -> list[Kernel]:
    """What `kernel` goes through, for tests that do it in another process."""
    return list(_kernels())


@pytest.fixture(params=testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def tiny_llama() -> Callable[..., nn.Module]:
    """Builds a random Llama in milliseconds: tiny_llama(seed=0, dtype=torch.float32, **config)."""
    from lissom.models.tiny import build_tiny

    return lambda **settings: build_tiny("llama", **settings)
