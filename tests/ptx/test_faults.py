# SPDX-License-Identifier: Apache-2.0
"""Each check of the interpreter is seen to fire: planted faults in a compiled kernel and in small PTX texts."""

from __future__ import annotations

import re
from pathlib import Path

import interpreter
import numpy as np
import pytest
from handwritten import HEAD, kernel
from interpreter import Fault, const, load

KERNELS = Path(__file__).resolve().parent / "kernels"
WAYS = [("early", 0), ("late", 1), ("random", 2), ("random", 3)]

RING = {
    1: "nobody wrote|under an unfinished asynchronous copy|race",  # no barrier
    2: "under an unfinished asynchronous copy",  # wait one too weak
    3: "race: byte .* is written by thread .* still read it|under an unfinished",  # refill before the barrier
    4: "misaligned source of an asynchronous copy",
    5: "out of bounds: 4 bytes at offset 5120 of buffer argument_0",
    6: "divergent|race|nobody wrote",  # barrier in a branch
    7: "out of bounds: write of 4 bytes .* of shared memory of 1536 bytes",
    8: "nobody wrote|out of bounds",
    9: "divergent collective: its mask names lanes ffff0000, which have left",  # shuffle of all lanes in half a warp
    10: "under an unfinished asynchronous copy",  # no wait
    11: "divergent or dead.*barrier 3",  # nobody else comes
    12: "race",
    13: "write to buffer argument_0, which is read-only",
    14: "out of bounds: 4 bytes at offset 512 of buffer argument_1",
    15: "touched by block . of the same launch|race",
}


@pytest.fixture(scope="module")
def ring(nvcc):
    return load(interpreter.compile_ptx(KERNELS / "faults.cu"))


def run_ring(ring, number, landing, seed):
    tiles, x = 10, np.arange(1280, dtype=np.float32)
    out = np.zeros(128, np.float32)
    more = 512 if number == 8 else 0
    grid = 2 if number == 15 else 1
    ring.launch(
        f"ring_checkILi{number}E",
        grid,
        128,
        [const(x), out, tiles],
        shared=1536 + more,
        landing=landing,
        seed=seed,
    )
    return out, x.reshape(tiles, 128).sum(0)[::-1]


@pytest.mark.parametrize(("landing", "seed"), WAYS)
def test_the_right_ring_is_right(ring, landing, seed):
    out, expected = run_ring(ring, 0, landing, seed)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("number", RING)
def test_a_wrong_ring_is_reported_in_every_schedule(ring, number):
    for landing, seed in WAYS:
        with pytest.raises(Fault, match=RING[number]) as caught:
            run_ring(ring, number, landing, seed)
        assert re.search(
            r"kernel \S*ring_check\S*, block \(\d, 0, 0\).*warp \d,? .*line \d+", str(caught.value)
        )


# --- small texts ---

SHARED = ".shared .align 16 .b8 s[256];"
ADDRESS = "shl.b32 %r1, %r0, 2; mov.u32 %r2, s; add.s32 %r3, %r2, %r1;"
BODIES = {
    "wait for the own group only": (
        # Without a barrier the copies of other threads may not be read, waited for or not.
        ADDRESS
        + "cvt.u64.u32 %rd1, %r1; add.s64 %rd1, %rd0, %rd1; cp.async.ca.shared.global [%r3], [%rd1], 4;"
        "cp.async.commit_group; cp.async.wait_group 0; xor.b32 %r4, %r3, 4; ld.shared.b32 %r5, [%r4];",
        "race",
    ),
    "a warp is not in lockstep": (
        ADDRESS + "st.shared.b32 [%r3], %r0; xor.b32 %r4, %r3, 4; ld.shared.b32 %r5, [%r4];",
        "race",
    ),
    "two values for one place": (
        "mov.u32 %r2, s; st.shared.b32 [%r2], %r0;",
        "race: two writes of different values",
    ),
    "plain beside atomic": (
        "mov.u32 %r2, s; mov.u32 %r4, 0; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [%r2], %r4; bar.sync 0;"
        "atom.shared.add.u32 %r5, [%r2], 1; ld.shared.b32 %r6, [%r2];",
        "race",
    ),
    "atomic on nothing": ("mov.u32 %r2, s; atom.shared.add.u32 %r5, [%r2], 1;", "nobody wrote"),
    "misaligned": ("mov.u32 %r2, s; st.shared.v2.b32 [%r2+4], {%r0, %r0};", "misaligned write of 8 bytes"),
    "shared null": ("mov.u32 %r2, 0; ld.shared.b32 %r3, [%r2];", "out of bounds: read"),
    "row of a matrix misaligned": (
        "mov.u32 %r2, s+8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];",
        "multiple of 16",
    ),
    "no buffer": ("mov.u64 %rd1, 4096; ld.global.b32 %r2, [%rd1];", "lies in no buffer"),
    "matrix in half a warp": (
        "setp.lt.u32 %p1, %r0, 16; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];",
        "lanes 0000ffff only: the whole warp must take part",
    ),
    "barrier in half a warp": (
        "setp.lt.u32 %p1, %r0, 16; @%p1 bar.sync 0; $L: @!%p1 bra $L;",
        "no end after|divergent",
    ),
    "shuffle in half a warp": (
        "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; bar.warp.sync -1;",
        "divergent or dead: warp . lanes ........ wait for others",
    ),
    "lane not in its mask": ("vote.sync.any.pred %p1, %p1, 0x0000ffff;", "does not name them"),
    "lanes disagree about a barrier": ("bar.sync %r0;", "disagree"),
    "barrier count": ("bar.sync 1, 33;", "barrier of 33 threads"),
    "different barriers": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $A; bar.sync 0; bra $B; $A: bar.sync 0; $B: mov.u32 %r1, 0;",
        "divergent barrier",
    ),
    "arrives twice": ("bar.arrive 1, 64; bar.arrive 1, 64;", "arrives twice"),
    "different counts": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 32;",
        "threads here|waits at barrier 1",
    ),
    "source size": (
        "mov.u32 %r2, s; mov.u32 %r3, 9; cp.async.ca.shared.global [%r2], [%rd0], 8, %r3;",
        "source size of 9",
    ),
    "endless": ("$L: bra $L;", "no end after"),
    "trap": ("trap;", "trap"),
    "branch table": (
        "brx.idx %r0, $T; $T: .branchtargets $X, $Y; $X: $Y: mov.u32 %r1, 0;",
        "brx.idx: index .* of 2",
    ),
    "read-only path to what is written": (
        "st.global.b32 [%rd0], %r4; ld.global.nc.b32 %r5, [%rd0];",
        "has written",
    ),
    "local": (
        ".local .align 4 .b8 l[8]; mov.u64 %rd1, l; ld.local.b32 %r2, [%rd1+8];",
        "of local memory of 8 bytes",
    ),
    "parameter": ("ld.param.u64 %rd1, [p0+8];", "parameter memory of 8 bytes"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_planted_fault_is_reported(name):
    body, report = BODIES[name]
    module = load(kernel(body, ["u64"], SHARED))
    threads = 64
    for seed in range(3):
        with pytest.raises(Fault, match=report):
            module.launch("test", 1, threads, [np.zeros(64, np.uint32)], seed=seed, max_steps=100000)


RIGHT = {
    "equal values for one place": "mov.u32 %r2, s; mov.u32 %r3, 5; st.shared.b32 [%r2], %r3; bar.sync 0;"
    "ld.shared.b32 %r4, [%r2];",
    "syncwarp orders a warp": ADDRESS
    + "st.shared.b32 [%r3], %r0; bar.warp.sync -1; xor.b32 %r4, %r3, 4; ld.shared.b32 %r5, [%r4];",
    "lanes come one by one": "setp.lt.u32 %p1, %r0, 7; @%p1 bra $A; mov.u32 %r1, 1; $A: bar.warp.sync -1; bar.sync 0;",
    "half masks": "and.b32 %r1, %r0, 16; setp.eq.u32 %p1, %r1, 0; selp.b32 %r2, 0x0000ffff, 0xffff0000, %p1;"
    "shfl.sync.bfly.b32 %r3|%p2, %r0, 1, 0x1f, %r2;",
    "who has left is not waited for": "setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;",
    "a warp may leave lanes": "setp.lt.u32 %p1, %r0, 3; @%p1 ret; bar.sync 0;",
    "empty groups": "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1; cp.async.wait_all;",
}


@pytest.mark.parametrize("name", RIGHT)
def test_no_false_alarm(name):
    module = load(kernel(RIGHT[name], ["u64"], SHARED))
    for seed in range(6):
        module.launch("test", 1, 64, [np.zeros(64, np.uint32)], seed=seed)


def test_reduction_over_a_barrier():
    body = (
        "setp.lt.u32 %p1, %r0, 40; bar.red.popc.u32 %r1, 0, %p1; bar.red.and.pred %p2, 0, %p1;"
        "bar.red.or.pred %p3, 0, !%p1;"
        "selp.b32 %r2, 256, 0, %p2; selp.b32 %r3, 512, 0, %p3; or.b32 %r1, %r1, %r2; or.b32 %r1, %r1, %r3;"
        "mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd0, %rd1; st.global.b32 [%rd1], %r1;"
    )
    out = np.zeros(64, np.uint32)
    load(kernel(body, ["u64"])).launch("test", 1, 64, [out], seed=5)
    assert (out == 40 + 512).all()


def test_one_block_may_not_read_what_another_wrote():
    body = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd0], %r1;"
    body += "@!%p1 ld.global.b32 %r2, [%rd0];"
    module = load(kernel(body, ["u64"]))
    for seed in (0, 1):
        with pytest.raises(Fault, match=r"block . of the same launch|race between blocks"):
            module.launch("test", 2, 1, [np.zeros(4, np.uint32)], seed=seed)


@pytest.mark.parametrize(("landing", "seen"), [("early", {0}), ("late", {7}), ("random", {0, 7})])
def test_when_a_copy_reads_its_source(landing, seen):
    """Each thread overwrites the source between issue and wait: the modes see what was there before or after."""
    body = ADDRESS + (
        "cvt.u64.u32 %rd1, %r1; add.s64 %rd1, %rd0, %rd1; cp.async.ca.shared.global [%r3], [%rd1], 4;"
        "mov.u32 %r4, 7; st.global.b32 [%rd1], %r4; cp.async.wait_all;"
        "ld.shared.b32 %r5, [%r3]; st.global.b32 [%rd1], %r5;"
    )
    out = np.zeros(64, np.uint32)
    load(kernel(body, ["u64"], SHARED)).launch("test", 1, 64, [out], landing=landing, seed=2)
    assert set(out.tolist()) == seen


# --- refused when read, whether executed or not ---

UNKNOWN = {
    "foo.b32 %r1, %r2;": "unknown instruction",
    "add.foo.s32 %r1, %r2, %r3;": "unknown modifier .foo",
    "ld.global.L3::hint.b32 %r1, [%rd0];": "unknown modifier",
    "wgmma.fence.sync.aligned;": "unknown instruction",
    "mbarrier.init.shared.b64 [%r1], 1;": "unknown instruction",
    "cp.async.bulk.commit_group;": "unknown form|unknown modifier",
    "fence.proxy.async;": "unknown modifier .proxy",
    "shfl.bfly.b32 %r1, %r2, 1, 31;": "unknown form",
    "call.uni foo;": "unknown instruction",
    "mov.u32 %r1, %clock;": "unknown name %clock",
    "add.s32 %r1, %r2, %rd3;": "has 64 bits, wanted 32",
    "add.s32 %r1, %r2;": "too few operands",
    "add.s32 %r1, %r2, %r3, %r4;": "too many operands",
    "add.f32 %r1, %r2, 1;": "an integer literal for a float",
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4},"
    "{%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, %r5, 2;": "no such sparsity selector",
    "bra $nowhere;": "no label",
    ".foo 3;": "unknown directive",
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_unknown_is_an_error_even_when_never_reached(text):
    with pytest.raises(Fault, match=UNKNOWN[text]):
        load(kernel(f"ret; {text}", ["u64"]))


def test_unknown_text_at_the_top_is_an_error():
    with pytest.raises(Fault, match="unknown directive"):
        load(HEAD + ".surprise x;")
    with pytest.raises(Fault, match="calls of device functions"):
        load(HEAD + ".func foo() { ret; }")
    with pytest.raises(Fault, match="no kernel"):
        load(HEAD)
