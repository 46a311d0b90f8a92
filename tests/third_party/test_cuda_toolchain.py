# SPDX-License-Identifier: Apache-2.0
"""cuda_toolchain.sh: what it takes from PATH, what it fetches, what it says when it cannot (with stand-ins)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "third_party" / "cuda_toolchain.sh"
TOOLS = ("nvcc", "nvdisasm", "cuobjdump")
USED = [
    "bash",
    "cat",
    "chmod",
    "dirname",
    "env",
    "flock",
    "grep",
    "ln",
    "mkdir",
    "mktemp",
    "mv",
    "rm",
    "uname",
]

# pip install ... --target FOLDER PACKAGE==VERSION...: makes the tools that these packages bring.
PIP = """#!/bin/bash
echo "$@" >> "$PIP_LOG"
[ -z "$PIP_FAILS" ] || { echo "ERROR: No matching distribution found" >&2; exit 1; }
while [ "$1" != --target ]; do shift; done
bin=$2/nvidia/cu13/bin
mkdir -p "$bin" "$2/nvidia/cu13/lib"
for package in "${@:3}"; do
  package=${package%%==*}
  printf '#!/bin/bash\\necho "Cuda tools, release 13.9"\\n' > "$bin/${package##*-}"
  chmod +x "$bin/${package##*-}"
done
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A repository with the script alone, and a PATH on which nothing of CUDA is but what `provide` puts there."""

    def __init__(self, folder: Path):
        self.repository = folder / "repository"
        self.bin = folder / "bin"
        self.log = folder / "pip.log"
        self.bin.mkdir()
        for name in USED:
            (self.bin / name).symlink_to(shutil.which(name))
        (self.repository / "third_party").mkdir(parents=True)
        shutil.copy(SCRIPT, self.repository / "third_party")
        write_program(self.repository / ".venv/bin/python", PIP)

    def provide(self, *tools: str, release: str = "13.1") -> None:
        for tool in tools:
            write_program(self.bin / tool, f'#!/bin/bash\necho "Cuda tools, release {release}"\n')

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"PATH": str(self.bin), "PIP_LOG": str(self.log), "PIP_FAILS": "", **environment}
        command = [str(self.repository / "third_party" / SCRIPT.name)]
        return subprocess.run(command, env=settings, capture_output=True, text=True)

    def fetched(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path):
    if missing := [name for name in USED if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)}")
    return Machine(tmp_path)


def test_all_is_fetched_once(machine):
    first, second = machine.run(), machine.run()
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    folder = Path(first.stdout.strip())
    assert all(os.access(folder / tool, os.X_OK) for tool in TOOLS)
    assert (folder / "../lib64").resolve() == (folder / "../lib").resolve()
    assert len(machine.fetched()) == 1
    assert "nvidia-cuda-nvcc==13.0.88" in machine.fetched()[0]


def test_an_nvcc_of_the_machine_is_used(machine):
    machine.provide("nvcc")
    folder = Path(machine.run().stdout.strip())
    assert (folder / "nvdisasm").exists()
    assert not (folder / "nvcc").exists()
    assert "nvidia-cuda-nvcc" not in machine.fetched()[0]


def test_a_complete_machine_fetches_nothing(machine):
    machine.provide(*TOOLS)
    assert machine.run().stdout.strip() == str(machine.bin)
    assert not machine.fetched()


def test_an_old_nvcc_is_not_used(machine):
    machine.provide(*TOOLS, release="12.4")
    assert "nvidia-cuda-nvcc==13.0.88" in (machine.run().stdout and machine.fetched()[0])


def test_other_pins_are_fetched_anew(machine):
    machine.run()
    script = machine.repository / "third_party" / SCRIPT.name
    script.write_text(script.read_text().replace("13.0.88", "13.0.99"))
    assert machine.run().returncode == 0
    assert len(machine.fetched()) == 2
    assert "nvidia-nvvm==13.0.99" in machine.fetched()[1]


def test_no_network_is_one_sentence_and_leaves_nothing(machine):
    answer = machine.run(PIP_FAILS="1")
    assert answer.returncode == 1
    assert not answer.stdout
    assert "pip cannot fetch the wheels" in answer.stderr
    assert "PIP_FIND_LINKS" in answer.stderr
    assert [path.name for path in (machine.repository / ".cache/cuda-toolchain").iterdir()] == ["lock"]
    assert machine.run().returncode == 0
