# SPDX-License-Identifier: Apache-2.0
"""`lissom selftest`: are the 2:4 kernels right on this machine, and on a GPU how fast; under a minute.

Inputs are multiples of 1/64, whose sums are exact in float32 in any order: a right kernel has no error at all, and the
comparison with float64 needs no tolerance. int8 has integers, and scales that are powers of two. Real-valued inputs
follow, with a bound. Everything goes through torch.ops.lissom, so the dispatcher, the allocator and the stream are
tested too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lissom
from lissom import ops
from lissom.benchmark import predict
from lissom.reference import sparse24 as twin

NIBBLES = twin.LEGAL_NIBBLES
# M, N, K: one, tile and tile plus one, tails of every kind.
SHAPES = (
    (1, 1, 4), (1, 40, 132), (2, 64, 1024), (3, 31, 36), (4, 129, 1028), (5, 64, 64), (8, 33, 100),
    (16, 200, 516), (17, 65, 1024), (64, 129, 260), (130, 136, 132), (257, 40, 68),
)  # fmt: skip
OUTPUT_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

Checks = Iterator[str]  # of a group: what is wrong in each check, "" if nothing


def missing(device: str) -> list[str]:
    """What keeps the kernels of `device` from running here; nothing when they can.

    >>> missing("cpu")
    []
    """
    if device == "cpu":
        return []
    found = lissom.cuda_info()
    lacks = []
    if not found["architectures"]:
        lacks.append(
            "this build of lissom has no CUDA kernels: install it again with LISSOM_CUDA=1 and nvcc 13 in PATH "
            "(docs/kernels/cuda.md)"
        )
    elif found["trouble"] or not found["devices"]:
        lacks.append(f"the CUDA runtime finds no device: {found['trouble'] or 'none is installed'}")
    if torch.version.cuda is None:
        lacks.append(f"torch {torch.__version__} is a build without CUDA: install a CUDA build of torch")
    elif not torch.cuda.is_available():
        lacks.append(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no CUDA device")
    elif torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        lacks.append(f"the device is sm_{major}{minor}, and sparse tensor cores begin with sm_80")
    return lacks


# --- problems


class Problem:
    """A 2:4 weight and inputs on a device, drawn with one seed on the CPU; `w` is W in float64."""

    def __init__(self, sizes: tuple[int, int, int], dtype: torch.dtype, device: str, *, exact: bool = True):
        m, n, k = sizes
        self.draw = torch.Generator().manual_seed(m + 31 * n + 977 * k)
        self.dtype, self.device, self.exact = dtype, device, exact
        self.n, self.k = n, k
        self.meta_quads = torch.tensor(NIBBLES, dtype=torch.uint8)[self._below(6, n, k // 4)]
        self.values = self.numbers(n, k // 2)
        self.x = self.numbers(m, k)
        self.w = dense(self.values, self.meta_quads)
        self.meta = bytes_of(self.meta_quads)

    def _below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.draw)

    def numbers(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Multiples of 1/64 in [-1, 1], or normal ones where the inputs are not exact; any int8."""
        if (dtype or self.dtype) == torch.int8:
            return (self._below(256, *shape) - 128).to(torch.int8)
        made = (self._below(129, *shape) - 64) / 64 if self.exact else torch.randn(shape, generator=self.draw)
        return made.to(dtype or self.dtype)

    def packed(self) -> Tensor:
        return ops.sparse24_pack(self.values.to(self.device), self.meta.to(self.device))


def dense(values: Tensor, quads: Tensor) -> Tensor:
    """W in float64, element by element from the definition: values [N, K/2], a nibble for each quad [N, K/4]."""
    n, count = quads.shape
    w = torch.zeros(n, count, 4, dtype=torch.float64)
    pairs = values.double().reshape(n, count, 2)
    w.scatter_(2, (quads.long() & 3).unsqueeze(2), pairs[:, :, :1])
    w.scatter_(2, (quads.long() >> 2).unsqueeze(2), pairs[:, :, 1:])
    return w.reshape(n, 4 * count)


def bytes_of(quads: Tensor) -> Tensor:
    """Metadata bytes of nibbles, the even quad low."""
    even = torch.nn.functional.pad(quads, (0, quads.shape[1] % 2))
    return (even[:, 0::2] | even[:, 1::2] << 4).contiguous()


def differs(what: str, found: Tensor, wanted: Tensor, bound: Tensor | None = None) -> str:
    """Nothing where equal (or within `bound` of float64), else the first wrong element and how many are wrong."""
    found = found.detach().cpu()
    if found.shape != wanted.shape or (bound is None and found.dtype != wanted.dtype):
        return f"{what}: is {found.dtype} {list(found.shape)}, wanted {wanted.dtype} {list(wanted.shape)}"
    off = (found.double() - wanted.double()).abs()
    wrong = found != wanted if bound is None else ~(off <= bound)
    if not wrong.any():
        return ""
    at = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, first {list(at)}: {found[at].item()!r}, "
        f"wanted {wanted[at].item()!r}, largest error {off.max().item():.3g}"
    )


# --- groups of checks


def fragments(device: str, dtype: torch.dtype) -> Checks:
    """Every element of y names the element of x that must have met its weight.

    Row n of W keeps a single 1, in each position of each nibble of each quad for each row of a fragment; x holds
    numbers that are all different. So y[m, n] says which x, if any, the hardware multiplied: wrong selectors, metadata
    in wrong order and exchanged rows all have their own picture.
    """
    width = 16 if dtype == torch.int8 else 8  # quads that one instruction meets
    cases = [(nibble, slot, shift) for nibble in NIBBLES for slot in (0, 1) for shift in range(width)]
    quads = torch.tensor(NIBBLES, dtype=torch.uint8)[torch.arange(len(cases) * 32 * width) * 7 % 6].reshape(
        -1, width
    )
    values = torch.zeros(len(cases) * 32, 2 * width, dtype=dtype)
    column = torch.zeros(len(cases) * 32, dtype=torch.long)
    for case, (nibble, slot, shift) in enumerate(cases):
        for row in range(32):
            # Another quad in each eight rows: those that share a lane must not look alike.
            n, quad = 32 * case + row, (row + row // 8 + shift) % width
            quads[n, quad] = nibble
            values[n, 2 * quad + slot] = 1
            column[n] = 4 * quad + (nibble >> 2 if slot else nibble & 3)
    packed = ops.sparse24_pack(values.to(device), bytes_of(quads).to(device))
    for m in (8, 4, 2, 1):  # 8: tensor cores on a GPU; up to 4: without them, but for int8
        x = torch.arange(m * 4 * width).reshape(m, 4 * width)
        x = (x % 256 - 128 if dtype == torch.int8 else x).to(dtype)
        y = linear(x.to(device), packed, len(column)).cpu()
        yield _name_position(cases, x, y, column)


def linear(x: Tensor, packed: Tensor, n: int) -> Tensor:
    """x W^T by the operator of x's dtype; int8 with scales of one."""
    if x.dtype != torch.int8:
        return ops.sparse24_linear(x, packed, n, x.shape[1])
    one = torch.ones((), device=x.device)
    return ops.sparse24_linear_int8(x, one.expand(len(x)), packed, one.expand(n), n, x.shape[1])


def _name_position(cases: list[tuple[int, int, int]], x: Tensor, y: Tensor, column: Tensor) -> str:
    wrong = y != x[:, column]
    if not wrong.any():
        return ""
    m, n = wrong.nonzero()[0].tolist()
    (nibble, slot, _), row, got = cases[n // 32], n % 32, y[m, n].item()
    named = (x == got).nonzero().tolist()
    read = f", which is x[{named[0][0]}, {named[0][1]}]" if named else ""
    by_fragment = [int(wrong[:, first::32].sum()) for first in range(32)]
    part = "index" if x.dtype == torch.int8 else "selector"  # int8: one selector, two instructions
    return (
        f"M = {len(x)}: {int(wrong.sum())} of {wrong.numel()} elements are wrong "
        f"({sum(by_fragment[:16])} with {part} 0, {sum(by_fragment[16:])} with {part} 1). First: y[{m}, {n}] must "
        f"be x[{m}, {int(column[n])}] and is {got}{read}. Row {row % 16} of the fragment of {part} {row // 16} "
        f"(lanes {4 * (row % 8)} to {4 * (row % 8) + 3}), nibble 0x{nibble:X}, kept value {slot}"
    )


def formats(device: str, dtype: torch.dtype) -> Checks:
    """compress, decompress, check, check_meta, pack, unpack: bit for bit, and they refuse what they must."""
    for n, k in ((1, 4), (7, 36), (33, 132), (64, 1024)):
        p = Problem((0, n, k), dtype, device)
        what = f"{n} x {k}"
        w = p.w.to(dtype)
        values, meta = ops.sparse24_compress(w.to(device))
        yield differs(f"decompress of compress, {what}", ops.sparse24_decompress(values, meta, k), w)
        wanted = twin.compress(w)
        yield differs(f"values, {what}", values, wanted[0]) or differs(f"meta, {what}", meta, wanted[1])
        full = p.numbers(n, k)
        largest = ops.sparse24_compress(full.to(device), pattern="magnitude")
        chosen = twin.compress(full, pattern="magnitude")
        yield differs(f"largest, {what}", largest[0], chosen[0]) or differs(
            f"meta of largest, {what}", largest[1], chosen[1]
        )
        yield (
            ""
            if ops.sparse24_check(w.to(device)) == (True, -1, -1)
            else f"check refuses a 2:4 weight, {what}"
        )
        w[n - 1, k - 4 :] = 1
        bad = ops.sparse24_check(w.to(device))
        yield "" if bad == (False, n - 1, k // 4 - 1) else f"check of a bad last quad says {bad}, {what}"
        if ops.sparse24_target(device, dtype) is None:
            continue
        found = ops.sparse24_unpack(p.packed(), n, k)
        yield differs(f"values of unpack, {what}", found[0], p.values) or differs(
            f"meta of unpack, {what}", found[1], p.meta
        )


def shapes_of_every_kernel(gpu: str, dtype: str = "bfloat16") -> list[tuple[int, int, int]]:
    """The smallest of some sizes, with tails, for each tile that a GPU uses, with k in one part and in several.

    >>> shapes_of_every_kernel("a100")[0]
    (1, 64, 260)
    """
    found: dict[tuple[Any, bool], tuple[int, int, int]] = {}
    sides = ((64, 260), (504, 1028), (1000, 1028), (2024, 2052), (4072, 4092))
    rows = (1, 2, 4, 5, 9, 17, 24, 33, 48, 65, 100, 129, 200, 257, 513, 1025, 2047)
    for m, n, k in sorted(((m, n, k) for m in rows for n, k in sides), key=math.prod):
        plan = predict.predict(gpu, dtype, m, n, k)
        found.setdefault((plan["tile"] and tuple(plan["tile"]), plan["splits"] > 1), (m, n, k))
    return list(found.values())


def products(device: str, dtype: torch.dtype) -> Checks:
    """sparse24_linear with exact inputs, every shape; bias, relu, residual and both types of y in turn."""
    more = shapes_of_every_kernel(f"cuda:{torch.cuda.current_device()}") if device == "cuda" else []
    for turn, sizes in enumerate([*SHAPES, *more]):
        p = Problem(sizes, dtype, device)
        out = (dtype, torch.float32)[turn % 2]
        bias = (None, p.numbers(p.n), p.numbers(p.n, dtype=torch.float32))[turn % 3]
        residual = p.numbers(sizes[0], p.n, dtype=out) if turn % 4 > 1 else None
        act = ("none", "none", "relu")[turn // 3 % 3]
        y = p.x.double() @ p.w.T + (0 if bias is None else bias.double())
        y = (y.relu() if act == "relu" else y) + (0 if residual is None else residual.double())
        given = [t if t is None else t.to(device) for t in (bias, residual)]
        found = ops.sparse24_linear(
            p.x.to(device), p.packed(), p.n, p.k, given[0], act, given[1], out_dtype=out
        )
        yield differs(f"y {sizes} of {dtype}, {act}", found, y.to(out))


def real_products(device: str, dtype: torch.dtype) -> Checks:
    """Normal inputs and every activation, within a bound on the rounding of K/2 sums in float32 and of the result.

    Tensor cores cut off where float32 rounds: one unit of 2^-23 of the sum of magnitudes for each of their steps.
    """
    for act in twin.ACTIVATIONS:
        for m in (3, 40):
            p = Problem((m, 70, 900), dtype, device, exact=False)
            exact = p.x.double() @ p.w.T
            slack = (8 + p.k / 16) * 2.0**-23 * (p.x.double().abs() @ p.w.abs().T)
            wanted = twin.activate(exact, act)
            # No activation is steeper than 1.13; the tanh of gelu_tanh costs some units in the last place.
            bound = 1.13 * slack + OUTPUT_ROUNDING[dtype] * wanted.abs() + 4e-6
            found = ops.sparse24_linear(p.x.to(device), p.packed(), p.n, p.k, None, act)
            yield differs(f"{act} of {dtype}, M = {m}", found, wanted, bound)


def gradients(device: str, dtype: torch.dtype) -> Checks:
    """Products of the training path with exact inputs, directly and through autograd."""
    for sizes in ((1, 8, 4), (5, 40, 36), (33, 72, 132), (130, 129, 260)):
        p = Problem(sizes, dtype, device)
        dy = p.numbers(sizes[0], p.n)
        dx = (dy.double() @ p.w).to(dtype)
        kept = twin.positions(p.meta, p.k)
        d_values = (dy.double().T @ p.x.double()).gather(1, kept).to(dtype)
        if ops.sparse24_target(device, dtype) is not None:
            found = ops.sparse24_grad_input(dy.to(device), p.packed(), p.n, p.k)
            yield differs(f"grad_input {sizes}", found, dx)
        found = ops.sparse24_mask_mm(dy.to(device), p.x.to(device), p.meta.to(device))
        yield differs(f"mask_mm {sizes}", found, d_values)
        x = p.x.to(device).requires_grad_()
        values = p.values.to(device).requires_grad_()
        y = ops.sparse24_linear_values(x, values, p.meta.to(device))
        yield differs(f"linear_values {sizes}", y, (p.x.double() @ p.w.T).to(dtype))
        y.backward(dy.to(device))
        assert x.grad is not None
        assert values.grad is not None
        yield differs(f"gradient of x {sizes}", x.grad, dx)
        yield differs(f"gradient of the values {sizes}", values.grad, d_values)


def edges(device: str, dtype: torch.dtype) -> Checks:
    """Nothing to do, strides, addresses off the grain, NaN where W is pruned."""
    for sizes in ((0, 20, 32), (3, 0, 32), (3, 20, 0)):
        p = Problem(sizes, dtype, device)
        y = ops.sparse24_linear(p.x.to(device), p.packed(), p.n, p.k)
        yield differs(f"y {sizes}", y, torch.zeros(sizes[0], sizes[1], dtype=dtype))
    for m in (3, 20):
        p = Problem((m, 40, 68), dtype, device)
        wanted, packed = (p.x.double() @ p.w.T).to(dtype), p.packed()
        room = torch.full((m, 2 * p.k + 1), float("nan"), dtype=dtype, device=device)
        for off in (0, 1):
            x = room[:, off : off + p.k]
            x.copy_(p.x)
            yield differs(
                f"x with a stride, from column {off}, M = {m}", ops.sparse24_linear(x, packed, 40, 68), wanted
            )
        x = p.x.to(device).T.contiguous().T
        yield differs(f"x by columns, M = {m}", ops.sparse24_linear(x, packed, 40, 68), wanted)
        x = p.x.clone()
        x[:, 0] = float("nan")  # pruned in the rows whose first nibble does not name position 0
        touched = (p.meta_quads[:, 0] & 3) == 0
        y = ops.sparse24_linear(x.to(device), packed, 40, 68).cpu()
        yield differs(f"x with NaN where W is pruned, M = {m}", y[:, ~touched], wanted[:, ~touched])
    try:
        ops.sparse24_linear(torch.zeros(2, 64, dtype=dtype, device=device), packed, 40, 68)
        yield "x of another width is taken"
    except ValueError:
        yield ""


def integers(device: str, dtype: torch.dtype) -> Checks:
    """int8: fragments, forms, then sparse24_linear_int8 on every shape, all values of int8, types of y in turn."""
    yield from fragments(device, dtype)
    yield from formats(device, dtype)
    gpu = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else ""
    more = shapes_of_every_kernel(gpu, "int8") if gpu else []
    for turn, sizes in enumerate([*SHAPES, (0, 20, 32), (3, 0, 32), (3, 20, 0), *more]):
        p = Problem(sizes, dtype, device)
        out = twin.DTYPES[turn % 3]
        scale_x, scale_w = (2.0 ** -p._below(5, size) for size in (sizes[0], p.n))
        bias = (None, p.numbers(p.n, dtype=torch.float32), p.numbers(p.n, dtype=out))[turn % 3]
        residual = p.numbers(sizes[0], p.n, dtype=out) if turn % 4 > 1 else None
        act = ("none", "none", "relu")[turn // 3 % 3]
        y = p.x.double() @ p.w.T * scale_x[:, None] * scale_w + (0 if bias is None else bias.double())
        y = (y.relu() if act == "relu" else y).float() + (0 if residual is None else residual.float())
        x, by_row, by_column = (t.to(device) for t in (p.x, scale_x, scale_w))
        terms = [t if t is None else t.to(device) for t in (bias, residual)]
        found = ops.sparse24_linear_int8(
            x, by_row, p.packed(), by_column, p.n, p.k, terms[0], act, terms[1], out_dtype=out
        )
        yield differs(f"y {sizes} as {out}, {act}", found, y.to(out))


# Fragments first: where they fail, everything behind them fails too, with less to say.
GROUPS: dict[str, Callable[[str, torch.dtype], Checks]] = {
    "fragments": fragments,
    "formats": formats,
    "products": products,
    "real products": real_products,
    "gradients": gradients,
    "edges": edges,
    "int8": integers,
}


# --- the run


def run(
    device: str = "cpu", *, timings: bool = True, on_progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run every group, and on a GPU take the times.

    Args:
        device: "cpu" (every instruction set of this machine) or "cuda".
        timings: on a GPU, also time the kernels against cuBLAS.
        on_progress: called with a line before each group.

    Returns:
        `device`, `name`, `passed`, `versions`, `groups` up to the first that failed, `timings`, `seconds`.

    Raises:
        RuntimeError: something is missing; it says what.
    """
    lacks = missing(device)
    if lacks:
        raise RuntimeError(f"no selftest on {device}: " + "; ".join(lacks))
    start, tiers = time.perf_counter(), _tiers(device)
    groups: list[dict[str, Any]] = []
    before = lissom.cpu_isa()
    try:
        for tier in tiers:
            if device == "cpu":
                lissom.set_cpu_isa(tier)
            for name, checks in GROUPS.items():
                if on_progress:
                    on_progress(f"{tier}: {name}")
                groups.append(_group(name, checks, device, tier))
                if groups[-1]["trouble"]:
                    break
            if groups[-1]["trouble"]:
                break
    finally:
        lissom.set_cpu_isa(before)
    passed = not groups[-1]["trouble"]
    table = None
    if device == "cuda" and timings and passed:
        from lissom.benchmark import cuda

        if on_progress:
            on_progress("timing against cuBLAS")
        table = cuda.run()
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else lissom.cpu_info()["model"],
        "passed": passed,
        "versions": _versions(device),
        "groups": groups,
        "timings": table,
        "seconds": time.perf_counter() - start,
    }


def _group(name: str, checks: Callable[[str, torch.dtype], Checks], device: str, tier: str) -> dict[str, Any]:
    start, count, trouble = time.perf_counter(), 0, ""
    for dtype in (torch.int8,) if checks is integers else twin.DTYPES:
        if ops.sparse24_target(device, dtype) is None and checks not in (formats, gradients):
            continue  # float32 on a GPU has the canonical form alone
        try:
            for found in checks(device, dtype):
                count += 1
                if found:
                    trouble = f"{str(dtype).removeprefix('torch.')}: {found}"
                    break
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is a finding
            trouble = (
                f"{str(dtype).removeprefix('torch.')}: {type(error).__name__}: {' '.join(str(error).split())}"
            )
        if trouble:
            break
    return {
        "name": name,
        "tier": tier,
        "checks": count,
        "seconds": time.perf_counter() - start,
        "trouble": trouble,
    }


def _tiers(device: str) -> list[str]:
    if device == "cuda":
        return ["sm_{}{}".format(*torch.cuda.get_device_capability())]
    every = ["portable", "avx2", "avx512", "avx512x", "amx"]
    return every[: every.index(lissom.cpu_info()["detected_isa"]) + 1]


def _versions(device: str) -> dict[str, str]:
    found = {"lissom": lissom.__version__, "torch": str(torch.__version__)}
    if device == "cuda":
        from lissom.benchmark import cuda

        found |= {
            "CUDA of torch": str(torch.version.cuda),
            "CUDA of lissom": str(lissom.build_info()["cuda"]),
        }
        found["driver"] = cuda.driver_version()
    return found


def markdown(result: dict[str, Any]) -> str:
    """The result as it should stand in an issue."""
    verdict = "passed" if result["passed"] else "FAILED"
    lines = [f"### lissom selftest {verdict}: {result['name']}", ""]
    lines += [", ".join(f"{name} {version}" for name, version in result["versions"].items()), ""]
    lines += ["| | group | checks | seconds | |", "| --- | --- | --- | --- | --- |"]
    for group in result["groups"]:
        state = "FAILED" if group["trouble"] else "passed"
        lines.append(
            f"| {group['tier']} | {group['name']} | {group['checks']} | {group['seconds']:.2f} | {state} |"
        )
    if not result["passed"]:
        lines += ["", result["groups"][-1]["trouble"]]
    if result["timings"]:
        from lissom.benchmark import cuda

        lines += ["", cuda.markdown(result["timings"])]
    return "\n".join(lines)
