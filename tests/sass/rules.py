# SPDX-License-Identifier: Apache-2.0
"""What the machine code of each kernel must be: one entry per source of CMakeLists.txt, one rule per kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# Local memory, and accesses whose space the compiler could not tell: all our pointers have a known space.
FORBIDDEN = ("LDL", "STL", "LD", "ST", "ATOM")


Number = int | str  # a str is a C++ constant that the .cuh beside the source can name in namespace lissom


@dataclass(frozen=True)
class Rule:
    """What must hold for the kernels that a pattern matches, on every architecture."""

    kernel: str  # names as Kernel.name has them, with * and ?
    registers: Number  # at most
    blocks: tuple[
        Number, Number
    ]  # that an SM holds, at least: data-centre parts, consumer parts (0: not used there)
    shared: Number = 0  # dynamic bytes of a launch
    loop: Number = 0  # instructions of the inner loop with the matrix instructions, at most; 0: not looked at
    require: Mapping[str, Number] = field(
        default_factory=dict
    )  # opcode or its beginning -> how many, at least
    forbid: tuple[str, ...] = ()  # beside FORBIDDEN

    def numbers(self) -> list[Number]:
        return [self.registers, *self.blocks, self.shared, self.loop, *self.require.values()]

    def with_values(self, values: Mapping[str, int]) -> Rule:
        """The same rule with the C++ constants' values."""

        def number(one: Number) -> int:
            return values[one] if isinstance(one, str) else one

        return replace(
            self,
            registers=number(self.registers),
            blocks=(number(self.blocks[0]), number(self.blocks[1])),
            shared=number(self.shared),
            loop=number(self.loop),
            require={opcode: number(wanted) for opcode, wanted in self.require.items()},
        )


# nvcc 13.0 emits the same names for all four architectures: HMMA.SP.16832 for mma.sp m16n8k32, HMMA.16816 for
# mma m16n8k16, IMMA.SP.16864 and IMMA.16832 for int8, LDSM for ldmatrix, LDGSTS for cp.async, LDGDEPBAR for its commit,
# DEPBAR for its wait.
PIPELINE = {"LDGSTS": 1, "LDGDEPBAR": 1, "DEPBAR": 1}


def _gemm(index: int) -> tuple[Rule, ...]:
    """One tile of tiles.h, which says itself how many blocks it wants on a data-centre part."""
    tile = f"sparse24::kTiles[{index}]"
    per_warp = " * ".join(
        [
            f"({tile}.rows / 16 / {tile}.warps_n)",
            f"({tile}.tokens / 8 / {tile}.warps_m)",
            f"({tile}.records / {tile}.warps_k)",
        ]
    )

    def rule(types: str, example: str, opcode: str) -> Rule:
        shared = f"sparse24::Gemm<{example}, {index}>::kSharedBytes"
        return Rule(
            f"sparse24::sparse24_gemm<{types}, {index}>",
            registers=f"65536 / (sparse24::threads({tile}) * {tile}.min_blocks)",
            blocks=(f"{tile}.min_blocks", f"{shared} <= 99 * 1024"),
            shared=shared,
            # An A100 takes 8 cycles for each of them: with more instructions, large M would wait for those.
            loop=f"8 * {per_warp}" if index < 3 else 0,
            require={opcode: per_warp, "LDSM": 1, **PIPELINE},
            forbid=("HMMA.16816", "IMMA.16832"),  # dense
        )

    return rule("dev::*", "dev::bf16", "HMMA.SP.16832"), rule("signed char", "int8_t", "IMMA.SP.16864")


def _gemv(tokens: int) -> Rule:
    return Rule(
        f"sparse24::sparse24_gemv<*, {tokens}>",
        registers=128,
        blocks=(2, 2),
        shared=f"sparse24::Gemv<dev::bf16, {tokens}>::kSharedBytes",
        require={"LDG.E.NA.128": 1, "SHFL": 1},
    )


RULES: dict[str, tuple[Rule, ...]] = {
    "core/cuda/device.cu": (),
    "sparse24/cuda/format.cu": (
        Rule("sparse24::check_kernel<*>", registers=32, blocks=(8, 6)),
        Rule("sparse24::check_meta_kernel", registers=32, blocks=(8, 6)),
        Rule("sparse24::verdict_kernel", registers=32, blocks=(8, 6), shared="sparse24::kVerdictShared"),
        Rule("sparse24::compress_kernel<*>", registers=48, blocks=(5, 5), require={"SHFL": 1}),
        Rule("sparse24::decompress_kernel<*>", registers=48, blocks=(5, 5)),
        Rule("sparse24::gather_kernel<*>", registers=48, blocks=(5, 5)),
    ),
    "sparse24/cuda/pack.cu": (
        Rule("sparse24::pack_kernel<*>", registers=96, blocks=(2, 2), require={"STG.E.128": 1}),
        Rule("sparse24::unpack_kernel<*>", registers=96, blocks=(2, 2), require={"SHFL": 1}),
    ),
    "sparse24/cuda/mask_mm.cu": (
        Rule(
            "sparse24::mask_mm_kernel<dev::*>",
            registers=128,
            blocks=(2, 1),
            shared="sparse24::MaskMm::kSharedBytes",
            require={"HMMA.16816": 32, "LDSM": 12, "SHFL": 32, **PIPELINE},
        ),
    ),
    "sparse24/cuda/grad_input.cu": tuple(
        Rule(
            f"sparse24::grad_input_kernel<dev::*, {rows}>",
            registers=128,
            blocks=(2, 1),
            shared=f"sparse24::GradInput<{rows}>::kSharedBytes",
            require={"HMMA.16816": rows // 4, "LDSM": 8, **PIPELINE},
        )
        for rows in (64, 128)
    ),
    "sparse24/cuda/gemm.cu": (
        *(rule for index in range(10) for rule in _gemm(index)),
        Rule("sparse24::sparse24_reduce<*>", registers=96, blocks=(5, 5)),
    ),
    "sparse24/cuda/gemv.cu": tuple(_gemv(tokens) for tokens in (1, 2, 4)),
}
