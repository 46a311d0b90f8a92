# SPDX-License-Identifier: Apache-2.0
"""How many blocks of a kernel one multiprocessor (SM) holds, by the arithmetic of NVIDIA's occupancy calculator."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS = 65536  # of an SM
REGISTER_UNIT = 256  # a warp gets a multiple of these
WARP_UNIT = 4  # warps go to the four quarters of an SM, each with its own quarter of the registers
SHARED_UNIT = 128  # bytes
SHARED_OF_SYSTEM = 1 * KIB  # of each block


@dataclass(frozen=True)
class Device:
    """Limits of one SM, from the table of compute capabilities in NVIDIA's programming guide."""

    name: str
    code: str  # which of our cubins it runs
    shared: int  # bytes of an SM
    shared_of_block: int  # bytes that one block may ask for
    warps: int
    blocks: int
    examples: str


# The first three have the shared memory of data-centre parts, the others that of consumer parts.
DEVICES = (
    Device("sm_80", "sm_80", 164 * KIB, 163 * KIB, 64, 32, "A100"),
    Device("sm_90", "sm_90a", 228 * KIB, 227 * KIB, 64, 32, "H100"),
    Device("sm_100", "sm_100a", 228 * KIB, 227 * KIB, 64, 32, "B200"),
    Device("sm_86", "sm_80", 100 * KIB, 99 * KIB, 48, 16, "A10, RTX 30"),
    Device("sm_89", "sm_80", 100 * KIB, 99 * KIB, 48, 24, "L4, RTX 40"),
    Device("sm_120", "sm_120", 100 * KIB, 99 * KIB, 48, 24, "RTX 50"),
)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_sm(device: Device, *, threads: int, registers: int, shared: int) -> int:
    """Blocks that one SM holds at a time; 0 where a block does not fit at all.

    Args:
        device: whose SM.
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.
    """
    if shared > device.shared_of_block or threads > 1024:
        return 0
    warps = _up(threads, 32) // 32
    warps_by_registers = REGISTERS // _up(registers * 32, REGISTER_UNIT) // WARP_UNIT * WARP_UNIT
    return min(
        device.blocks,
        device.warps // warps,
        warps_by_registers // warps,
        device.shared // _up(shared + SHARED_OF_SYSTEM, SHARED_UNIT),
    )
