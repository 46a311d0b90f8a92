# SPDX-License-Identifier: Apache-2.0
"""The static gate: is the machine code of every CUDA kernel what its rule in rules.py says?

    python tests/sass/gate.py [--json FILE]     # prints a table; exit status 1 where a rule is broken

Compiles each source for four architectures (where a spill or local memory is an error already), disassembles, and
checks opcodes, registers, shared memory and the blocks that an SM holds. Runs nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from occupancy import DEVICES, Device, blocks_per_sm
from rules import FORBIDDEN, RULES, Rule
from sass import ARCHITECTURES, CompileError, Kernel, compile_kernels, constants, count, missing_tools, run

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ("HMMA", "IMMA", "LDSM", "LDGSTS", "LDG", "STG", "LDS", "STS", "SHFL", "BAR")
JOBS = 2


@dataclass(frozen=True)
class Checked:
    """One kernel on one architecture, with what its launch needs."""

    source: str
    kernel: Kernel
    shared: int  # bytes, static and dynamic

    def blocks(self) -> dict[str, int]:
        """Device -> blocks that an SM holds, for the devices that run this code."""
        k = self.kernel
        return {
            device.name: blocks_per_sm(device, threads=k.threads, registers=k.registers, shared=self.shared)
            for device in DEVICES
            if device.code == k.architecture
        }

    def to_dict(self) -> dict[str, Any]:
        k = self.kernel
        return {
            "source": self.source,
            "kernel": k.name,
            "architecture": k.architecture,
            "registers": k.registers,
            "threads": k.threads,
            "shared_bytes": self.shared,
            "blocks_per_sm": self.blocks(),
            "instructions": k.instructions,
            "opcodes": dict(sorted(k.opcodes.items())),
            "loops": [
                {"instructions": sum(loop.values()), "opcodes": dict(sorted(loop.items()))}
                for loop in k.loops
            ],
        }


def _wanted_blocks(rule: Rule, device: Device) -> int:
    return rule.blocks[0] if device.shared > 128 * 1024 else rule.blocks[1]


def matrix_instructions(opcodes: Counter[str]) -> int:
    return count(opcodes, "HMMA") + count(opcodes, "IMMA")


def main_loop(kernel: Kernel) -> int | None:
    """Instructions of the inner loop that has most matrix instructions; None where no loop has any."""
    found = max(kernel.loops, key=matrix_instructions, default=Counter())
    return sum(found.values()) if matrix_instructions(found) else None


def faults_of(checked: Checked, rule: Rule) -> list[str]:
    """Sentences about what this kernel breaks of its rule."""
    kernel = checked.kernel
    found = []
    for opcode, wanted in rule.require.items():
        if (got := count(kernel.opcodes, opcode)) < wanted:
            found.append(f"{got} {opcode}, wanted at least {wanted}")
    for opcode in (*FORBIDDEN, *rule.forbid):
        if got := count(kernel.opcodes, opcode):
            found.append(f"{got} {opcode}, wanted none")
    if kernel.registers > rule.registers:
        found.append(f"{kernel.registers} registers, wanted at most {rule.registers}")
    loop = main_loop(kernel)
    if rule.loop and (loop is None or loop > rule.loop):
        found.append(
            f"{loop} instructions in the loop with the matrix instructions, wanted at most {rule.loop}"
        )
    for device in DEVICES:
        got, wanted = checked.blocks().get(device.name), _wanted_blocks(rule, device)
        if got is not None and got < wanted:
            found.append(f"an SM of {device.name} holds {got} blocks, wanted at least {wanted}")
    return [f"{kernel.name} on {kernel.architecture}: {fault}" for fault in found]


def match(names: Sequence[str], rules: Sequence[Rule]) -> tuple[dict[str, Rule], list[str]]:
    """Name -> its one rule; and sentences about kernels without a rule, with two, and rules without a kernel."""
    found, faults = {}, []
    for name in names:
        fitting = [rule for rule in rules if fnmatchcase(name, rule.kernel)]
        if len(fitting) == 1:
            found[name] = fitting[0]
        else:
            said = " and ".join(rule.kernel for rule in fitting) or "none"
            faults.append(f"{name}: wanted one rule that matches, got {said}")
    for rule in rules:
        if not any(fnmatchcase(name, rule.kernel) for name in names):
            faults.append(f"rule {rule.kernel}: no kernel has such a name")
    return found, faults


def check_source(
    source: str, rules: Sequence[Rule], *, root: Path = ROOT, architectures: Sequence[str] = ARCHITECTURES
) -> tuple[list[Checked], list[str]]:
    """Compiles one source (a path inside csrc) and holds its kernels against their rules.

    Returns:
        What was compiled, and sentences about all that is wrong.
    """
    include, checked, faults = root / "csrc", [], []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        try:
            header = str(Path(source).with_suffix(".cuh"))
            asked = sorted({number for rule in rules for number in rule.numbers() if isinstance(number, str)})
            values = dict(zip(asked, constants(header, asked, include=include, folder=folder)))
        except CompileError as error:
            return [], [f"{source}: the constants of its rules: {error}"]
        rules = [rule.with_values(values) for rule in rules]

        def compiled(architecture: str) -> list[Kernel] | CompileError:
            try:
                return compile_kernels(include / source, architecture, include=include, folder=folder)
            except CompileError as error:
                return error

        with ThreadPoolExecutor(JOBS) as pool:
            answers = list(pool.map(compiled, architectures))
    for architecture, kernels in zip(architectures, answers):
        if isinstance(kernels, CompileError):
            faults.append(f"{source} for {architecture}: {kernels}")
            continue
        rule_of, unmatched = match([kernel.name for kernel in kernels], rules)
        faults += [f"{source} for {architecture}: {fault}" for fault in unmatched]
        for kernel in kernels:
            rule = rule_of.get(kernel.name)
            checked.append(Checked(source, kernel, kernel.static_shared + (rule.shared if rule else 0)))
            faults += faults_of(checked[-1], rule) if rule else []
    return checked, faults


def check_all(rules: Mapping[str, Sequence[Rule]]) -> tuple[list[Checked], list[str]]:
    """All sources of a table of rules."""
    answers = [check_source(source, found) for source, found in rules.items()]
    return [one for checked, _ in answers for one in checked], [
        fault for _, faults in answers for fault in faults
    ]


def _for_each(kernels: Sequence[Kernel], tell: Callable[[Kernel], object]) -> str:
    """What `tell` says of each architecture, once where they agree."""
    said = [str(tell(kernel)) for kernel in kernels]
    return said[0] if len(set(said)) == 1 else " ".join(said)


def _loop_text(kernel: Kernel) -> str:
    loops = [(matrix_instructions(loop), sum(loop.values())) for loop in kernel.loops]
    matrix, instructions = max(loops, default=(0, 0))
    return f"{matrix}/{instructions}" if matrix else "-"


def table(checked: Sequence[Checked]) -> str:
    """One line per kernel. Figures that differ stand in the order of the architectures, opcodes are the first's."""
    places = {one: [c for c in checked if (c.source, c.kernel.name) == one] for one in _names(checked)}
    codes = ", ".join(dict.fromkeys(c.kernel.architecture for c in checked))
    devices = ", ".join(device.name for device in DEVICES)
    lines = [
        f"code: {codes}. blocks: resident on an SM of {devices}.",
        "main loop: matrix instructions / all instructions of the inner loop that has most of them.",
    ]
    rows = [("kernel", "threads", "shared", "registers", "blocks", "main loop", "opcodes")]
    for (_, name), found in places.items():
        kernels = [one.kernel for one in found]
        blocks = {device: n for one in found for device, n in one.blocks().items()}
        shown = [(opcode, count(kernels[0].opcodes, opcode)) for opcode in SHOWN]
        rows.append(
            (
                name,
                _for_each(kernels, lambda kernel: kernel.threads),
                str(found[0].shared),
                _for_each(kernels, lambda kernel: kernel.registers),
                " ".join(str(blocks.get(device.name, "-")) for device in DEVICES),
                _for_each(kernels, _loop_text),
                ", ".join(f"{n} {opcode}" for opcode, n in shown if n),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _names(checked: Sequence[Checked]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((one.source, one.kernel.name) for one in checked))


def report(checked: Sequence[Checked]) -> dict[str, Any]:
    """What a performance model needs to know of the machine code."""
    compiler = re.search(r"V([\d.]+)", run(["nvcc", "--version"])[0])
    return {"nvcc": compiler[1] if compiler else "unknown", "kernels": [one.to_dict() for one in checked]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if missing := missing_tools():
        sys.exit(f"missing: {', '.join(missing)}; PATH=$(third_party/cuda_toolchain.sh):$PATH")
    checked, faults = check_all(RULES)
    print(table(checked))
    if options.json:
        options.json.write_text(json.dumps(report(checked), indent=1) + "\n")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
