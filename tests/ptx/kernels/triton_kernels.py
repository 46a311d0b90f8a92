# SPDX-License-Identifier: Apache-2.0
"""Run as a script: compiles two Triton kernels for sm_80 into the folder argv[1] and prints their paths as JSON."""

import json
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCK = {"BM": 64, "BN": 64, "BK": 32}


@triton.jit
def matmul(a, b, c, M, N, K, sa, sb, sc, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    pa = a + rm[:, None] * sa + rk[None, :]
    pb = b + rk[:, None] * sb + rn[None, :]
    for k in range(0, K, BK):
        x = tl.load(pa, mask=(rm[:, None] < M) & (rk[None, :] + k < K), other=0.0)
        y = tl.load(pb, mask=(rk[:, None] + k < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc)
        pa += BK
        pb += BK * sb
    tl.store(c + rm[:, None] * sc + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def softmax(y, x, n, stride, B: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, B)
    v = tl.load(x + row * stride + i, mask=i < n, other=float("-inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * stride + i, e / tl.sum(e, 0), mask=i < n)


def compiled(function, signature, constants, folder: Path, name: str) -> dict[str, object]:
    # What is promised to be a multiple: 16 bytes of pointers, 8 elements of row strides. Not so for the sizes.
    multiples = {"sa": 8, "sb": 8, "sc": 8} | {n: 16 for n, kind in signature.items() if kind[0] == "*"}
    places = list(signature)
    aligned = {(places.index(n),): [["tt.divisibility", m]] for n, m in multiples.items() if n in places}
    source = ASTSource(function, signature, constants, aligned)
    kernel = triton.compile(
        source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4, "num_stages": 3}
    )
    path = folder / f"{name}.ptx"
    path.write_text(kernel.asm["ptx"], encoding="utf-8")
    return {"ptx": str(path), "shared": kernel.metadata.shared}


def main(folder: Path) -> None:
    result = {}
    for kind in ("fp16", "bf16"):
        pointers = {"a": f"*{kind}", "b": f"*{kind}", "c": "*fp32"}
        signature = {**pointers, **dict.fromkeys(("M", "N", "K", "sa", "sb", "sc"), "i32")}
        result[f"matmul_{kind}"] = compiled(matmul, signature, BLOCK, folder, f"matmul_{kind}")
    signature = {"y": "*fp32", "x": "*fp32", "n": "i32", "stride": "i32"}
    result["softmax"] = compiled(softmax, signature, {"B": 1024}, folder, "softmax")
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
