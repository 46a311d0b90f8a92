# SPDX-License-Identifier: Apache-2.0
"""Every fault that the gate looks for, planted; a control that passes; then our kernels against their rules."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from gate import ROOT, Checked, check_source, faults_of, main_loop, match, report, table
from occupancy import DEVICES, blocks_per_sm
from rules import RULES, Rule
from sass import ARCHITECTURES, Kernel, count, read_ptxas, read_sass

OUT = ROOT / "build" / "sass"
HEAD = """#include "core/cuda/dev.cuh"
namespace lissom {
struct Control { static constexpr int kSharedBytes = 4096; };
"""

CONTROL = """
LISSOM_KERNEL(128, 2) planted(const dev::Vec<uint32_t, 4>* x, float* y, int steps) {
  const auto tile = dev::shared<dev::bf16>(0) + dev::thread() * 8;
  float d[4] = {};
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    dev::cp_async<16>(tile, x + i * 128 + dev::thread());
    dev::cp_async_commit();
    dev::cp_async_wait<0>();
    dev::barrier();
    uint32_t a[4], b[4];
    dev::ldmatrix<4>(a, tile);
    dev::ldmatrix<4, true>(b, tile);
    dev::mma_sp_m16n8k32<dev::bf16, 0>(d, a, b, 0x44444444u);
    dev::barrier();
  }
  const float sum = dev::shuffle_xor(d[0] + d[1] + d[2] + d[3], 1);
  dev::store(y + dev::thread(), sum);
}
"""
# More live values than 1024 threads have registers for.
SPILL = """
LISSOM_KERNEL(1024, 1) planted(float* y, int n) {
  float v[96];
  LISSOM_UNROLL for (int i = 0; i < 96; ++i) v[i] = dev::load_plain(y + i * 1024 + dev::thread());
  for (int r = 0; r < n; ++r) LISSOM_UNROLL for (int i = 0; i < 96; ++i) v[i] = v[i] * v[(i * 7 + 1) % 96] + v[0];
  LISSOM_UNROLL for (int i = 0; i < 96; ++i) dev::store(y + i * 1024 + dev::thread(), v[i]);
}
"""
# An index that is known only when the kernel runs puts the array into local memory.
LOCAL = """
LISSOM_KERNEL(128, 1) planted(float* y, int n) {
  float v[64] = {};
  for (int r = 0; r < n; ++r) v[r * r & 63] += dev::load_plain(y + r * 128 + dev::thread());
  LISSOM_UNROLL for (int i = 0; i < 64; ++i) dev::store(y + i * 128 + dev::thread(), v[i]);
}
"""
# Shared or global is known only when the kernel runs.
GENERIC = """
LISSOM_KERNEL(128, 1) planted(float* y, int n) {
  const float* p = n > 3 ? dev::shared<float>(0).pointer(n) : y;
  dev::store(y + dev::thread(), dev::load_plain(p));
}
"""
GENERIC_STORE = """
LISSOM_KERNEL(128, 1) planted(float* y, int n) {
  dev::store(n > 3 ? dev::shared<float>(0).pointer(n) : y, 1.0f);
}
"""
# Its product is computed, but not by the matrix unit.
NO_MATRIX = """
LISSOM_KERNEL(128, 1) planted(const float* x, float* y, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += dev::load(x + i) * dev::load(x + n + i);
  dev::store(y + dev::thread(), sum);
}
"""
WARNING = """
LISSOM_KERNEL(128, 1) planted(float* y) {
  int unused;
  dev::store(y + dev::thread(), 1.0f);
}
"""

REQUIRED = {"HMMA.SP.16832": 1, "LDSM": 2, "LDGSTS": 1, "LDGDEPBAR": 1, "DEPBAR": 1, "SHFL": 1}
GOOD = Rule(
    "planted", registers=64, blocks=(8, 8), shared="Control::kSharedBytes", loop=100, require=REQUIRED
)
ANY = Rule("planted", registers=255, blocks=(1, 1))


def plant(
    folder: Path, body: str, rule: Rule, architectures=ARCHITECTURES[:1]
) -> tuple[list[Checked], list[str]]:
    """Holds a kernel of the text `body` against `rule`, in a tree of its own."""
    (folder / "csrc").mkdir()
    (folder / "csrc/core").symlink_to(ROOT / "csrc/core")
    (folder / "csrc/planted.cuh").write_text(f"{HEAD}{body}}}\n")
    (folder / "csrc/planted.cu").write_text('#include "planted.cuh"\n')
    return check_source("planted.cu", [rule], root=folder, architectures=architectures)


@pytest.mark.usefixtures("toolkit")
class TestPlanted:
    def test_control_passes(self, tmp_path):
        checked, faults = plant(tmp_path, CONTROL, GOOD, ARCHITECTURES)
        assert faults == []
        assert [one.kernel.architecture for one in checked] == list(ARCHITECTURES)
        for one in checked:
            assert one.kernel.threads == 128
            assert one.shared == 4096
            assert count(one.kernel.opcodes, "HMMA.SP.16832.F32.BF16") == 1
            assert main_loop(one.kernel) in range(8, 101)

    @pytest.mark.parametrize(
        "body, rule, said",
        [
            pytest.param(SPILL, ANY, "Registers are spilled to local memory", id="spill"),
            pytest.param(LOCAL, ANY, "Local memory used", id="run-time-index"),
            pytest.param(GENERIC, ANY, r"1 LD, wanted none", id="generic-load"),
            pytest.param(GENERIC_STORE, ANY, r"1 ST, wanted none", id="generic-store"),
            pytest.param(NO_MATRIX, GOOD, r"0 HMMA\.SP\.16832, wanted at least 1", id="no-matrix"),
            pytest.param(
                NO_MATRIX, GOOD, "None instructions in the loop with the matrix", id="no-matrix-loop"
            ),
            pytest.param(WARNING, ANY, "declared but never referenced", id="warning"),
        ],
    )
    def test_fault_is_found(self, tmp_path, body, rule, said):
        assert re.search(said, "\n".join(plant(tmp_path, body, rule)[1]))

    def test_a_constant_that_is_not_there_is_said(self, tmp_path):
        rule = Rule("planted", registers=64, blocks=(1, 1), shared="Control::kNoSuchBytes")
        assert "kNoSuchBytes" in plant(tmp_path, CONTROL, rule)[1][0]


def kernel(**changes) -> Kernel:
    settings = {
        "name": "made",
        "symbol": "made",
        "architecture": "sm_80",
        "registers": 128,
        "static_shared": 0,
        "threads": 256,
        "opcodes": Counter({"HMMA.16816.F32": 8, "LDG.E": 2}),
        "loops": (Counter({"HMMA.16816.F32": 8, "IADD3": 30}), Counter({"IADD3": 90})),
    }
    return Kernel(**{**settings, **changes})


@pytest.mark.parametrize(
    "rule, shared, said",
    [
        (Rule("made", registers=128, blocks=(2, 1), loop=38, require={"HMMA": 8}), 67584, ""),
        (Rule("made", registers=127, blocks=(2, 1)), 0, "128 registers, wanted at most 127"),
        (Rule("made", registers=128, blocks=(3, 1)), 0, "an SM of sm_80 holds 2 blocks, wanted at least 3"),
        (
            Rule("made", registers=128, blocks=(2, 2)),
            67584,
            "an SM of sm_86 holds 1 blocks, wanted at least 2",
        ),
        (Rule("made", registers=128, blocks=(1, 1)), 100 * 1024, "an SM of sm_86 holds 0 blocks"),
        (Rule("made", registers=128, blocks=(1, 0)), 100 * 1024, ""),
        (Rule("made", registers=128, blocks=(1, 1), forbid=("LDG",)), 0, "2 LDG, wanted none"),
        (
            Rule("made", registers=128, blocks=(1, 1), loop=37),
            0,
            "38 instructions in the loop with the matrix",
        ),
        (
            Rule("made", registers=128, blocks=(1, 1), require={"HMMA.SP": 1}),
            0,
            "0 HMMA.SP, wanted at least 1",
        ),
    ],
)
def test_each_number_of_a_rule_counts(rule, shared, said):
    faults = "\n".join(faults_of(Checked("made.cu", kernel(), shared), rule))
    assert said in faults if said else faults == ""


def test_kernels_and_rules_belong_together():
    one, two = Rule("gemm<*>", registers=1, blocks=(1, 1)), Rule("*<bf16>", registers=1, blocks=(1, 1))
    assert match(["gemm<f16>"], [one]) == ({"gemm<f16>": one}, [])
    assert match(["gemv"], [one])[1] == [
        "gemv: wanted one rule that matches, got none",
        "rule gemm<*>: no kernel has such a name",
    ]
    assert "got gemm<*> and *<bf16>" in match(["gemm<bf16>"], [one, two])[1][0]


LISTING = """
	.section	.nv.info.twice,"",@"SHT_CUDA_INFO"
	//----- nvinfo : EIATTR_REGCOUNT
        /*0004*/ 	.word	0x00000011
	//----- nvinfo : EIATTR_MAX_THREADS
	.align		4
.L_33:
        /*0182*/ 	.short	(.L_35 - .L_34)
        /*0184*/ 	.word	0x00000100
        /*0188*/ 	.word	0x00000001
	.section	.text.twice,"ax",@progbits
.text.twice:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E R4, [R2.64] ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0030*/              @UP1 BRA `(.L_x_2) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   BRA `(.L_x_3);
        /*0070*/                   NOP;
	.section	.debug_frame,"",@progbits
        /*0000*/ 	.byte	0xff
"""


def test_listing_is_read():
    code = read_sass(LISTING)["twice"]
    assert code.threads == 256
    assert code.opcodes == ["MOV", "LDG.E", "HMMA.16816.F32", "BRA", "BRA", "EXIT", "BRA", "NOP"]
    assert code.innermost() == (Counter({"HMMA.16816.F32": 1, "BRA": 1}),)


def test_what_ptxas_says_is_read():
    log = """ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 126 registers, used 1 barriers, 48 bytes smem, 432 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Used 30 registers, used 3 barriers"""
    assert read_ptxas(log) == {"one": (126, 48), "two": (30, 0)}


def test_opcodes_are_counted_by_their_beginning():
    opcodes = Counter({"LDG.E.128": 3, "LDGSTS.E": 2, "LD.E": 1, "LDGDEPBAR": 1})
    assert [count(opcodes, name) for name in ("LDG", "LDGSTS", "LD", "LDGDEPBAR", "L")] == [3, 2, 1, 1, 0]


@pytest.mark.parametrize(
    "device, threads, registers, shared, blocks",
    [
        ("sm_80", 128, 32, 0, 16),  # threads
        ("sm_80", 32, 16, 0, 32),  # blocks
        ("sm_86", 32, 16, 0, 16),
        ("sm_89", 32, 16, 0, 24),
        ("sm_86", 256, 32, 0, 6),  # 48 warps
        ("sm_80", 256, 128, 0, 2),  # registers
        ("sm_80", 256, 129, 0, 1),  # 136 of each thread
        ("sm_80", 128, 255, 0, 2),
        ("sm_80", 96, 168, 0, 4),  # 12 warps, by 3
        ("sm_80", 128, 32, 54 * 1024, 2),  # 55 KiB with the system's share, of 164
        ("sm_80", 128, 32, 53 * 1024, 3),
        ("sm_80", 128, 32, 163 * 1024, 1),
        ("sm_80", 128, 32, 163 * 1024 + 1, 0),
        ("sm_90", 128, 32, 227 * 1024, 1),
        ("sm_120", 128, 32, 99 * 1024, 1),
        ("sm_120", 128, 32, 100 * 1024, 0),
    ],
)
def test_occupancy(device, threads, registers, shared, blocks):
    limits = next(one for one in DEVICES if one.name == device)
    assert blocks_per_sm(limits, threads=threads, registers=registers, shared=shared) == blocks


def test_every_source_is_built_and_has_rules():
    sources = sorted(str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.cu"))
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    listed = re.search(r"set\(CUDA_SOURCES\s([^)]*)\)", cmake)[1]
    assert sorted(re.findall(r"csrc/(\S+\.cu)\b", listed)) == sources
    assert sorted(RULES) == sources


def test_our_kernels_follow_their_rules(our_kernels):
    checked, faults = our_kernels
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "kernels.txt").write_text(table(checked) + "\n")
    (OUT / "kernels.json").write_text(json.dumps(report(checked), indent=1) + "\n")
    assert faults == [], "\n".join(faults)
