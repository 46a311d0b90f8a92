# SPDX-License-Identifier: Apache-2.0
"""Roofline arithmetic of a linear layer, dense and 2:4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Point:
    """One timed kernel: dense-equivalent arithmetic intensity (FLOP/byte) and speed (GFLOP/s)."""

    label: str
    kernel: str
    rows: int
    intensity: float
    gflops: float
    share: float


def dense_flops(m: int, n: int, k: int) -> int:
    """Floating-point operations of y[m, n] = x[m, k] W[n, k]^T, zeros included.

    Example:
        >>> dense_flops(1, 4, 8)
        64
    """
    return 2 * m * n * k


def linear_bytes(m: int, n: int, k: int, *, element: int, sparse: bool) -> int:
    """Bytes that one linear must move at least: weights once, x once, y once.

    Args:
        m: rows of x.
        n: rows of W.
        k: columns of x and W.
        element: bytes of a value.
        sparse: W is stored 2:4: half of the values and half a byte a quad.

    Returns:
        Bytes.

    Example:
        >>> linear_bytes(0, 16, 32, element=2, sparse=True) / linear_bytes(0, 16, 32, element=2, sparse=False)
        0.5625
    """
    weight = n * k // 2 * element + n * -(-k // 8) if sparse else n * k * element
    return weight + (m * k + m * n) * element


def byte_ratio(element: int) -> float:
    """Bytes of a dense weight over bytes of its 2:4 form.

    Example:
        >>> round(byte_ratio(2), 2), round(byte_ratio(4), 2)
        (1.78, 1.88)
    """
    return 4 * element / (2 * element + 0.5)


def attainable(intensity: float, *, gbps: float, gflops: float) -> float:
    """GFLOP/s that the roofline allows at an intensity (Williams et al. 2009, eq. 1).

    Example:
        >>> attainable(0.5, gbps=40, gflops=500), attainable(100, gbps=40, gflops=500)
        (20.0, 500)
    """
    return min(intensity * gbps, gflops)


def kernel_points(rows: list[dict[str, Any]], *, gbps: float, gflops: float) -> list[Point]:
    """Points of a roofline chart from benchmark rows.

    Speed counts the dense problem's operations for every kernel, so higher is faster for the same layer;
    the 2:4 kernel does half of them, and its compute ceiling is therefore twice as high.

    Args:
        rows: `lissom.benchmark.sparse24.run()` rows of one dtype and thread count.
        gbps: the machine's measured read bandwidth.
        gflops: its measured dense arithmetic speed.

    Returns:
        Two points a row: ours and the fastest peer. `share` is the part of the attainable speed reached.
    """
    points = []
    for row in rows:
        m, n, k = row["M"], row["N"], row["K"]
        element = ELEMENT_BYTES[row["dtype"]]
        peer = min(row["peers"], key=row["peers"].__getitem__) if row.get("peers") else None
        timed = [("2:4", row["ours_us"], True)]
        if peer is not None:
            timed.append((peer, row["peers"][peer], False))
        for kernel, micros, sparse in timed:
            intensity = dense_flops(m, n, k) / linear_bytes(m, n, k, element=element, sparse=sparse)
            speed = dense_flops(m, n, k) / micros / 1e3
            roof = attainable(intensity, gbps=gbps, gflops=gflops * (2 if sparse else 1))
            points.append(Point(f"M={m}, {n}×{k}", kernel, m, intensity, speed, speed / roof))
    return points
