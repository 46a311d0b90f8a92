# SPDX-License-Identifier: Apache-2.0
"""Builds lissom._C with CMake. Never imports torch: pip's isolated build only has to know where it lies."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_folder() -> Path:
    """LISSOM_TORCH_DIR, else torch as Python finds it, else the environment that pip installs into."""
    spec = importlib.util.find_spec("torch")
    candidates = [
        os.environ.get("LISSOM_TORCH_DIR"),
        spec and spec.origin and str(Path(spec.origin).parent),
        os.path.join(sysconfig.get_path("purelib"), "torch"),  # the user's, also inside an isolated build
    ]
    for folder in candidates:
        if folder and (Path(folder) / "include/torch/library.h").is_file():
            return Path(folder)
    sys.exit("lissom needs PyTorch to be installed first: run `pip install torch`, then install it again.")


def cuda_choice() -> str:
    """LISSOM_CUDA=1 or 0; without it CMakeLists.txt decides."""
    wish = os.environ.get("LISSOM_CUDA", "")
    choices = {"": "AUTO", "0": "OFF", "1": "ON"}
    if wish not in choices:
        sys.exit(f"LISSOM_CUDA must be 1 (CUDA kernels), 0 (none) or unset; got {wish!r}.")
    return choices[wish]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        tag = sysconfig.get_config_var("SOABI") + os.environ.get("LISSOM_BUILD_TAG", "")
        build = ROOT / "build" / f"cmake-{tag}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLISSOM_TORCH={torch_folder()}",
            f"-DLISSOM_CUDA={cuda_choice()}",
        ]
        # Earlier builds may have left another output folder, or a ninja that is gone by now, in CMake's cache.
        configure += [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
        ]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run([*configure, f"-Dpybind11_DIR={pybind11_cmake()}"], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        # Not linked there directly: builds of another tag share the target, and would take it for their own. And not
        # written over in place: a process that has the old one mapped would crash.
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        shutil.copy2(build / target.name, fresh)
        fresh.replace(target)


def pybind11_cmake() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


setup(ext_modules=[Extension("lissom._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
