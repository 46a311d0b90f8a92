# SPDX-License-Identifier: Apache-2.0
"""The 2:4 linear against the strongest dense linears of this machine."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lissom import ops
from lissom.benchmark import machine
from lissom.reference.sparse24 import packed_bytes

SHAPES = ((4096, 4096), (4096, 11008), (2048, 8192))  # (K, N)
TOKENS = (1, 4, 16, 64, 256, 1024)
DTYPES = ("bfloat16", "float32")
COLD_UP_TO = 16  # tokens: below, a user's weights come from memory; so do the benchmark's
_COLD_BYTES = 256 << 20

# What caps torch, oneDNN and MKL to a tier, so that a tier meets peers of its own.
_CAPS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512x": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}


def run(
    *,
    quick: bool = False,
    threads: int | None = None,
    dtypes: Sequence[str] | None = None,
    tokens: Iterable[int] = TOKENS,
    shapes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Any]]:
    """Times every combination, all contenders interleaved in one run, median.

    Args:
        quick: one shape, 2048 x 2048, and fewer rounds. threads: torch's by default.
        dtypes: of float32, bfloat16, float16. tokens: rows of x. shapes: (K, N) pairs.

    Returns:
        One dict a combination: dtype, M, N, K, threads, ours_us, path, peers {name: us} of the same dtype,
        left_out {peer: reason}, other_peers {name: us}, ratio_best (fastest peer over ours),
        ratio_huge_pages (the same, peers whose weights were moved onto huge pages, as ours are, included;
        None where the system has none), byte_ratio (dense over packed), gflops
        (dense-equivalent: 2 M N K), gbps (packed bytes over time) and roofline_share (the time that bytes or
        arithmetic of the 2:4 form need at least, over ours; the ceilings are those that dense code reaches on
        this machine, so it may pass 1).

    >>> row = run(quick=True, threads=1, dtypes=["float32"], tokens=[1], shapes=[(64, 64)])[0]
    >>> row["M"], row["N"], sorted(row["peers"])[0]
    (1, 64, 'F.linear')
    """
    count = threads or torch.get_num_threads()
    chosen = list(shapes or ([(2048, 2048)] if quick else SHAPES))
    ceilings = machine.measure(threads=count, quick=True)
    rows = []
    with machine.torch_threads(count), torch.inference_mode():
        for name in dtypes or DTYPES:
            dtype = getattr(torch, name)
            for m in tokens:
                for k, n in chosen:
                    rows.append(_time_one(dtype, m, n, k, quick) | {"threads": count})
                    rows[-1]["roofline_share"] = _roofline_share(rows[-1], ceilings)
    return rows


def geomean_ratios(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Geometric mean over shapes of ratio_best, by (dtype, M).

    >>> geomean_ratios([{"dtype": "float32", "M": 1, "ratio_best": r} for r in (1.0, 4.0)])
    {('float32', 1): 2.0}
    """
    logs: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        logs.setdefault((row["dtype"], row["M"]), []).append(math.log(row["ratio_best"]))
    return {key: math.exp(sum(found) / len(found)) for key, found in logs.items()}


def run_capped(isa: str, **options: Any) -> list[dict[str, Any]]:
    """`run` in a process of its own in which our kernels and the peers are capped to a tier.

    Args:
        isa: avx2, avx512 or avx512x. options: as `run`.

    Raises:
        ValueError: another tier. RuntimeError: the process failed.
    """
    if isa not in _CAPS:
        raise ValueError(f"benchmark.sparse24: peers can be capped to {', '.join(_CAPS)}; got {isa!r}")
    done = subprocess.run(
        [sys.executable, "-m", "lissom.benchmark.sparse24"],
        input=json.dumps(options),
        capture_output=True,
        text=True,
        env=os.environ | _CAPS[isa] | {"LISSOM_CPU_ISA": isa},
    )
    if done.returncode:
        raise RuntimeError(
            f"benchmark.sparse24: the run capped to {isa} failed: {done.stderr.strip()[-500:]}"
        )
    return json.loads(done.stdout)


def tune(*, threads: int = 1) -> dict[str, Any]:
    """Times both fp32-math paths of this tier by M, for the table in csrc/core/cpu_isa.cpp.

    Returns:
        `rows` [{dtype, M, permuted_us, lanes_us}] and `from` {dtype: least M from which `lanes` stays
        ahead, or None}.
    """
    from lissom import _C

    rows: list[dict[str, Any]] = []
    with machine.torch_threads(threads), torch.inference_mode():
        for name in ("float32", "bfloat16", "float16"):
            packed = ops.sparse24_pack(*_compressed(4096, 4096, getattr(torch, name)))
            x = torch.randn(128, 4096)
            for m in (8, 16, 24, 32, 48, 64, 96, 128):
                calls = {
                    path: _forced(path, x[:m].to(getattr(torch, name)), packed)
                    for path in ("permuted", "lanes")
                }
                try:
                    seconds = machine.median_seconds(calls, 9)
                finally:
                    _C.force_path("")
                rows.append({"dtype": name, "M": m} | {f"{path}_us": 1e6 * s for path, s in seconds.items()})
    least: dict[str, int | None] = {}
    for row in reversed(rows):
        if row["lanes_us"] < row["permuted_us"] and least.get(row["dtype"], 0) is not None:
            least[row["dtype"]] = row["M"]
        elif row["dtype"] not in least:
            least[row["dtype"]] = None
    return {"rows": rows, "from": least}


def _forced(path: str, x: Tensor, packed: Tensor) -> Callable[[int], Tensor]:
    from lissom import _C

    def call(_: int) -> Tensor:
        _C.force_path(path)
        return ops.sparse24_linear(x, packed, 4096, 4096)

    return call


def _compressed(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return ops.sparse24_compress(torch.randn(n, k).to(dtype), pattern="magnitude")


def _rotating(make: Callable[[], Any], bytes_each: int, m: int) -> list[Any]:
    """Enough copies that none is still cached when its turn comes again; one where weights are warm."""
    copies = 1 if m > COLD_UP_TO else max(2, -(-_COLD_BYTES // bytes_each))
    return [make() for _ in range(copies)]


def contenders(dtype: torch.dtype, m: int, n: int, k: int) -> dict[str, Callable[[int], Any]]:
    """Our linear (`ours`) and the dense ones of the same dtype, as functions of the round's index.

    The index rotates copies of the weights where M <= 16, so that they are cold.
    """
    torch.manual_seed(0)
    x = torch.randn(m, k).to(dtype)
    return {"ours": _ours(x, n)} | _dense_peers(x, n)[0]


def _ours(x: Tensor, n: int) -> Callable[[int], Tensor]:
    m, k = x.shape
    canonical = _compressed(n, k, x.dtype)
    # Packed anew each time: a clone of a packed weight would not be on huge pages.
    packed = _rotating(lambda: ops.sparse24_pack(*canonical), packed_bytes(n, k, x.dtype), m)
    return lambda r: ops.sparse24_linear(x, packed[r % len(packed)], n, k)


def _time_one(dtype: torch.dtype, m: int, n: int, k: int, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(m, k).to(dtype)
    peers, left_out = _dense_peers(x, n)
    huge, without = _dense_peers(x, n, huge_pages=True)
    huge = {f"{name}, huge pages": call for name, call in huge.items()}
    left_out |= {f"{name}, huge pages": reason for name, reason in without.items()}
    calls = {"ours": _ours(x, n)} | peers | huge
    if dtype != torch.float32:
        widened = _dense_peers(torch.randn(m, k), n, only_onednn=True)[0]
        calls |= {f"{name}, widened to float32": call for name, call in widened.items()}
    rounds = (5 if quick else 9) if m > 64 else (9 if quick else 25)
    micros = {name: 1e6 * s for name, s in machine.median_seconds(calls, rounds).items()}
    ours = micros["ours"]
    packed = packed_bytes(n, k, dtype)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "M": m,
        "N": n,
        "K": k,
        "ours_us": ours,
        "path": _path_name(dtype, m),
        "peers": {name: micros[name] for name in peers},
        "left_out": left_out,
        "other_peers": {name: t for name, t in micros.items() if name not in peers and name != "ours"},
        "ratio_best": min(micros[name] for name in peers) / ours,
        "ratio_huge_pages": min(micros[name] for name in (*peers, *huge)) / ours if huge else None,
        "gflops": 2 * m * n * k / ours / 1e3,
        "gbps": packed / ours / 1e3,
        "byte_ratio": n * k * dtype.itemsize / packed,
    }


def _path_name(dtype: torch.dtype, m: int) -> str:
    from lissom import _C

    return str(_C.path_name(str(dtype).removeprefix("torch."), m))


def _dense_peers(
    x: Tensor, n: int, *, only_onednn: bool = False, huge_pages: bool = False
) -> tuple[dict[str, Callable[[int], Any]], dict[str, str]]:
    """The dense linears that run here, and why the others do not.

    With `huge_pages` only those whose weights could be moved onto such pages.
    """
    m, k = x.shape
    weights = _rotating(lambda: torch.randn(n, k).to(x.dtype), n * k * x.element_size(), m)
    peers: dict[str, Callable[[int], Any]] = {}
    left_out: dict[str, str] = {}
    if torch.backends.mkldnn.is_available():
        try:
            made = [torch.ops.mkldnn._reorder_linear_weight(w, m) for w in weights]
        except RuntimeError as reason:  # bf16 when capped to AVX2
            left_out["oneDNN"] = str(reason).splitlines()[0]
        else:
            peers["oneDNN"] = lambda r: torch.ops.mkldnn._linear_pointwise(
                x, made[r % len(made)], None, "none", [], ""
            )
            if huge_pages:
                nbytes = torch.ops.mkldnn._nbytes
                _move("oneDNN", peers, left_out, [(torch.ops.mkldnn.data_ptr(w), nbytes(w)) for w in made])
    if only_onednn:
        return peers, left_out
    peers["F.linear"] = lambda r: F.linear(x, weights[r % len(weights)])
    if huge_pages:
        _move("F.linear", peers, left_out, [(w.data_ptr(), w.nbytes) for w in weights])
    elif importlib.util.find_spec("openvino") is not None:
        peers["OpenVINO"] = _openvino(x, weights)
    return peers, left_out


def _move(name: str, peers: dict[str, Any], left_out: dict[str, str], weights: list[tuple[int, int]]) -> None:
    """Weights (address, bytes) onto huge pages; a peer of which one does not move is left out."""
    if not all(machine.onto_huge_pages(*weight) for weight in weights):
        del peers[name]
        left_out[name] = "the system had no huge pages for its weights"


def _openvino(x: Tensor, weights: list[Tensor]) -> Callable[[int], Any]:
    """One compiled MatMul a weight, inference precision that of x."""
    import openvino as ov
    from openvino import opset13 as op

    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[x.dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    core, requests = ov.Core(), []
    for weight in weights:
        data = op.parameter(list(x.shape), ov.Type.f32)
        product = op.matmul(data, op.constant(weight.float().numpy()), False, True)
        model = ov.Model([product], [data])
        requests.append(core.compile_model(model, "CPU", settings).create_infer_request())
    given = x.float().numpy()
    return lambda r: requests[r % len(requests)].infer([given], share_inputs=True, share_outputs=True)


def _roofline_share(row: dict[str, Any], ceilings: dict[str, Any]) -> float:
    m, n, k = row["M"], row["N"], row["K"]
    peak = ceilings["gflops"].get(row["dtype"], ceilings["gflops"]["float32"])
    least = max(row["gbps"] * row["ours_us"] / ceilings["gbps"], m * n * k / peak / 1e3)  # microseconds
    return least / row["ours_us"]


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.stdin.read() or "{}"))))
