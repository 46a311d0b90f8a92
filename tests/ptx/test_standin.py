# SPDX-License-Identifier: Apache-2.0
"""The real extern "C" launchers over the stand-in for the CUDA runtime: results, limits, error paths."""

from __future__ import annotations

import ctypes
from pathlib import Path

import interpreter
import numpy as np
import pytest
from interpreter import buffers, const

INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES, LAUNCH_FAILURE = 1, 9, 701, 719


class Launchers:
    def __init__(self) -> None:
        self.library = interpreter.launchers([Path(__file__).resolve().parent / "kernels" / "launch.cu"])
        self.x = np.arange(300, dtype=np.float32)
        self.y = np.zeros(300, np.float32)

    def scale(self, shared: int = 512, grid: int = 3, stream: int = 0, n: int = 300) -> int:
        plain = [
            ctypes.c_void_p(self.x.ctypes.data),
            ctypes.c_void_p(self.y.ctypes.data),
            n,
            ctypes.c_double(2.5),
        ]
        with buffers(x=const(self.x), y=self.y):
            return self.library.launch_scale(*plain, shared, ctypes.c_int64(grid), ctypes.c_void_p(stream))

    def plain(self, shared: int, threads: int = 128) -> int:
        pointers = [ctypes.c_void_p(self.x.ctypes.data), ctypes.c_void_p(self.y.ctypes.data)]
        with buffers(x=const(self.x), y=self.y):
            return self.library.launch_without_opt_in(*pointers, 256, shared, threads)


@pytest.fixture
def launchers(nvcc):
    return Launchers()


def test_a_launcher_runs_end_to_end(launchers):
    assert launchers.scale(stream=0x1230) == 0, interpreter.error()
    np.testing.assert_array_equal(launchers.y, launchers.x * np.float32(2.5) + 1)
    (line,) = interpreter.library().ptx_launches().decode().splitlines()
    name, grid, threads, shared, stream = line.split("\t")
    assert "scale" in name
    assert (grid, threads, shared, stream) == ("3,1,1", "128,1,1", "512", "0x1230")


def test_angle_brackets_and_module_variables(launchers):
    y = np.zeros(4, np.int32)
    with buffers(y=y):
        assert launchers.library.launch_bump(ctypes.c_void_p(y.ctypes.data), 1) == 0, interpreter.error()
    assert (y == 5).all()


@pytest.mark.parametrize(("grid", "shared", "code"), [
    (0, 512, INVALID_CONFIGURATION), (2**31, 512, INVALID_CONFIGURATION), (1, 200 << 10, INVALID_VALUE),
])  # fmt: skip
def test_impossible_launches_return_the_error(launchers, grid, shared, code):
    assert launchers.scale(grid=grid, shared=shared) == code
    assert not launchers.y.any()
    assert launchers.scale() == 0, "the next launch is not harmed"


def test_grid_limits_of_y_and_z(launchers):
    y = np.zeros(4, np.int32)
    with buffers(y=y):
        pointer = ctypes.c_void_p(y.ctypes.data)
        assert launchers.library.launch_bump(pointer, 65536) == INVALID_CONFIGURATION
        assert launchers.library.launch_bump(pointer, 0) == INVALID_CONFIGURATION
        assert launchers.library.launch_bump(pointer, 1) == 0


def test_large_shared_memory_needs_the_opt_in(launchers):
    assert launchers.plain(49 << 10) == INVALID_VALUE
    assert "opt-in" in interpreter.error()
    assert launchers.plain(48 << 10) == 0
    assert launchers.scale(shared=60 << 10) == 0, "dev::launch asks for it"
    assert launchers.plain(49 << 10) == 0, "the opt-in stays"


def test_launch_bounds_and_block_limits(launchers):
    assert launchers.plain(512, threads=160) == OUT_OF_RESOURCES
    assert launchers.plain(512, threads=1056) == INVALID_CONFIGURATION
    assert launchers.plain(512, threads=0) == INVALID_CONFIGURATION


def test_the_device_sets_the_limit(launchers):
    library = interpreter.library()
    assert launchers.scale(shared=120 << 10) == INVALID_VALUE, "99 KiB on the least device"
    sms, optin = ctypes.c_int(), ctypes.c_int()
    for capability, limit in ((80, 163), (90, 227), (120, 99)):
        assert library.ptx_set_device(capability) == 0
        assert launchers.library.query(ctypes.byref(sms), ctypes.byref(optin)) == 0
        assert (optin.value, sms.value > 100) == (limit << 10, True)
        assert launchers.scale(shared=limit << 10) == 0
        assert launchers.scale(shared=(limit << 10) + 16) == INVALID_VALUE


@pytest.mark.parametrize(
    ("function", "shared"), [("cudaLaunchKernel", 512), ("cudaFuncSetAttribute", 60 << 10)]
)
def test_injected_errors_come_back(launchers, function, shared):
    interpreter.library().ptx_inject(function.encode(), 2, 46)
    assert [launchers.scale(shared=shared) for _ in range(3)] == [0, 46, 0]


def test_a_fault_in_a_kernel_fails_the_launch_for_good(launchers):
    assert launchers.scale(grid=4, n=400) == LAUNCH_FAILURE
    assert "out of bounds" in interpreter.error()
    assert launchers.scale() == LAUNCH_FAILURE
    interpreter.library().ptx_reset()
    assert launchers.scale() == 0


def test_the_counts_of_a_launched_kernel_are_known(launchers):
    assert launchers.scale() == 0
    name = interpreter.library().ptx_launches().decode().split("\t")[0]
    rows = interpreter.launched_counts(name)
    assert max(count for count, _, text in rows if text.startswith("bar.sync")) >= 12


def test_options_reach_the_launches(launchers):
    interpreter.set_options(seed=3, landing="late", max_steps=10)
    assert launchers.scale() == LAUNCH_FAILURE
    assert "no end after" in interpreter.error()
