# SPDX-License-Identifier: Apache-2.0
"""Small PTX texts for the tests: one instruction over arrays, or a body in a frame of declarations."""

from __future__ import annotations

from collections.abc import Sequence

import interpreter
import numpy as np

HEAD = ".version 8.5\n.target sm_90\n.address_size 64\n"
NUMPY = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16,
    "f16": np.uint16,
    "bf16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32, "u64": np.uint64,
    "s64": np.int64, "b64": np.uint64, "f64": np.float64,
}  # fmt: skip


def bits(kind: str) -> int:
    return int(kind.lstrip("bufs"))


def kernel(body: str, params: Sequence[str] = (), shared: str = "") -> str:
    """A kernel `test` with 64 registers of each width, %tid.x in %r0 and parameters p0, p1... in %rd0, %rd1..."""
    declared = ", ".join(f".param .{kind} p{i}" for i, kind in enumerate(params))
    loads = "".join(
        f"ld.param.{kind} {'%rd' if bits(kind) == 64 else '%r'}{i if bits(kind) == 64 else 40 + i}, [p{i}];\n"
        for i, kind in enumerate(params)
    )
    registers = ".reg .pred %p<64>; .reg .b16 %h<64>; .reg .b32 %r<64>; .reg .b64 %rd<64>;\n"
    frame = f"{HEAD}{shared}\n.visible .entry test({declared})\n{{\n{registers}{loads}"
    return frame + f"mov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"


def register(kind: str, i: int) -> str:
    """8-bit values live in 16-bit registers."""
    return {8: "%h", 16: "%h", 32: "%r", 64: "%rd"}[bits(kind)] + str(i)


def apply(
    opcode: str, result: str, inputs: Sequence[tuple[str, np.ndarray]], tail: str = "", **how: int
) -> np.ndarray:
    """opcode over arrays: result type and (type, array) inputs, element by element; `tail` are further operands."""
    count = len(inputs[0][1])
    body = [
        "mov.u32 %r1, %ctaid.x;",
        "mad.lo.s32 %r1, %r1, 256, %r0;",
        f"setp.ge.s32 %p0, %r1, {count};",
        "@%p0 ret;",
    ]
    for i, (kind, _) in enumerate(inputs):
        body.append(f"mad.wide.s32 %rd{20 + i}, %r1, {bits(kind) // 8}, %rd{i + 1};")
        body.append(f"ld.global.b{bits(kind)} {register(kind, 10 + i)}, [%rd{20 + i}];")
    operands = ", ".join(register(kind, 10 + i) for i, (kind, _) in enumerate(inputs))
    body.append(f"{opcode} {register(result, 9)}, {operands}{tail};")
    body.append(f"mad.wide.s32 %rd30, %r1, {bits(result) // 8}, %rd0;")
    body.append(f"st.global.b{bits(result)} [%rd30], {register(result, 9)};")
    module = interpreter.load(kernel("\n".join(body), ["u64"] * (len(inputs) + 1)))
    out = np.zeros(count, NUMPY[result])
    arrays = [interpreter.const(np.ascontiguousarray(a, NUMPY[kind])) for kind, a in inputs]
    module.launch("test", (count + 255) // 256, 256, [out, *arrays], global_shadow=0, **how)
    return out
