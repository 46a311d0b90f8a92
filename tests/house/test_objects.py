# SPDX-License-Identifier: Apache-2.0
"""No weak symbol in an object compiled for one instruction set.

The linker keeps one copy of an inline function; if that is the AVX-512 one, an older CPU meets an illegal
instruction in code that never asked for AVX-512.
"""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
TIERS = ("avx2", "avx512", "avx512x", "amx")


def weak_symbols(obj: Path) -> list[str]:
    """Return the weak symbols (nm types W, V, w, v) and unique ones (u) of an object file."""
    listing = subprocess.run(["nm", "-C", str(obj)], check=True, capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if line[16:19].strip() in tuple("WVwvu")]


@pytest.mark.parametrize("tier", TIERS)
def test_isa_objects_have_no_weak_symbols(tier):
    objects = list(BUILD.glob(f"**/cpu/*_{tier}.cpp.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip(
            f"no object of {tier} below {BUILD.relative_to(ROOT)} (or no nm); run third_party/bootstrap.sh"
        )
    for obj in objects:
        assert not weak_symbols(obj), f"{obj.name}: weak symbols"


def test_a_weak_symbol_is_found(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("no g++ or nm")
    source = tmp_path / "unit.cpp"
    source.write_text("template <class T> T twice(T x) { return x + x; }\nint four() { return twice(2); }\n")
    subprocess.run([compiler, "-O0", "-c", str(source), "-o", str(tmp_path / "unit.o")], check=True)
    assert "twice" in weak_symbols(tmp_path / "unit.o")[0]
