# SPDX-License-Identifier: Apache-2.0
"""Integer, bit, comparison and atomic operations of the interpreter against Python integers."""

from __future__ import annotations

import interpreter
import numpy as np
import pytest
from handwritten import NUMPY, apply, bits, kernel

RNG = np.random.default_rng(6)


def values(kind: str, count: int = 400) -> np.ndarray:
    """Random bit patterns with the edges in front."""
    n = bits(kind)
    edges = [0, 1, 2, 2**n - 1, 2 ** (n - 1), 2 ** (n - 1) - 1, 31, 32, 33, 63, 64]
    random = [
        int.from_bytes(RNG.bytes(8), "little") % 2**n >> int(RNG.integers(0, n))
        for _ in range(count - len(edges))
    ]
    return np.array([e % 2**n for e in edges] + random, f"uint{n}").view(NUMPY[kind])


def shuffled(kind: str) -> np.ndarray:
    return RNG.permutation(values(kind))


def wrap(x: int, kind: str) -> int:
    n = bits(kind)
    x %= 2**n
    return x - 2**n if kind[0] == "s" and x >= 2 ** (n - 1) else x


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b, n: a + b,
    "sub": lambda a, b, n: a - b,
    "mul.lo": lambda a, b, n: a * b,
    "mul.hi": lambda a, b, n: a * b >> n,
    "div": lambda a, b, n: truncated(a, b) if b else -1,
    "rem": lambda a, b, n: a - b * truncated(a, b) if b else -1,
    "min": lambda a, b, n: min(a, b),
    "max": lambda a, b, n: max(a, b),
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("op", BINARY)
def test_binary(op, kind):
    a, b = shuffled(kind), shuffled(kind)
    a[0], b[0] = np.iinfo(a.dtype).min, NUMPY[kind](np.array(-1).astype(NUMPY[kind]))
    expected = [wrap(BINARY[op](int(x), int(y), bits(kind)), kind) for x, y in zip(a, b)]
    assert apply(f"{op}.{kind}", kind, [(kind, a), (kind, b)]).tolist() == expected


@pytest.mark.parametrize(("kind", "wide"), [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")])
def test_wide_products(kind, wide):
    a, b, c = shuffled(kind), shuffled(kind), shuffled(wide)
    products = [int(x) * int(y) for x, y in zip(a, b)]
    assert apply(f"mul.wide.{kind}", wide, [(kind, a), (kind, b)]).tolist() == products
    sums = [wrap(p + int(z), wide) for p, z in zip(products, c)]
    assert apply(f"mad.wide.{kind}", wide, [(kind, a), (kind, b), (wide, c)]).tolist() == sums


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_multiply_add_and_differences(kind):
    a, b, c = shuffled(kind), shuffled(kind), shuffled(kind)
    inputs = [(kind, a), (kind, b), (kind, c)]
    rows = [[int(v) for v in row] for row in zip(a, b, c)]
    n = bits(kind)
    assert apply(f"mad.lo.{kind}", kind, inputs).tolist() == [wrap(x * y + z, kind) for x, y, z in rows]
    assert apply(f"mad.hi.{kind}", kind, inputs).tolist() == [
        wrap((x * y >> n) + z, kind) for x, y, z in rows
    ]
    assert apply(f"sad.{kind}", kind, inputs).tolist() == [wrap(z + abs(x - y), kind) for x, y, z in rows]
    if kind[0] == "s":
        assert apply(f"abs.{kind}", kind, inputs[:1]).tolist() == [wrap(abs(x), kind) for x, _, _ in rows]
        assert apply(f"neg.{kind}", kind, inputs[:1]).tolist() == [wrap(-x, kind) for x, _, _ in rows]
    if kind == "s32":
        clamped = [min(max(x + y, -(2**31)), 2**31 - 1) for x, y, _ in rows]
        assert apply("add.sat.s32", kind, inputs[:2]).tolist() == clamped


def field(x: int, pos: int, length: int, kind: str) -> int:
    n = bits(kind)
    x %= 2**n
    sign = x >> min(pos + length - 1, n - 1) & 1 if kind[0] == "s" and length else 0
    out = [x >> (pos + i) & 1 if i < length and pos + i < n else sign for i in range(n)]
    return wrap(sum(b << i for i, b in enumerate(out)), kind)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields_and_shifts(kind):
    a, b = shuffled(kind), shuffled(kind)
    at, length = (RNG.integers(0, 80, len(a)).astype(np.uint32) for _ in range(2))
    n = bits(kind)
    got = apply(f"bfe.{kind}", kind, [(kind, a), ("u32", at), ("u32", length)]).tolist()
    assert got == [field(int(x), int(p), int(m), kind) for x, p, m in zip(a, at, length)]
    right = apply(f"shr.{kind}", kind, [(kind, a), ("u32", at)]).tolist()
    assert right == [wrap(int(x) >> int(p), kind) for x, p in zip(a, at)]
    plain = f"b{n}"
    left = apply(f"shl.{plain}", plain, [(plain, a.view(NUMPY[plain])), ("u32", at)]).tolist()
    assert left == [(int(x) << int(p)) % 2**n for x, p in zip(a, at)]
    put = apply(
        f"bfi.{plain}",
        plain,
        [(plain, a.view(NUMPY[plain])), (plain, b.view(NUMPY[plain])), ("u32", at), ("u32", length)],
    )
    for x, y, p, m, got in zip(a, b, at, length, put):
        mask = ((1 << int(m)) - 1) << int(p) & (2**n - 1)
        assert int(got) == (int(y) % 2**n & ~mask) | ((int(x) << int(p)) & mask)


def test_permutes_and_lookups():
    a, b, c = shuffled("b32"), shuffled("b32"), shuffled("b32")
    inputs = [("b32", a), ("b32", b), ("b32", c)]

    def prmt(x: int, y: int, s: int) -> int:
        byte = lambda k: (y << 32 | x) >> 8 * (k & 7) & 255  # noqa: E731
        return sum(
            (byte(s >> 4 * i) if not s >> 4 * i & 8 else 255 * (byte(s >> 4 * i) >> 7)) << 8 * i
            for i in range(4)
        )

    rows = [[int(v) for v in row] for row in zip(a, b, c)]
    assert apply("prmt.b32", "b32", inputs).tolist() == [prmt(*row) for row in rows]
    orders = {"f4e": "3210432154326543", "b4e": "5670670170120123", "rc8": "0000111122223333"}
    orders |= {"ecl": "3210321132223333", "ecr": "0000111022103210", "rc16": "1010323210103232"}
    for mode, order in orders.items():
        selectors = [int(order[4 * (z & 3) : 4 * (z & 3) + 4], 16) for _, _, z in rows]
        expected = [prmt(x, y, s) for (x, y, _), s in zip(rows, selectors)]
        assert apply(f"prmt.b32.{mode}", "b32", inputs).tolist() == expected, mode
    for table in (0x80, 0xE8, 0x96, 0xCA, 0x01):
        expected = [
            sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1) & 1) << i for i in range(32))
            for x, y, z in rows
        ]
        assert apply("lop3.b32", "b32", inputs, f", {table}").tolist() == expected


def test_counting_and_funnels():
    a, b = shuffled("b32"), shuffled("b32")
    n = RNG.integers(0, 70, len(a)).astype(np.uint32)
    rows = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, n)]
    one = [("b32", a)]
    assert apply("popc.b32", "u32", one).tolist() == [x.bit_count() for x, _, _ in rows]
    assert apply("clz.b32", "u32", one).tolist() == [32 - x.bit_length() for x, _, _ in rows]
    assert apply("brev.b32", "b32", one).tolist() == [int(f"{x:032b}"[::-1], 2) for x, _, _ in rows]
    assert apply("bfind.u32", "u32", [("u32", a)]).tolist() == [
        (x.bit_length() - 1) % 2**32 for x, _, _ in rows
    ]
    signed = [(x ^ (0xFFFFFFFF if x >> 31 else 0)).bit_length() - 1 for x, _, _ in rows]
    assert apply("bfind.s32", "u32", [("s32", a.view(np.int32))]).tolist() == [x % 2**32 for x in signed]
    inputs = [("b32", a), ("b32", b), ("u32", n)]
    both = [(y << 32 | x, z) for x, y, z in rows]
    assert apply("shf.l.wrap.b32", "b32", inputs).tolist() == [
        v << (z & 31) >> 32 & 0xFFFFFFFF for v, z in both
    ]
    assert apply("shf.r.clamp.b32", "b32", inputs).tolist() == [v >> min(z, 32) & 0xFFFFFFFF for v, z in both]
    byte = lambda x, i: wrap(x >> 8 * i, "s8")  # noqa: E731
    dots = [wrap(sum(byte(x, i) * byte(y, i) for i in range(4)) + z, "s32") for x, y, z in rows]
    assert (
        apply(
            "dp4a.s32.s32",
            "s32",
            [("s32", a.view(np.int32)), ("s32", b.view(np.int32)), ("s32", n.view(np.int32))],
        ).tolist()
        == dots
    )


def test_carry_chain_adds_and_subtracts_64_bits():
    a, b = shuffled("u64"), shuffled("u64")
    body = "ld.global.v2.u32 {%r2, %r3}, [%rd1]; ld.global.v2.u32 {%r4, %r5}, [%rd2];\n"
    body = (
        "mul.wide.u32 %rd9, %r0, 8; add.s64 %rd0, %rd0, %rd9; add.s64 %rd1, %rd1, %rd9; add.s64 %rd2, %rd2, %rd9;\n"
        + body
    )
    for op, wanted in (("add", a + b), ("sub", a - b)):
        text = (
            body
            + f"{op}.cc.u32 %r6, %r2, %r4; {op}c.u32 %r7, %r3, %r5; st.global.v2.u32 [%rd0], {{%r6, %r7}};"
        )
        out = np.zeros(128, np.uint64)
        args = [out, interpreter.const(a[:128].copy()), interpreter.const(b[:128].copy())]
        interpreter.load(kernel(text, ["u64"] * 3)).launch("test", 1, 128, args)
        np.testing.assert_array_equal(out, wanted[:128])


COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a < b or a > b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


def test_comparisons_and_selection():
    special = np.array([0.0, -0.0, 1.0, -1.0, np.nan, np.inf, 1e-40], np.float32)
    a, b = (g.ravel() for g in np.meshgrid(special, special))
    nan = np.isnan(a) | np.isnan(b)
    for name, function in COMPARE.items():
        ordered = np.array([function(x, y) for x, y in zip(a, b)])
        for suffix, wanted in (("", ordered & ~nan), ("u", ordered | nan)):
            got = apply(f"set.{name}{suffix}.u32.f32", "u32", [("f32", a), ("f32", b)])
            np.testing.assert_array_equal(got, np.where(wanted, 0xFFFFFFFF, 0), name + suffix)
    np.testing.assert_array_equal(apply("set.nan.u32.f32", "u32", [("f32", a), ("f32", b)]) != 0, nan)
    for kind in ("s32", "u32", "s64", "u16"):
        x, y = shuffled(kind), shuffled(kind)
        np.testing.assert_array_equal(apply(f"set.lt.u32.{kind}", "u32", [(kind, x), (kind, y)]) != 0, x < y)
    low = shuffled("u32")
    np.testing.assert_array_equal(
        apply("set.hs.u32.u32", "u32", [("u32", low), ("u32", low[::-1])]) != 0, low >= low[::-1]
    )
    np.testing.assert_array_equal(
        apply("slct.b32.s32", "b32", [("b32", low), ("b32", low[::-1]), ("s32", low.view(np.int32))]),
        np.where(low.view(np.int32) >= 0, low, low[::-1]),
    )


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics_add_up(space, seed):
    operations = {"add.u32": 64 * 63 // 2, "max.s32": 63, "or.b32": 63, "xor.b32": 0, "inc.u32": 64}
    lines = []
    base = "%rd0" if space == "global" else "word"
    shared = ".shared .align 4 .b8 word[32];"
    if space == "shared":
        lines.append(
            "setp.lt.u32 %p1, %r0, 8; shl.b32 %r9, %r0, 2; mov.u32 %r8, word; add.u32 %r8, %r8, %r9; mov.u32 %r7, 0;"
        )
        lines.append("@%p1 st.shared.u32 [%r8], %r7; bar.sync 0;")
    for i, op in enumerate(operations):
        operand = "255" if op.startswith("inc") else "%r0"
        lines.append(f"atom.{space}.{op} %r{20 + i}, [{base}+{4 * i}], {operand};")
    lines.append("mov.b32 %r30, 0f3F800000;")
    lines.append(
        f"red.{space}.add.f32 [{base}+20], %r30; atom.{space}.cas.b32 %r31, [{base}+24], 0, 7; bar.sync 0;"
    )
    if space == "shared":
        lines.append(
            "@%p1 ld.shared.u32 %r7, [%r8]; cvt.u64.u32 %rd5, %r9; add.s64 %rd5, %rd0, %rd5;"
            "@%p1 st.global.u32 [%rd5], %r7;"
        )
    out = np.zeros(8, np.uint32)
    interpreter.load(kernel("\n".join(lines), ["u64"], shared)).launch("test", 1, 64, [out], seed=seed)
    assert out[:5].tolist() == list(operations.values())
    assert out[5:6].view(np.float32)[0] == 64
    assert out[6] == 7
