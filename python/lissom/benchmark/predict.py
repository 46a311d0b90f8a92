# SPDX-License-Identifier: Apache-2.0
"""What the model of the CUDA kernels (csrc/sparse24/cuda/plan.h) says on paper; nothing here was measured."""

from __future__ import annotations

from typing import Any

NOTE = "predicted on paper, not measured"
GPUS = {"a100": "A100 80GB SXM", "h100": "H100 SXM", "b200": "B200", "rtx50": "RTX 5090"}
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "int8": 1}
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SHAPES = ((4096, 4096), (8192, 8192))  # N, K


def predict(gpu: str, dtype: str, m: int, n: int, k: int) -> dict[str, Any]:
    """One line of the table: y [M, N] = x W^T, W [N, K] in 2:4.

    Args:
        gpu: a name of `GPUS`, or "cuda:0" for the device there.
        dtype: of x and W, a name of `ELEMENT_BYTES`.
        m, n, k: rows of x, rows and columns of W.

    Returns:
        Plan, counts and times. `bound_us` is the tighter of two: the least bytes at full bandwidth, the multiplications
        at the full rate of the tensor cores; `bound_share` is its share of the predicted time. `dense_bf16_us` is the
        dense product in bfloat16 at its own bound, with no launch, which no library reaches: so `ratio` is rather too
        low.

    >>> row = predict("a100", "bfloat16", 16, 4096, 4096)
    >>> row["bound"], row["kernel"], row["note"]
    ('memory', 'gemm', 'predicted on paper, not measured')
    """
    from lissom import _C

    found = _C.sparse24_predict(gpu, m, n, k, ELEMENT_BYTES[dtype])
    micro = {name.replace("seconds", "us"): 1e6 * s for name, s in found.items() if name.endswith("seconds")}
    return {
        "note": NOTE,
        "gpu": gpu,
        "dtype": dtype,
        "M": m,
        "N": n,
        "K": k,
        "kernel": "gemv" if found["tile"] is None else "gemm",
        "tile": found["tile"] and list(found["tile"]),
        "splits": found["splits"],
        "blocks": found["blocks"],
        "waves": found["waves"],
        "bytes_moved": round(found["bytes_moved"]),
        "matrix_instructions": round(found["matrix_instructions"]),
        "wavefronts": round(found["wavefronts"]),
        "us": micro["us"],
        **{name: micro[name] for name in ("launch_us", "memory_us", "l2_us", "sm_us", "bound_us")},
        "bound": "memory" if found["bound_is_memory"] else "tensor cores",
        "bound_share": micro["bound_us"] / micro["us"],
        "dense_bf16_us": micro["dense_bf16_bound_us"],
        "ratio": micro["dense_bf16_bound_us"] / micro["us"],
    }


def run(
    *,
    gpu: str = "a100",
    dtypes: tuple[str, ...] | list[str] = ("bfloat16",),
    rows: tuple[int, ...] | list[int] = ROWS,
    shapes: tuple[tuple[int, int], ...] | list[tuple[int, int]] = SHAPES,
) -> dict[str, Any]:
    """The table of a GPU: `note`, `gpu`, `rows` as `predict` makes them."""
    lines = [predict(gpu, dtype, m, n, k) for dtype in dtypes for n, k in shapes for m in rows]
    return {"note": NOTE, "gpu": GPUS.get(gpu, gpu), "rows": lines}
