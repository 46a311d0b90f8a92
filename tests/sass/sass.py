# SPDX-License-Identifier: Apache-2.0
"""Compiles a .cu to one cubin per architecture and reads what came out: registers, shared bytes, opcodes, loops.

Needs nvcc, nvdisasm (third_party/cuda_toolchain.sh) and c++filt.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
TOOLS = ("nvcc", "nvdisasm", "c++filt")
# What CMakeLists.txt compiles with, warnings being errors.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--Werror=all-warnings")
PTXAS = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage,-Werror"

ENTRY = re.compile(r"Compiling entry function '(\S+)'")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
SECTION = re.compile(r"^\s*\.section\s+(\.text\.|\.nv\.info\.)?([^\s,\"]+)")
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
WORD = re.compile(r"\.word\s+0x([0-9a-f]+)")


class CompileError(Exception):
    """nvcc or ptxas refused the source; the message is theirs."""


@dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel on one architecture."""

    name: str  # as in C++, without arguments and without the leading namespace lissom
    symbol: str
    architecture: str
    registers: int  # of a thread
    static_shared: int  # bytes
    threads: int  # most in a block, by the launch bounds
    opcodes: Counter[str]
    loops: tuple[Counter[str], ...]  # opcodes of the innermost loops, in order

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())


@dataclass
class Code:
    """Instructions of one kernel, in order, as nvdisasm prints them."""

    opcodes: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    loops: list[tuple[int, int]] = field(default_factory=list)
    threads: int = 1024

    def add(self, opcode: str, operands: str) -> None:
        target = TARGET.search(operands)
        if opcode.startswith("BRA") and target and target[1] in self.labels:
            self.loops.append((self.labels[target[1]], len(self.opcodes)))
        self.opcodes.append(opcode)

    def innermost(self) -> tuple[Counter[str], ...]:
        """Loops that hold no other; the endless branch to itself behind a kernel's end is none."""
        real = sorted({(first, last) for first, last in self.loops if last > first})
        inner = [
            (first, last)
            for first, last in real
            if not any((a, b) != (first, last) and first <= a and b <= last for a, b in real)
        ]
        return tuple(Counter(self.opcodes[first : last + 1]) for first, last in inner)


def count(opcodes: Counter[str], wanted: str) -> int:
    """How many opcodes are `wanted` or a form of it: "LDSM" counts LDSM.16.M88.4."""
    return sum(n for opcode, n in opcodes.items() if opcode == wanted or opcode.startswith(wanted + "."))


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def run(command: Sequence[str | Path]) -> tuple[str, str]:
    """Standard output and error of a command; CompileError where it fails."""
    answer = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if answer.returncode != 0:
        raise CompileError(answer.stderr.strip() or f"{command[0]} failed")
    return answer.stdout, answer.stderr


def read_ptxas(log: str) -> dict[str, tuple[int, int]]:
    """Symbol -> registers and static shared bytes, from what `ptxas -v` says."""
    found, symbol = {}, ""
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            symbol = entry[1]
        elif (used := USED.search(line)) and symbol:
            found[symbol], symbol = (int(used[1]), int(used[2] or 0)), ""
    return found


def read_sass(listing: str) -> dict[str, Code]:
    """Symbol -> code, from what nvdisasm prints of a cubin."""
    codes: dict[str, Code] = {}
    kind = symbol = ""
    bounds_follow = False
    for line in listing.splitlines():
        if section := SECTION.match(line):
            kind, symbol = section[1] or "", section[2]
        elif kind == ".text.":
            code = codes.setdefault(symbol, Code())
            if label := LABEL.match(line):
                code.labels[label[1]] = len(code.opcodes)
            elif instruction := INSTRUCTION.match(line):
                code.add(instruction[1], instruction[2])
        elif kind == ".nv.info.":
            if "EIATTR_" in line:
                bounds_follow = line.endswith("EIATTR_MAX_THREADS")
            elif bounds_follow and (word := WORD.search(line)):
                codes.setdefault(symbol, Code()).threads = int(word[1], 16)
                bounds_follow = False
    return codes


def demangle(symbols: Iterable[str]) -> dict[str, str]:
    """Symbol -> C++ name without arguments and without `lissom::`."""
    symbols = list(symbols)
    names = run(["c++filt", "-p", *symbols])[0].splitlines() if symbols else []
    return {symbol: name.replace("lissom::", "") for symbol, name in zip(symbols, names, strict=True)}


def compile_kernels(source: Path, architecture: str, *, include: Path, folder: Path) -> list[Kernel]:
    """The kernels of `source` as compiled for `architecture`; the cubin stays in `folder`.

    Raises:
        CompileError: syntax, spills, local memory, or any warning.
    """
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    compiler = ["nvcc", *FLAGS, PTXAS, f"-arch={architecture}", f"-I{include}"]
    log = run([*compiler, "-cubin", source, "-o", cubin])[1]
    resources, codes = read_ptxas(log), read_sass(run(["nvdisasm", cubin])[0])
    names = demangle(resources)
    kernels = []
    for symbol, (registers, static_shared) in resources.items():
        code = codes[symbol]
        kernels.append(
            Kernel(
                names[symbol],
                symbol,
                architecture,
                registers,
                static_shared,
                code.threads,
                Counter(opcode for opcode in code.opcodes if opcode != "NOP"),
                code.innermost(),
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def constants(header: str, expressions: Sequence[str], *, include: Path, folder: Path) -> list[int]:
    """Values of integer constant expressions that `header` can name in namespace lissom.

    They are read from PTX, so that nothing has to be run and device-only headers can be asked too.
    """
    if not expressions:
        return []
    source, ptx = folder / "constants.cu", folder / "constants.ptx"
    lines = [f'#include "{header}"', "namespace lissom {", 'extern "C" {']
    lines += [
        f"extern __device__ const int gate_{i} = {expression};" for i, expression in enumerate(expressions)
    ]
    source.write_text("\n".join([*lines, "}", "}", ""]))
    run(["nvcc", "-std=c++17", f"-I{include}", f"-arch={ARCHITECTURES[0]}", "-ptx", source, "-o", ptx])
    found = dict(re.findall(r"gate_(\d+)(?: = (-?\d+))?;", ptx.read_text()))
    return [int(found[str(i)] or 0) for i in range(len(expressions))]
