# SPDX-License-Identifier: Apache-2.0
"""Conversions and float arithmetic of the interpreter, exhaustive or against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from handwritten import apply

MODES = ("rn", "rz", "rm", "rp")
RNG = np.random.default_rng(5)
ALL16 = np.arange(65536, dtype=np.uint16)


def as_float(kind: str, bits: np.ndarray) -> np.ndarray:
    """Values of 16-bit patterns, by torch."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    return torch.from_numpy(bits.astype(np.int16)).view(dtype).float().numpy()


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bit for bit; any NaN equals any NaN."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    nan = np.isnan(a) & np.isnan(b)
    np.testing.assert_array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])


def rounded(x: Fraction, mantissa: int, lowest: int, mode: str) -> Fraction:
    """x to `mantissa` bits behind the leading one, exponents from `lowest`; no overflow."""
    if x == 0:
        return x
    e = max(len(bin(abs(x.numerator))) - len(bin(x.denominator)), lowest - 1) + 1
    while e > lowest and abs(x) < Fraction(2) ** e:
        e -= 1
    unit = Fraction(2) ** (e - mantissa)
    down = x // unit
    if mode == "rn":
        return round(x / unit) * unit  # Python rounds halves to even
    exact = down * unit == x
    up = mode == "rp" or (mode == "rz" and x < 0)
    return (down + (up and not exact)) * unit


FORMATS = {"f32": (23, -126), "f16": (10, -14), "bf16": (7, -126)}


def floats(count: int, low: int = -20, high: int = 20) -> np.ndarray:
    mantissa = RNG.integers(-(2**24), 2**24, count)
    return np.ldexp(mantissa.astype(np.float64), RNG.integers(low, high, count) - 24).astype(np.float32)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_16_bit_float_widens_exactly(kind):
    same(apply(f"cvt.f32.{kind}", "f32", [(kind, ALL16)]), as_float(kind, ALL16))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_narrowing_at_every_value_midpoint_and_neighbour(kind, mode):
    """All finite values, the midpoints between them and both float neighbours of those, in each rounding mode."""
    finite = as_float(kind, ALL16)
    finite = np.unique(finite[np.isfinite(finite)]).astype(np.float64)
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    x = np.concatenate(
        [
            finite.astype(np.float32),
            middle,
            np.nextafter(middle, np.float32(np.inf)),
            np.nextafter(middle, np.float32(-np.inf)),
        ]
    )
    if kind == "bf16":
        x = x[RNG.choice(len(x), 60000, replace=False)]
    got = as_float(kind, apply(f"cvt.{mode}.{kind}.f32", kind, [("f32", x)])).astype(np.float64)
    if mode == "rn":
        expected = torch.from_numpy(x).to(torch.float16 if kind == "f16" else torch.bfloat16).float().numpy()
        same(got, expected)
        return
    wide = x.astype(np.float64)
    at = np.searchsorted(finite, wide)  # finite[at - 1] < x <= finite[at]
    above = finite[np.clip(at, 0, len(finite) - 1)]
    below = np.where(above == wide, wide, finite[np.clip(at - 1, 0, len(finite) - 1)])
    up = (mode == "rp") | ((mode == "rz") & (wide < 0))
    np.testing.assert_array_equal(got, np.where(up, above, below))


def test_narrowing_of_special_values():
    x = np.array(
        [np.nan, -np.nan, np.inf, -np.inf, 65519.996, 65520, 1e38, 3.4e38, -0.0, 1e-45, -1e-45], np.float32
    )
    f16 = apply("cvt.rn.f16.f32", "f16", [("f32", x)])
    bf16 = apply("cvt.rn.bf16.f32", "bf16", [("f32", x)])
    assert [hex(v) for v in f16] == [
        "0x7fff", "0x7fff", "0x7c00", "0xfc00", "0x7bff", "0x7c00", "0x7c00", "0x7c00", "0x8000", "0x0", "0x8000",
    ]  # fmt: skip
    assert [hex(v) for v in bf16[:4]] == ["0x7fff", "0x7fff", "0x7f80", "0xff80"]
    assert bf16[7] == 0x7F80
    assert bf16[8] == 0x8000
    same(
        as_float("bf16", apply("cvt.rz.satfinite.bf16.f32", "bf16", [("f32", x[2:4])])),
        [3.3895314e38, -3.3895314e38],
    )


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packing_puts_the_first_operand_high(kind):
    x, y = floats(1000), floats(1000)
    pair = apply(f"cvt.rn.{kind}x2.f32", "b32", [("f32", x), ("f32", y)])
    high, low = (apply(f"cvt.rn.{kind}.f32", kind, [("f32", v)]) for v in (x, y))
    np.testing.assert_array_equal(pair, high.astype(np.uint32) << 16 | low)
    relu = apply(f"cvt.rn.relu.{kind}x2.f32", "b32", [("f32", x), ("f32", y)])
    np.testing.assert_array_equal(relu & 0xFFFF, np.where(y > 0, low, 0))


def test_tf32_rounds_half_away():
    x = floats(2000)
    u = x.view(np.uint32)
    np.testing.assert_array_equal(apply("cvt.rna.tf32.f32", "b32", [("f32", x)]), (u + 0x1000) & 0xFFFFE000)


@pytest.mark.parametrize(
    ("kind", "dtype", "top"), [("e4m3", torch.float8_e4m3fn, 448), ("e5m2", torch.float8_e5m2, 57344)]
)
def test_8_bit_floats(kind, dtype, top):
    every = torch.arange(256, dtype=torch.uint8)
    wide = apply(f"cvt.rn.f16x2.{kind}x2", "b32", [("b16", every.numpy().astype(np.uint16) * 0x101)])
    expected = every.view(dtype).float().numpy()
    same(as_float("f16", (wide & 0xFFFF).astype(np.uint16)), expected)
    finite = np.unique(expected[np.isfinite(expected)])
    x = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, floats(2000, -8, 9)]).astype(np.float32)
    x = x[np.abs(x) <= top]
    got = apply(f"cvt.rn.satfinite.{kind}x2.f32", "b16", [("f32", x), ("f32", -x)])
    torch.testing.assert_close(
        torch.from_numpy((got >> 8).astype(np.uint8)).view(dtype).float(),
        torch.from_numpy(x).to(dtype).float(),
    )
    torch.testing.assert_close(
        torch.from_numpy((got & 255).astype(np.uint8)).view(dtype).float(),
        torch.from_numpy(-x).to(dtype).float(),
    )
    over = apply(
        f"cvt.rn.satfinite.{kind}x2.f32", "b16", [("f32", np.array([1e9])), ("f32", np.array([-np.inf]))]
    )
    assert [
        float(v) for v in torch.tensor([over[0] >> 8, over[0] & 255], dtype=torch.uint8).view(dtype).float()
    ] == [top, -top]


@pytest.mark.parametrize("to", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer_saturates(to, mode):
    edges = [
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        127.5,
        255.5,
        32767.5,
        65535.5,
        2.0**31,
        2.0**32,
        2.0**63,
        2.0**64,
        1e30,
        np.inf,
        0.0,
    ]
    x = np.array([*edges, *[-e for e in edges], *floats(300)], np.float32)
    bits, signed = int(to[1:]), to[0] == "s"
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(np.float64))
    expected = [high if v == np.inf else low if v == -np.inf else min(max(int(v), low), high) for v in whole]
    got = apply(f"cvt.{mode}.{to}.f32", to, [("f32", x)])
    assert [int(v) for v in got] == expected
    nan = int(apply(f"cvt.{mode}.{to}.f32", to, [("f32", np.array([np.nan]))])[0])
    assert nan % 2**bits == (2**63 if bits == 64 else 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["s64", "u64", "s32", "u32", "s16", "u8"])
@pytest.mark.parametrize("to", ["f32", "f16"])
def test_integer_to_float(source, mode, to):
    bits = int(source[1:])
    info = np.iinfo(f"{'int' if source[0] == 's' else 'uint'}{bits}")
    x = [
        info.min,
        info.max,
        0,
        1,
        *[
            int(v) >> s
            for v in RNG.integers(info.min, info.max, 80, dtype=info.dtype)
            for s in (0, bits // 2)
        ],
    ]
    if to == "f16":
        x = [v % 60000 for v in x]
    x = np.array([v for v in x if info.min <= v <= info.max], info.dtype)
    expected = [float(rounded(Fraction(int(v)), *FORMATS[to], mode)) for v in x]
    got = apply(f"cvt.{mode}.{to}.{source}", to, [(source, x)])
    np.testing.assert_array_equal(got if to == "f32" else as_float("f16", got), expected)


def test_integer_to_integer():
    x = RNG.integers(-(2**63), 2**63 - 1, 500)
    x[:6] = [0, -1, 127, 128, -129, 2**31]
    np.testing.assert_array_equal(apply("cvt.s8.s64", "s8", [("s64", x)]), x.astype(np.int8))
    np.testing.assert_array_equal(apply("cvt.u16.s64", "u16", [("s64", x)]), x.astype(np.uint16))
    np.testing.assert_array_equal(apply("cvt.sat.s8.s64", "s8", [("s64", x)]), np.clip(x, -128, 127))
    np.testing.assert_array_equal(apply("cvt.sat.u8.s64", "u8", [("s64", x)]), np.clip(x, 0, 255))
    small = x.astype(np.int8)
    np.testing.assert_array_equal(apply("cvt.s32.s8", "s32", [("s8", small)]), small.astype(np.int32))
    np.testing.assert_array_equal(
        apply("cvt.u32.u8", "u32", [("u8", small.view(np.uint8))]), small.view(np.uint8)
    )


ARITHMETIC = {
    "add": lambda a, b, c: a + b,
    "sub": lambda a, b, c: a - b,
    "mul": lambda a, b, c: a * b,
    "fma": lambda a, b, c: a * b + c,
    "div": lambda a, b, c: a / b,
    "rcp": lambda a, b, c: 1 / a,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ARITHMETIC)
def test_f32_arithmetic_in_each_rounding_mode(op, mode):
    x = [floats(300) for _ in range(3)]
    x[2][:100] = np.float32(-1) * (x[0][:100].astype(np.float64) * x[1][:100]).astype(
        np.float32
    )  # cancellation
    for v in x:
        v[v == 0] = 1
    inputs = [("f32", v) for v in x[: {"fma": 3, "rcp": 1}.get(op, 2)]]
    got = apply(f"{op}.{mode}.f32", "f32", inputs)
    exact = [ARITHMETIC[op](*[Fraction(float(v)) for v in row]) for row in zip(*x)]
    expected = [float(rounded(v, *FORMATS["f32"], mode)) for v in exact]
    np.testing.assert_array_equal(got.astype(np.float64), expected)


@pytest.mark.parametrize("mode", MODES)
def test_square_root_in_each_rounding_mode(mode):
    x = np.abs(floats(500))
    got = apply(f"sqrt.{mode}.f32", "f32", [("f32", x)])
    for v, r in zip(x, got):
        exact, root = Fraction(float(v)), Fraction(float(r))
        up, down = (Fraction(float(np.nextafter(r, np.float32(s)))) for s in (np.inf, -1))
        assert {
            "rn": ((root + down) / 2) ** 2 <= exact <= ((root + up) / 2) ** 2,
            "rz": root**2 <= exact < up**2,
            "rm": root**2 <= exact < up**2,
            "rp": down**2 < exact <= root**2 or exact == root == 0,
        }[mode]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_packed_arithmetic_rounds_once(kind, op):
    bits = RNG.integers(0, 65536, (3, 4000)).astype(np.uint16)
    keep, exponent = (0x83FF, 0x3C00) if kind == "bf16" else (0x9FFF, 0x2000)
    bits = (bits & keep) | exponent
    values = as_float(kind, bits)
    count = 3 if op == "fma" else 2
    pairs = [("b32", b[:2000].astype(np.uint32) << 16 | b[2000:]) for b in bits[:count]]
    got = apply(f"{op}.rn.{kind}x2", "b32", pairs)
    got = np.concatenate(
        [as_float(kind, (got >> 16).astype(np.uint16)), as_float(kind, (got & 0xFFFF).astype(np.uint16))]
    )
    for i, result in enumerate(got):
        exact = ARITHMETIC[op](*[Fraction(float(v)) for v in values[:, i]])
        expected = rounded(exact, *FORMATS[kind], "rn")
        if kind == "f16" and abs(expected) > 65504:
            assert np.isinf(result)
        else:
            assert Fraction(float(result)) == expected


def test_a_term_far_below_the_last_place_still_decides():
    """Lost in a double, but not in round-to-odd: ties of bf16 and directed rounding of f32."""
    tiny = np.array([1, -1], np.float32) * np.float32(2.0**-100)
    tie = [np.full(2, v, np.float32) for v in (1 + 2.0**-7, 1.5)]
    as_bits = [(v.view(np.uint32) >> 16).astype(np.uint16) for v in (*tie, tiny)]
    got = as_float("bf16", apply("fma.rn.bf16", "bf16", [("bf16", v) for v in as_bits]))
    np.testing.assert_array_equal(got, [1.5 + 2 * 2.0**-7, 1.5 + 2.0**-7])
    one = np.ones(2, np.float32)
    above, below = np.nextafter(one, np.float32(2)), np.nextafter(one, np.float32(0))
    wanted = {"rn": one, "rz": [1, below[1]], "rm": [1, below[1]], "rp": [above[0], 1]}
    for mode, expected in wanted.items():
        np.testing.assert_array_equal(
            apply(f"add.{mode}.f32", "f32", [("f32", one), ("f32", tiny)]), expected
        )
        inputs = [("f32", one), ("f32", one), ("f32", tiny)]
        np.testing.assert_array_equal(apply(f"fma.{mode}.f32", "f32", inputs), expected)


def test_saturation_flushing_and_nan():
    x = np.array([-1, 0.25, 2, np.nan, 1e-40, -1e-40], np.float32)
    zero = np.zeros_like(x)
    same(apply("add.sat.f32", "f32", [("f32", x), ("f32", zero)]), [0, 0.25, 1, 0, 1e-40, 0])
    same(apply("add.ftz.f32", "f32", [("f32", x), ("f32", zero)]), [-1, 0.25, 2, np.nan, 0, 0])
    same(apply("mul.f32", "f32", [("f32", x), ("f32", zero + 1)]), x)
    same(apply("max.f32", "f32", [("f32", x), ("f32", zero - 0.0)]), [0, 0.25, 2, 0, 1e-40, 0])
    same(apply("min.NaN.f32", "f32", [("f32", x), ("f32", zero)]), [-1, 0, 0, np.nan, 0, -1e-40])
    same(
        apply("max.f32", "f32", [("f32", np.array([-0.0, 0.0])), ("f32", np.array([0.0, -0.0]))]), [0.0, 0.0]
    )
    same(apply("cvt.rni.f32.f32", "f32", [("f32", np.array([2.5, -2.5, 0.5]))]), [2, -2, 0])
    same(apply("copysign.f32", "f32", [("f32", x[:3]), ("f32", zero[:3] + 3)]), [-3, 3, 3])


APPROXIMATE = {
    "ex2.approx.f32": (np.exp2, 2.0**-22, floats(400, -4, 4)),
    "lg2.approx.f32": (np.log2, 2.0**-22, np.abs(floats(400)) + np.float32(1e-6)),
    "rcp.approx.ftz.f32": (lambda v: 1 / v, 2.0**-23, np.abs(floats(400)) + np.float32(1e-3)),
    "rsqrt.approx.f32": (lambda v: 1 / np.sqrt(v), 2.0**-22.9, np.abs(floats(400)) + np.float32(1e-3)),
    "sqrt.approx.f32": (np.sqrt, 2.0**-23, np.abs(floats(400))),
    "tanh.approx.f32": (np.tanh, 2.0**-11, floats(400, -4, 4)),
    "sin.approx.f32": (np.sin, 2.0**-20.5, floats(400, -2, 2)),
}


@pytest.mark.parametrize("op", APPROXIMATE)
def test_approximations_err_within_their_bound_and_not_less(op):
    function, bound, x = APPROXIMATE[op]
    exact = function(x.astype(np.float64))
    results = [apply(op, "f32", [("f32", x)], seed=seed).astype(np.float64) for seed in (0, 1, 2)]
    scale = np.maximum(np.abs(exact), 1) if op.startswith(("sin", "lg2")) else np.abs(exact)
    error = np.max([np.abs(r - exact) / np.maximum(scale, 1e-30) for r in results])
    assert bound / 4 < error <= bound
    assert any((results[0] != r).any() for r in results[1:])
    calm = apply(op, "f32", [("f32", x)], approximate=0).astype(np.float64)
    assert np.max(np.abs(calm - exact) / np.maximum(scale, 1e-30)) <= 2.0**-24
