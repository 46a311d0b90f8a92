# SPDX-License-Identifier: Apache-2.0
"""`lissom selftest` with the CUDA kernels over the stand-in in place of a device: what a user with a GPU will run."""

from __future__ import annotations

import importlib

import pytest
import torch
from test_sparse24_host import cuda, kernels, library  # noqa: F401  (fixtures)

from lissom import selftest
from lissom.reference import sparse24 as twin

operators = importlib.import_module("lissom.ops.sparse24")
int8 = importlib.import_module("lissom.ops.sparse24_int8")


@pytest.fixture
def emulated(cuda, monkeypatch):  # noqa: F811
    """lissom.ops calls the CUDA host; its library has no autograd, so the group of gradients stays out."""
    monkeypatch.setattr(operators, "_ops", cuda)
    monkeypatch.setattr(int8, "_ops", cuda)
    monkeypatch.setattr(
        twin, "own_target", lambda device, dtype: None if dtype == torch.float32 else "sm80-v1"
    )
    monkeypatch.setattr(selftest, "SHAPES", [*selftest.SHAPES[:5], (8, 33, 100), (17, 65, 132)])
    return cuda


@pytest.mark.parametrize("name", ["fragments", "formats", "products", "real products", "edges", "int8"])
def test_a_group_passes_on_the_emulated_device(emulated, name):
    group = selftest._group(name, selftest.GROUPS[name], "cpu", "sm_80")
    assert group["trouble"] == ""
    assert group["checks"] >= 8
    started = "".join(kernels())
    assert "sparse24" in started or "pack" in started
    if name == "fragments":
        assert "sparse24_gemm" in started
        assert "sparse24_gemv" in started
    if name == "int8":
        assert "sparse24_gemm" in started
        assert "sparse24_gemv" not in started


# Axes of the 128 bytes of metadata: g, selector, quads 0-3 or 4-7, rows g or g + 8, byte.
FAULTS = {"selectors": 2, "columns": 3, "rows": 4}


@pytest.mark.parametrize("what", FAULTS)
def test_fragments_name_exchanged_metadata(emulated, monkeypatch, what):
    right = operators.sparse24_pack

    def exchanged(values, meta):
        packed = right(values, meta).clone()
        records = packed[128:][: (packed.numel() - 128) // 1152 * 1152].view(-1, 1152)
        words = records[:, :128].reshape(-1, 8, 2, 2, 2, 2)
        records[:, :128] = words.flip(FAULTS[what]).reshape(-1, 128)
        return packed

    monkeypatch.setattr(selftest.ops, "sparse24_pack", exchanged)
    group = selftest._group("fragments", selftest.fragments, "cpu", "sm_80")
    assert "elements are wrong" in group["trouble"]
    assert "must be x[" in group["trouble"]
