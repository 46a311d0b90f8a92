# SPDX-License-Identifier: Apache-2.0
"""The host SIMT executor proves itself: instructions, conversions, reports, counters and the list of planted faults."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = 66  # forward, reverse and 20 random schedules, three ways of landing

# Planted fault -> what is reported first under the forward schedule; None: it shows in the values only, in every run.
FAULTS = {
    "sum.no_barrier": "uninitialised",
    "sum.store_past_end": "bounds",
    "sum.shuffle_in_branch": "divergence",
    "sum.barrier_in_branch": "deadlock",
    "sum.two_barriers": "divergence",
    "sum.return_before_barrier": "divergence",
    "sum.uninitialised_slot": "uninitialised",
    "sum.same_output": "race",
    "sum.read_only_output": "read only",
    "sum.misaligned_load": "misaligned",
    "relay.arrive_only": "uninitialised",
    "relay.late_arrive": "race",
    "relay.named_count": "operand",
    "relay.half_warp": "deadlock",
    "relay.no_warp_sync": "uninitialised",
    "relay.plain_count": "race",
    "ring.load_before_barrier": "race",
    "ring.weak_wait": "in flight",
    "ring.no_wait": "in flight",
    "ring.no_commit": "in flight",
    "ring.no_loop_barrier": "race",
    "ring.no_reuse_barrier": "race",
    "ring.no_read_barrier": "race",
    "ring.source_past_end": "bounds",
    "ring.shifted_source": "misaligned",
    "ring.too_many_bytes": "operand",
    "ring.no_zero_fill": "uninitialised",
    "ring.wrong_selector": None,
    "ring.swapped_nibbles": "operand",
    "ring.swapped_halves": None,
    "ring.no_swizzle": "bank conflicts",
}
CONTROLS = ("sum.nothing", "relay.nothing", "ring.nothing")
# What the values alone must show in some run, without any detector: schedules and landings are of use by themselves.
SHOWN_BY_VALUES = (
    "sum.no_barrier",
    "relay.late_arrive",
    "ring.load_before_barrier",
    "ring.weak_wait",
    "ring.no_wait",
    "ring.no_loop_barrier",
    "ring.no_reuse_barrier",
    "ring.no_read_barrier",
)


def judged(answer: subprocess.CompletedProcess[str]) -> dict[str, tuple[int, int, int, str]]:
    """name -> runs, reported, wrong values only, first report"""
    assert answer.returncode == 0, answer.stderr
    lines = (line.split(maxsplit=4) for line in answer.stdout.splitlines())
    return {name: (int(runs), int(found), int(wrong), first) for name, runs, found, wrong, first in lines}


def test_every_planted_fault_is_caught_in_every_run(simt):
    results = judged(simt.run(simt.program("mutants.cpp")))
    assert set(results) == set(FAULTS) | set(CONTROLS)
    for name, first in FAULTS.items():
        wanted = (RUNS, RUNS, 0, first) if first else (RUNS, 0, RUNS, "-")
        assert results[name] == wanted, name
    for name in CONTROLS:
        assert results[name] == (RUNS, 0, 0, "-"), name


def test_schedules_and_landings_show_faults_without_the_detector(simt):
    results = judged(simt.run(simt.program("mutants.cpp"), "--no-detector", *SHOWN_BY_VALUES, *CONTROLS))
    for name in SHOWN_BY_VALUES:
        assert results[name][2] > 0, f"{name} never gave a wrong value"
    for name in CONTROLS:
        assert results[name] == (RUNS, 0, 0, "-"), name


def test_sanitizers_are_silent_on_the_controls_and_find_the_source_past_the_end(simt):
    program = simt.program("mutants.cpp", sanitize=True)
    results = judged(simt.run(program, "--plain-memory", *CONTROLS))
    assert all(results[name] == (RUNS, 0, 0, "-") for name in CONTROLS)
    answer = simt.run(program, "--plain-memory", "ring.source_past_end")
    assert answer.returncode != 0
    assert "heap-buffer-overflow" in answer.stderr


@pytest.mark.parametrize(
    "source, printed",
    [("test_reports.cpp", "reports: 69 of 69\n"), ("test_instructions.cpp", "instructions: ok\n")],
)
def test_program(simt, build, source, printed):
    answer = simt.run(build(source))
    assert (answer.returncode, answer.stdout) == (0, printed), answer.stderr


def test_schedules_launches_and_counters(simt, build):
    answer = simt.run(build("test_executor.cpp"))
    assert answer.returncode == 0, answer.stderr
    (kernel,) = json.loads(answer.stdout)  # one line, for the performance model
    assert kernel["kernel"].startswith("lissom::plants::ring<")
    assert kernel["matrix"] == {"mma_sp_m16n8k32": 192}
    assert {place["operation"] for place in kernel["shared"]} == {"cp_async", "ldmatrix", "store", "load"}
    for place in kernel["shared"]:
        assert place["wavefronts"] == place["ideal"] > 0
        assert (place["file"], place["line"] > 100) == ("kernels.cuh", True)
    for place in kernel["global"]:
        assert 32 * place["sectors"] == place["bytes"] == 32 * place["ideal"]


def test_portable_fibers(simt):
    answer = simt.run(simt.program("test_executor.cpp", flags=("-DSIMT_UCONTEXT",)))
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("bits, dtype", [(16, torch.bfloat16), (17, torch.float16), (8, torch.int8)])
def test_sparse_product_of_what_torch_converts(simt, tmp_path, bits, dtype):
    """Values and metadata straight from torch's converter (CUTLASS layout): word l of a block goes to lane l."""
    m, n, k = 64, 16, 256
    generator = torch.Generator().manual_seed(bits)
    mask = torch.rand(m, k // 4, 4, generator=generator).argsort(-1) < 2
    w = torch.randint(1, 64, (m, k // 4, 4), generator=generator) * mask
    x = torch.randint(-64, 64, (n, k), generator=generator)
    w = w.view(m, k)
    scale = 1 if bits == 8 else 64
    values, meta = sparse_semi_structured_from_dense_cutlass((w / scale).to(dtype))
    parts = (values.contiguous(), meta.contiguous(), (x / scale).to(dtype))
    (tmp_path / "in").write_bytes(b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts))
    sizes = map(str, (bits, m, n, k))
    program = simt.program("test_instructions.cpp")
    answer = simt.run(program, "product", *sizes, tmp_path / "in", tmp_path / "out")
    assert answer.returncode == 0, answer.stderr
    y = torch.from_numpy(np.fromfile(tmp_path / "out", np.float32)).view(m, n)
    assert torch.equal(y.double(), (w.double() @ x.double().T) / scale**2)


def floats_to_round() -> np.ndarray:
    """Every value of both types, the middles between neighbours, one float to each side of both, and random bits."""
    bits = np.arange(65536, dtype=np.uint32)
    f16 = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    ordered = np.unique(f16[np.isfinite(f16)])
    middles = (ordered[1:] + ordered[:-1]) / 2
    exact = np.concatenate(
        [bits << 16, (bits << 16) + np.uint32(1 << 15), f16.view(np.uint32), middles.view(np.uint32)]
    )
    drawn = np.random.default_rng(1).integers(0, 2**32, 1 << 20, dtype=np.uint32)
    return np.concatenate([exact, exact + np.uint32(1), exact - np.uint32(1), drawn]).view(np.float32)


def test_conversions_are_bit_exact(simt, tmp_path):
    floats = floats_to_round()
    (tmp_path / "in").write_bytes(floats.tobytes())
    program = simt.program("test_instructions.cpp")
    assert simt.run(program, "numbers", tmp_path / "in", tmp_path / "out").returncode == 0
    out = np.fromfile(tmp_path / "out", np.uint32)
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    for ours, dtype in ((out[:65536], torch.float16), (out[65536:131072], torch.bfloat16)):
        theirs = every.view(dtype).float().numpy()
        number = ~np.isnan(theirs)
        assert np.array_equal(ours[number], theirs[number].view(np.uint32))
        assert np.isnan(ours.view(np.float32)[~number]).all()
    rounded = out[131072:]
    number = ~np.isnan(floats)
    for ours, dtype in ((rounded & 0xFFFF, torch.float16), (rounded >> 16, torch.bfloat16)):
        theirs = torch.from_numpy(floats).to(dtype).view(torch.uint16).numpy()
        assert np.array_equal(ours[number], theirs[number])
        assert (ours[~number] == 0x7FFF).all()  # the one NaN that the device's conversions give
    with np.errstate(over="ignore"):
        numpy_says = floats.astype(np.float16).view(np.uint16)
    assert np.array_equal((rounded & 0xFFFF)[number], numpy_says[number])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_both_halves_of_dev_have_the_same_signatures(tmp_path):
    """The kernels that ran here also compile for the device."""
    source = tmp_path / "kernels.cu"
    source.write_text(
        '#include "kernels.cuh"\n'
        "namespace lissom::plants {\n"
        "template __global__ void sum<Plant::nothing>(const float*, float*, int);\n"
        "template __global__ void relay<Plant::nothing>(const float*, float*);\n"
        "template __global__ void ring<Plant::nothing, dev::f16>"
        "(const dev::f16*, const uint32_t*, const dev::f16*, float*, int, int);\n"
        "}\n"
    )
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-cubin", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    command += [
        "-Xptxas",
        "--warn-on-spills,--warn-on-local-memory-usage,-Werror",
        "-o",
        str(tmp_path / "k.cubin"),
    ]
    subprocess.run([*command, str(source)], check=True)
