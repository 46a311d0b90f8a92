# SPDX-License-Identifier: Apache-2.0
"""`lissom selftest`: passes here, names a planted fault by its group, and says what a GPU run lacks."""

from types import SimpleNamespace

import pytest
import torch

from lissom import ops, selftest
from lissom.benchmark import cuda, predict


@pytest.fixture
def small(monkeypatch):
    """One instruction set, a few shapes."""
    monkeypatch.setattr(selftest, "_tiers", lambda device: ["portable"])
    monkeypatch.setattr(selftest, "SHAPES", selftest.SHAPES[:4])


def test_the_kernels_of_this_machine_pass(small):
    told = []
    result = selftest.run("cpu", on_progress=told.append)
    assert result["passed"], selftest.markdown(result)
    assert [group["name"] for group in result["groups"]] == list(selftest.GROUPS)
    assert all(group["checks"] >= 10 for group in result["groups"])
    assert told[0] == "portable: fragments"
    assert result["timings"] is None


def _plant(monkeypatch, name, wrong):
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *given, **named: wrong(right, *given, **named))


def _rows_exchanged(right, values, meta):
    """As if selector 1 were given where 0 is meant: the metadata of the halves of a fragment change places."""
    return right(values, meta.roll(16, 0))


def _two_tokens_exchanged(right, x, *rest, **named):
    return right(x, *rest, **named).flip(0)


def _last_row_lost(right, x, packed, n, k, *rest, **named):
    y = right(x, packed, n, k, *rest, **named)
    if n % 32:
        y[..., n - 1 :] = 0
    return y


def _biased(right, x, packed, n, k, bias=None, act="none", *rest, **named):
    y = right(x, packed, n, k, bias, act, *rest, **named)
    return y * 1.05 if act == "silu" else y


def _no_gradient(right, dy, *rest):
    return torch.zeros_like(right(dy, *rest))


def _dense(right, x, packed, n, k, bias=None, act="none", *rest, **named):
    """A kernel that multiplies by the zeros too."""
    w = ops.sparse24_decompress(*ops.sparse24_unpack(packed, n, k), k)
    y = right(x, packed, n, k, bias, act, *rest, **named)
    return y + (x.float() * 0) @ w.float().T.nan_to_num() if x.isnan().any() else y


@pytest.mark.parametrize(
    ("group", "name", "wrong", "says"),
    [
        ("fragments", "sparse24_pack", _rows_exchanged, "with selector 1"),
        ("fragments", "sparse24_linear", _two_tokens_exchanged, "which is x["),
        ("products", "sparse24_linear", _last_row_lost, "elements are wrong, first"),
        ("real products", "sparse24_linear", _biased, "silu"),
        ("gradients", "sparse24_mask_mm", _no_gradient, "mask_mm"),
        ("edges", "sparse24_linear", _dense, "NaN where W is pruned"),
    ],
)
def test_a_planted_fault_stops_at_its_group(small, monkeypatch, group, name, wrong, says):
    _plant(monkeypatch, name, wrong)
    result = selftest.run("cpu")
    assert not result["passed"]
    assert result["groups"][-1]["name"] == group
    assert says in selftest.markdown(result)


def test_an_exception_is_a_finding(small, monkeypatch):
    def refuse(*given, **named):
        raise RuntimeError("launch failed:\n  error 719")

    monkeypatch.setattr(ops, "sparse24_linear", refuse)
    result = selftest.run("cpu")
    assert result["groups"][-1]["trouble"] == "float32: RuntimeError: launch failed: error 719"


CUDA_TORCH = SimpleNamespace(
    __version__="2.13.0+cu130",
    version=SimpleNamespace(cuda="13.0"),
    cuda=SimpleNamespace(is_available=lambda: True, get_device_capability=lambda: (7, 5)),
)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        ({"architectures": [], "trouble": "", "devices": 0}, "no CUDA kernels"),
        ({"architectures": ["sm_80"], "trouble": "no driver", "devices": 0}, "finds no device: no driver"),
        ({"architectures": ["sm_80"], "trouble": None, "devices": 0}, "finds no device: none is installed"),
        ({"architectures": ["sm_80"], "trouble": None, "devices": 1}, "sm_75"),
    ],
)
def test_it_says_what_is_missing(monkeypatch, build, says):
    monkeypatch.setattr(selftest.lissom, "cuda_info", lambda: build)
    monkeypatch.setattr(selftest, "torch", CUDA_TORCH)
    with pytest.raises(RuntimeError, match=says):
        selftest.run("cuda")


def test_without_a_gpu_the_command_fails_cleanly(command):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    answer = command("selftest", "--device", "cuda", "--json")
    assert answer.code == 1
    assert answer.json["error"]["message"].startswith("no selftest on cuda: ")
    plan = command("selftest", "--device", "cuda", "--dry-run", "--json")
    assert (plan.code, plan.json["groups"]) == (0, list(selftest.GROUPS))
    assert plan.json["missing"]
    assert command("selftest", "--device", "tpu").code == 2


def test_the_command_shows_the_report_and_exits_by_it(small, command, monkeypatch):
    good = command("selftest", "-q")
    assert (good.code, good.err) == (0, "")
    assert "| portable | edges |" in good.out
    _plant(monkeypatch, "sparse24_mask_mm", _no_gradient)
    bad = command("selftest", "--json")
    assert bad.code == 1
    assert not bad.json["passed"]
    assert "FAILED" in bad.json["markdown"]


def test_times_are_interleaved_and_cold(monkeypatch):
    clock = iter(range(10_000))
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: next(clock) / 1000)
    fake = SimpleNamespace(
        Event=lambda enable_timing: event, synchronize=lambda: None, _sleep=lambda cycles: None
    )
    monkeypatch.setattr(cuda.torch, "cuda", fake)
    calls: list[tuple[str, int]] = []
    contenders = [lambda i: calls.append(("ours", i)), lambda i: calls.append(("dense", i))]
    ours, dense = cuda._interleaved(contenders, cold=True, copies=3)
    assert calls[2:8] == [("ours", 0), ("dense", 0), ("ours", 1), ("dense", 1), ("ours", 2), ("dense", 2)]
    assert (ours, dense) == (cuda.REPEATS - 1, cuda.REPEATS)  # medians of every second tick
    calls.clear()
    cuda._interleaved(contenders, cold=False, copies=3)
    assert {i for _, i in calls} == {0}


def test_the_table_tells_measured_from_predicted():
    row = predict.predict("a100", "bfloat16", 16, 4096, 4096)
    text = cuda.markdown([{**row, "measured_us": 20.0, "dense_measured_us": 30.0, "measured_ratio": 1.5}])
    head, _, line, *_ = text.splitlines()
    assert head.count("measured") == 3
    assert len(head.split("|")) == len(line.split("|"))
    assert f"| 20.0 | {row['us']:.1f} | 30.0 | 1.50 |" in line


@pytest.mark.parametrize("gpu", sorted(predict.GPUS))
def test_a_gpu_is_tested_in_every_kernel_that_it_uses(gpu):
    shapes = selftest.shapes_of_every_kernel(gpu)
    tiles = {tuple(predict.predict(gpu, "bfloat16", *sizes)["tile"] or ()) for sizes in shapes}
    assert () in tiles  # gemv
    assert len(tiles) >= 8
    assert sum(m * n * k for m, n, k in shapes) < 3e10  # float64 on the CPU, in seconds
