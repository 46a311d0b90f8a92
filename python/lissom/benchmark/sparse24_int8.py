# SPDX-License-Identifier: Apache-2.0
"""The 2:4 linear in int8 against dense int8 of torch and oneDNN, dense bf16, and our own bf16.

`python -m lissom.benchmark.sparse24_int8` prints the table that docs/kernels/sparse24.md quotes.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lissom import ops
from lissom.benchmark import machine, sparse24
from lissom.reference.sparse24 import packed_bytes

TOKENS = (1, 4, 16, 64, 256)
SHAPES = ((4096, 4096),)  # (K, N)
Call = Callable[[int], Any]


def run(
    *,
    threads: int = 1,
    tokens: Iterable[int] = TOKENS,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    rounds: int | None = None,
) -> list[dict[str, Any]]:
    """Times every contender, all interleaved in one run, median; float32 in and out where x is quantised inside.

    Args:
        threads: of torch. tokens: rows of x. shapes: (K, N) pairs. rounds: 9 to 25 when left out.

    Returns:
        One dict a combination: M, N, K, threads, path, us {contender: microseconds}, left_out {contender: reason},
        and ratios over ours: `ratio` (fastest dense int8 with x quantised inside), `ratio_huge_pages` (the same with
        oneDNN's weights on huge pages too, as ours are; None where the system has none) and `ratio_bare` (oneDNN's
        product of ready int8).

    >>> row = run(tokens=[32], shapes=[(64, 64)], rounds=1)[0]
    >>> row["M"], row["ratio"] > 0
    (32, True)
    """
    rows = []
    with machine.torch_threads(threads), torch.inference_mode():
        for m in tokens:
            for k, n in shapes:
                calls, left_out = contenders(m, n, k)
                seconds = machine.median_seconds(calls, rounds or (9 if m > 64 else 25))
                micros = {name: 1e6 * s for name, s in seconds.items()}
                rows.append(
                    {"M": m, "N": n, "K": k, "threads": threads, "path": sparse24._path_name(torch.int8, m)}
                    | {"us": micros, "left_out": left_out, **_ratios(micros)}
                )
    return rows


def _ratios(micros: dict[str, float]) -> dict[str, float | None]:
    ours, bare = micros["ours, quantise"], micros.get("oneDNN int8")
    inside = [micros[name] for name in ("torch dynamic", "oneDNN int8, quantise") if name in micros]
    huge = micros.get("oneDNN int8, quantise, huge pages")
    return {
        "ratio": min(inside) / ours if inside else None,
        "ratio_huge_pages": min(huge, *inside) / ours if huge else None,
        "ratio_bare": bare / micros["ours"] if bare else None,
    }


def contenders(m: int, n: int, k: int) -> tuple[dict[str, Call], dict[str, str]]:
    """Functions of the round's index, which rotates copies of the weights where M <= 16; and who is missing, why."""
    torch.manual_seed(0)
    x, w = torch.randn(m, k), torch.randn(n, k)
    calls = _ours(x, w)
    left_out: dict[str, str] = {}
    for name, make in (("torch dynamic", _dynamic), ("oneDNN int8", _onednn)):
        try:
            calls |= make(x, w)
        except (RuntimeError, AttributeError) as reason:  # an engine that this build of torch lacks
            left_out[name] = str(reason).splitlines()[0]
    dense = sparse24.contenders(torch.bfloat16, m, n, k)
    calls |= {"ours, bf16": dense["ours"]} | {
        f"{name}, bf16": dense[name] for name in dense if name != "ours"
    }
    return calls, left_out


def _rotating(make: Callable[[], Any], bytes_each: int, m: int) -> list[Any]:
    """As in `sparse24`, but never very many: making a quantised layer takes long."""
    return sparse24._rotating(make, max(bytes_each, 4 << 20), m)


def _ours(x: Tensor, w: Tensor) -> dict[str, Call]:
    (m, k), n = x.shape, w.shape[0]
    pruned = ops.sparse24_decompress(*ops.sparse24_compress(w, pattern="magnitude"), k)
    integers, scale_w = ops.quantize_rows(pruned)
    canonical = ops.sparse24_compress(integers)
    copies = [
        # Each contender has its own weights: none may find them warm from the one before.
        _rotating(lambda: ops.sparse24_pack(*canonical), packed_bytes(n, k, torch.int8), m)
        for _ in range(2)
    ]
    ready = ops.quantize_rows(x)

    def product(r: int, given: tuple[Tensor, Tensor], packed: list[Tensor]) -> Tensor:
        return ops.sparse24_linear_int8(*given, packed[r % len(packed)], scale_w, n, k)

    return {
        "ours": lambda r: product(r, ready, copies[0]),
        "ours, quantise": lambda r: product(r, ops.quantize_rows(x), copies[1]),
    }


def _dynamic(x: Tensor, w: Tensor) -> dict[str, Call]:
    """torch's dynamically quantised Linear: x quantised by tensor, inside."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        layers = _rotating(lambda: _quantized(w), w.numel(), len(x))
    finally:
        torch.backends.quantized.engine = before
    return {"torch dynamic": lambda r: layers[r % len(layers)](x)}


def _quantized(w: Tensor) -> nn.Module:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation
        made = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
    return made[0]


def _onednn(x: Tensor, w: Tensor) -> dict[str, Call]:
    """oneDNN's int8 linear with prepacked weights, as torch.compile calls it: alone, and with x quantised by tensor."""
    integers, scale_w = ops.quantize_rows(w)
    zero_w = torch.zeros(len(w), dtype=torch.int64)
    made = [
        _rotating(lambda: torch.ops.onednn.qlinear_prepack(integers, None), w.numel(), len(x))
        for _ in range(3)
    ]
    where = [(torch.ops.mkldnn.data_ptr(w), torch.ops.mkldnn._nbytes(w)) for w in made[2]]
    huge = all(machine.onto_huge_pages(*weight) for weight in where)
    scale = float(x.abs().max()) / 127

    def quantized() -> Tensor:
        return torch.quantize_per_tensor(x, scale, 128, torch.quint8).int_repr()

    def product(r: int, given: Tensor, packed: list[Tensor]) -> Tensor:
        rest: tuple[Any, ...] = (scale_w, zero_w, None, 1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(given, scale, 128, packed[r % len(packed)], *rest)

    ready = quantized()
    calls: dict[str, Call] = {
        "oneDNN int8": lambda r: product(r, ready, made[0]),
        "oneDNN int8, quantise": lambda r: product(r, quantized(), made[1]),
    }
    if huge:
        calls["oneDNN int8, quantise, huge pages"] = lambda r: product(r, quantized(), made[2])
    return calls


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of microseconds, contenders across.

    >>> row = {"M": 1, "N": 2, "K": 4, "path": "tiles", "us": {"ours": 3.0}, "ratio": 1.0}
    >>> markdown([row | {"ratio_huge_pages": None, "ratio_bare": 2.0}]).splitlines()[2]
    '| 1 | 4 x 2 | tiles | 3 | 1.00 | - | 2.00 |'
    """
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    head = ["M", "K x N", "path", *names, "ratio", "ratio, huge pages", "ratio, bare"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [f"{row['us'][name]:.0f}" if name in row["us"] else "-" for name in names]
        ratios = [row[name] for name in ("ratio", "ratio_huge_pages", "ratio_bare")]
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {row['M']} | {row['K']} x {row['N']} | {row['path']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(run(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))))
