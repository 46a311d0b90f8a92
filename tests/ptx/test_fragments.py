# SPDX-License-Identifier: Apache-2.0
"""Every shape of mma.sync and mma.sp against float64 or integer products, fragments built as the PTX ISA words them."""

from __future__ import annotations

import interpreter
import numpy as np
import pytest
import torch
from handwritten import kernel
from interpreter import const

RNG = np.random.default_rng(8)
LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4
LEGAL = np.array([0x4, 0x8, 0xC, 0x9, 0xD, 0xE])

# name: torch type of the elements, bits, C and D
TYPES = {
    "f16": (torch.float16, 16), "bf16": (torch.bfloat16, 16), "tf32": (torch.float32, 32), "s8": (torch.int8, 8),
    "u8": (torch.uint8, 8), "e4m3": (torch.float8_e4m3fn, 8), "e5m2": (torch.float8_e5m2, 8),
}  # fmt: skip


def elements(kind: str, *shape: int) -> torch.Tensor:
    if kind in ("s8", "u8"):
        low = -128 if kind == "s8" else 0
        return torch.from_numpy(RNG.integers(low, low + 256, shape)).to(TYPES[kind][0])
    if kind[0] == "e":
        return torch.from_numpy(RNG.integers(-3, 4, shape) / 2).to(TYPES[kind][0])
    return torch.from_numpy(RNG.integers(-64, 65, shape) / 64).to(TYPES[kind][0])


def raw(t: torch.Tensor) -> np.ndarray:
    """Bit patterns as uint64."""
    size = t.element_size()
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]).numpy().astype(
        np.int64
    ) % 2 ** (8 * size)


def fragment(matrix: torch.Tensor, row: list[np.ndarray], column: list[np.ndarray]) -> np.ndarray:
    """[registers, 32] words: element i of lane l is matrix[row[i][l], column[i][l]], lowest bits first."""
    bits, per = 8 * matrix.element_size(), 4 // matrix.element_size()
    data, words = raw(matrix), np.zeros((len(row) // per, 32), np.uint32)
    for i, (r, c) in enumerate(zip(row, column)):
        words[i // per] |= (data[r, c] << bits * (i % per)).astype(np.uint32)
    return words


def multiplicand_a(matrix: torch.Tensor) -> np.ndarray:
    """Element i: rows alternate by register between group and group + 8; columns move on with each pair of them."""
    per = 4 // matrix.element_size()
    count = 16 * matrix.shape[1] // 32
    rows = [GROUP + 8 * (i // per % 2) for i in range(count)]
    columns = [MEMBER * per + i % per + 4 * per * (i // (2 * per)) for i in range(count)]
    return fragment(matrix, rows, columns)


def multiplicand_b(matrix: torch.Tensor) -> np.ndarray:
    per = 4 // matrix.element_size()
    count = matrix.shape[0] * 8 // 32
    rows = [MEMBER * per + i % per + 4 * per * (i // per) for i in range(count)]
    return fragment(matrix, rows, [GROUP] * count)


def accumulator(matrix: torch.Tensor) -> np.ndarray:
    rows = [GROUP + 8 * (i // 2) for i in range(4)]
    return fragment(matrix, rows, [MEMBER * 2 + i % 2 for i in range(4)])


def execute(opcode: str, fragments: list[np.ndarray], d_registers: int, tail: str = "") -> np.ndarray:
    """Loads register i of a lane from word [i, lane], runs the instruction, returns the words of D."""
    lines, operands, at = (
        ["mul.wide.u32 %rd9, %r0, 4; add.s64 %rd1, %rd1, %rd9; add.s64 %rd0, %rd0, %rd9;"],
        [],
        10,
    )
    words = np.concatenate(fragments)
    offset = 0
    for part in fragments:
        names = [f"%r{at + i}" for i in range(len(part))]
        lines += [f"ld.global.b32 {name}, [%rd1+{128 * (offset + i)}];" for i, name in enumerate(names)]
        operands.append("{" + ", ".join(names) + "}" if not (tail and part is fragments[-1]) else names[0])
        at, offset = at + len(part), offset + len(part)
    d = [f"%r{50 + i}" for i in range(d_registers)]
    lines.append(f"{opcode} {{{', '.join(d)}}}, {', '.join(operands)}{tail};")
    lines += [f"st.global.b32 [%rd0+{128 * i}], {name};" for i, name in enumerate(d)]
    out = np.zeros((d_registers, 32), np.uint32)
    interpreter.load(kernel("\n".join(lines), ["u64", "u64"])).launch("test", 1, 32, [out, const(words)])
    return out


DENSE = [(k, kind, "f32") for kind in ("f16", "bf16") for k in (8, 16)] + [
    (8, "f16", "f16"),
    (16, "f16", "f16"),
]
DENSE += [(k, "tf32", "f32") for k in (4, 8)] + [(k, kind, "s32") for kind in ("s8", "u8") for k in (16, 32)]
DENSE += [(k, kind, "f32") for kind in ("e4m3", "e5m2") for k in (16, 32)]


def initial(acc: str) -> torch.Tensor:
    c = torch.from_numpy(RNG.integers(-50, 50, (16, 8)))
    return c.to({"f32": torch.float32, "f16": torch.float16, "s32": torch.int32}[acc])


def wide(t: torch.Tensor) -> torch.Tensor:
    return t.long() if not t.dtype.is_floating_point else t.float().double()


@pytest.mark.parametrize(("k", "kind", "acc"), DENSE)
def test_dense(k, kind, acc):
    a, b, c = elements(kind, 16, k), elements(kind, k, 8), initial(acc)
    expected = (wide(a) @ wide(b) + wide(c)).to(c.dtype)
    parts = [multiplicand_a(a), multiplicand_b(b), accumulator(c)]
    got = execute(f"mma.sync.aligned.m16n8k{k}.row.col.{acc}.{kind}.{kind}.{acc}", parts, len(parts[2]))
    np.testing.assert_array_equal(got, accumulator(expected))


def test_mixed_signs_and_saturation():
    a, b = torch.full((16, 32), 127, dtype=torch.int8), torch.full((32, 8), 255, dtype=torch.uint8)
    c = torch.full((16, 8), 2**31 - 100, dtype=torch.int32)
    parts = [multiplicand_a(a), multiplicand_b(b), accumulator(c)]
    wrapped = execute("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32", parts, 4)
    assert (wrapped == (127 * 255 * 32 + 2**31 - 100) % 2**32).all()
    assert (execute("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.u8.s32", parts, 4) == 2**31 - 1).all()


def sparse_case(kind: str, k: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Compressed A, dense A and the nibbles [16, k / 4]."""
    values, nibbles = elements(kind, 16, k // 2), RNG.choice(LEGAL, (16, k // 4))
    dense = torch.zeros(16, k, dtype=torch.int64 if kind in ("s8", "u8") else torch.float64)
    for row in range(16):
        for quad in range(k // 4):
            n = int(nibbles[row, quad])
            dense[row, 4 * quad + (n & 3)] = wide(values[row, 2 * quad])
            dense[row, 4 * quad + (n >> 2)] = wide(values[row, 2 * quad + 1])
    return values, dense, nibbles


def metadata(nibbles: np.ndarray, bits: int, selector: int) -> np.ndarray:
    """Words of the lanes that the selector names; garbage in the others, which must not matter."""
    words = RNG.integers(0, 2**32, (1, 32)).astype(np.uint32)
    quads, columns = nibbles.shape[1], 4 * nibbles.shape[1]
    join = lambda row, first, count: sum(int(nibbles[row, first + j]) << 4 * j for j in range(count))  # noqa: E731
    for g in range(8):
        if bits == 16 and columns == 32:  # two lanes, each with 16 columns of rows g and g + 8
            for s in range(2):
                words[0, 4 * g + 2 * selector + s] = join(g, 4 * s, 4) | join(g + 8, 4 * s, 4) << 16
        elif bits == 16:
            words[0, 4 * g + selector] = join(g, 0, quads) | join(g + 8, 0, quads) << 16
        elif columns == 64:  # four lanes: rows g, g + 8 of columns 0-31, then of columns 32-63
            for t in range(4):
                words[0, 4 * g + t] = join(g + 8 * (t % 2), 8 * (t // 2), 8)
        else:
            for s in range(2):
                words[0, 4 * g + 2 * selector + s] = join(g + 8 * s, 0, 8)
    return words


SPARSE = [(32, kind, "f32", s) for kind in ("f16", "bf16") for s in range(2)] + [
    (16, "f16", "f32", s) for s in range(4)
]
SPARSE += [
    (32, "f16", "f16", 1),
    (64, "s8", "s32", 0),
    (64, "u8", "s32", 0),
    (64, "e4m3", "f32", 0),
    (64, "e5m2", "f32", 0),
]
SPARSE += [(32, "s8", "s32", s) for s in range(2)]


@pytest.mark.parametrize("form", ["sp", "sp::ordered_metadata"])
@pytest.mark.parametrize(("k", "kind", "acc", "selector"), SPARSE)
def test_sparse(k, kind, acc, selector, form):
    values, dense, nibbles = sparse_case(kind, k)
    b, c = elements(kind, k, 8), initial(acc)
    expected = (dense @ wide(b) + wide(c)).to(c.dtype)
    parts = [
        multiplicand_a(values),
        multiplicand_b(b),
        accumulator(c),
        metadata(nibbles, TYPES[kind][1], selector),
    ]
    got = execute(
        f"mma.{form}.sync.aligned.m16n8k{k}.row.col.{acc}.{kind}.{kind}.{acc}",
        parts,
        len(parts[2]),
        f", {selector}",
    )
    np.testing.assert_array_equal(got, accumulator(expected))


@pytest.mark.parametrize(("nibble", "form", "fine"), [
    (0x1, "sp::ordered_metadata", False), (0x1, "sp", True), (0x5, "sp", False), (0x0, "sp::ordered_metadata", False),
    (0xF, "sp::ordered_metadata", False), (0xB, "sp::ordered_metadata", False), (0x4, "sp::ordered_metadata", True),
])  # fmt: skip
def test_illegal_nibbles(nibble, form, fine):
    values, _, nibbles = sparse_case("bf16", 32)
    nibbles[9, 5] = nibble
    parts = [
        multiplicand_a(values),
        multiplicand_b(elements("bf16", 32, 8)),
        accumulator(initial("f32")),
        metadata(nibbles, 16, 1),
    ]
    run = lambda: execute(f"mma.{form}.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32", parts, 4, ", 1")  # noqa: E731
    if fine:
        run()
    else:
        with pytest.raises(
            interpreter.Fault, match=f"illegal metadata nibble {nibble:x}: row 9, dense columns 20 to 23"
        ):
            run()


@pytest.mark.parametrize("opcode", [
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32", "mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16", "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32",
])  # fmt: skip
def test_shapes_that_do_not_exist_are_refused(opcode):
    with pytest.raises(interpreter.Fault, match=r"no matrix instruction|unknown form|one of|vector"):
        execute(opcode, [np.zeros((n, 32), np.uint32) for n in (4, 2, 4)], 4)
