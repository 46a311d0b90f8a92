# SPDX-License-Identifier: Apache-2.0
"""Python side of the PTX interpreter: builds the library, compiles kernels to PTX, runs them on torch or numpy memory.

module = load(compile_ptx(Path("kernel.cu")))
module.launch("add", grid=4, threads=128, args=[const(x), y, n], landing="late", seed=7)

library = launchers([Path("kernel.cu")])                # the real extern "C" launchers, over the stand-in runtime
with buffers(x=const(x), y=y):
    assert library.launch_add(x.data_ptr(), y.data_ptr(), n, None) == 0, error()
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "ptx"
LANDINGS = ("early", "late", "random")
NVCC = shutil.which("nvcc")
CXX = os.environ.get("CXX") or shutil.which("g++")


class Fault(AssertionError):
    """What the interpreter refused: a race, an access out of bounds, an unknown instruction..."""


class _Options(ctypes.Structure):
    _fields_ = (
        ("landing", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("strict_zero_fill", ctypes.c_int),
        ("global_shadow", ctypes.c_int),
        ("approximate", ctypes.c_int),
        ("max_steps", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class const:
    """Marks an array that a kernel may only read."""

    array: Any


# --- building ---


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _digest(files: Sequence[Path], *more: str) -> str:
    digest = hashlib.sha256("\n".join(more).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def library_path() -> Path:
    """The shared library, compiled when a source has changed."""
    headers, sources = sorted(HERE.glob("*.h")), sorted(HERE.glob("*.cpp"))
    flags = [
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-ffp-contract=off",
        "-march=native",
        "-Wall",
        "-Wextra",
        "-Wshadow",
    ]
    objects = []
    waiting = []
    for source in sources:
        target = BUILD / f"{source.stem}-{_digest([source, *headers], *flags)}.o"
        objects.append(target)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(f".{os.getpid()}.tmp")
            command = [CXX, *flags, "-c", str(source), "-o", str(part)]
            waiting.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), part, target))
        if len(waiting) == 2:
            _finish(*waiting.pop(0))
    for job in waiting:
        _finish(*job)
    library = BUILD / f"libptx-{_digest(objects)}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}.tmp")
        _run([CXX, "-shared", *objects, "-o", part, "-Wl,-soname," + library.name])
        part.replace(library)
    return library


def _finish(job: subprocess.Popen[str], part: Path, target: Path) -> None:
    _, text = job.communicate()
    if job.returncode:
        raise RuntimeError(text)
    part.replace(target)


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_path()), mode=ctypes.RTLD_GLOBAL)
    lib.ptx_load.restype = ctypes.c_void_p
    lib.ptx_defaults.restype = _Options
    for name in ("ptx_error", "ptx_kernels", "ptx_params", "ptx_counts", "ptx_launches"):
        getattr(lib, name).restype = ctypes.c_char_p
    return lib


def compile_ptx(source: Path, arch: str = "sm_80", flags: Sequence[str] = ()) -> str:
    """PTX of a .cu file; kept in build/ptx as long as neither it nor a header of csrc or its folder changes."""
    target = BUILD / f"{source.stem}-{arch}-{_cuda_digest([source], arch, *flags)}.ptx"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.ptx")
        include = [f"-I{ROOT / 'csrc'}", f"-I{source.parent}"]
        _run([NVCC, "-std=c++17", "-O3", f"-arch={arch}", "-ptx", *include, *flags, source, "-o", part])
        part.replace(target)
    return target.read_text(encoding="utf-8")


def launchers(sources: Sequence[Path], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The extern "C" launchers of .cu files as a library whose CUDA runtime is the stand-in."""
    parts = []
    for source in sources:
        part = BUILD / f"{source.stem}-{_cuda_digest([source], *flags)}.o"
        parts.append(part)
        if not part.exists():
            part.parent.mkdir(parents=True, exist_ok=True)
            arch = ["-gencode", "arch=compute_80,code=compute_80", "--no-compress", "-cudart", "none"]
            include = [f"-I{ROOT / 'csrc'}", f"-I{source.parent}", "-Xcompiler", "-fPIC"]
            fresh = part.with_suffix(f".{os.getpid()}.o")
            _run([NVCC, "-std=c++17", "-O3", *arch, *include, *flags, "-c", source, "-o", fresh])
            fresh.replace(part)
    target = BUILD / f"lib{sources[0].stem}-{_digest(parts, library_path().name)}.so"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        _run([CXX, "-shared", *parts, library_path(), f"-Wl,-rpath,{BUILD}", "-Wl,-z,defs", "-o", fresh])
        fresh.replace(target)
    library()
    return ctypes.CDLL(str(target))


def _cuda_digest(sources: Sequence[Path], *more: str) -> str:
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    for source in sources:
        headers += [*source.parent.glob("*.h"), *source.parent.glob("*.cuh")]
    return _digest([*sources, *set(headers)], NVCC or "", *more)


# --- memory ---


def _span(array: Any) -> tuple[int, int]:
    """Address and bytes of a torch tensor or numpy array, strides included."""
    if hasattr(array, "data_ptr"):
        if array.numel() == 0:
            return array.data_ptr(), 0
        last = sum((n - 1) * s for n, s in zip(array.shape, array.stride()))
        return array.data_ptr(), (last + 1) * array.element_size()
    assert array.flags.c_contiguous, "numpy arrays must be contiguous"
    return array.ctypes.data, array.nbytes


@contextmanager
def buffers(**arrays: Any) -> Iterator[None]:
    """Makes arrays (const(x): read-only) known as global memory; everything else is out of bounds."""
    lib, known = library(), []
    try:
        for name, value in arrays.items():
            base, size = _span(value.array if isinstance(value, const) else value)
            if size:
                _check(
                    lib.ptx_buffer(
                        ctypes.c_void_p(base),
                        ctypes.c_size_t(size),
                        not isinstance(value, const),
                        name.encode(),
                    )
                )
                known.append(base)
        yield
    finally:
        for base in known:
            lib.ptx_forget(ctypes.c_void_p(base))


# --- running ---


def error() -> str:
    return library().ptx_error().decode()


def _check(code: int) -> None:
    if code:
        raise Fault(error())


def options(landing: str = "early", seed: int = 0, **more: int) -> Any:
    o = library().ptx_defaults()
    o.landing, o.seed = LANDINGS.index(landing), seed
    for name, value in more.items():
        assert hasattr(o, name), name
        setattr(o, name, value)
    return o


def _triple(n: int | Sequence[int]) -> Any:
    sizes = [n] if isinstance(n, int) else list(n)
    return (ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes)))


class Module:
    """The kernels of one PTX text."""

    def __init__(self, text: str) -> None:
        self.handle = ctypes.c_void_p(library().ptx_load(text.encode()))
        if not self.handle:
            raise Fault(error())

    @property
    def kernels(self) -> list[str]:
        return library().ptx_kernels(self.handle).decode().split()

    def find(self, part: str) -> str:
        """The one kernel whose (mangled) name contains `part`."""
        found = [name for name in self.kernels if part in name]
        assert len(found) == 1, f"{part!r}: {found or self.kernels}"
        return found[0]

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        threads: int | Sequence[int],
        args: Sequence[Any],
        **how: Any,
    ) -> None:
        """Runs a kernel. Arrays among the arguments are buffers meanwhile. how: shared, options()."""
        shared = how.pop("shared", 0)
        name = self.find(kernel)
        sizes = [int(n) for n in library().ptx_params(self.handle, name.encode()).split()]
        assert len(sizes) == len(args), f"{name} takes {len(sizes)} arguments"
        packed, arrays = [], {}
        for i, (value, size) in enumerate(zip(args, sizes)):
            plain = value.array if isinstance(value, const) else value
            if hasattr(plain, "data_ptr") or hasattr(plain, "ctypes"):
                packed.append(ctypes.c_uint64(_span(plain)[0]))
                arrays[f"argument_{i}"] = value
            elif isinstance(plain, float):
                packed.append(ctypes.c_float(plain) if size == 4 else ctypes.c_double(plain))
            elif isinstance(plain, bytes):
                packed.append(ctypes.create_string_buffer(plain, size))
            else:
                packed.append(
                    {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}[size](plain)
                )
        pointers = (ctypes.c_void_p * len(packed))(*[ctypes.addressof(p) for p in packed])
        o = options(**how)
        with buffers(**arrays):
            _check(
                library().ptx_launch(
                    self.handle,
                    name.encode(),
                    _triple(grid),
                    _triple(threads),
                    shared,
                    pointers,
                    ctypes.byref(o),
                )
            )

    def counts(self, kernel: str) -> list[tuple[int, int, str]]:
        """(executions, line, text) of each instruction, over all launches."""
        return _counts(self.handle, self.find(kernel))


def _counts(handle: Any, kernel: str) -> list[tuple[int, int, str]]:
    lines = library().ptx_counts(handle, kernel.encode()).decode().splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return [(int(n), int(line), text) for n, line, text in rows]


def load(text: str) -> Module:
    return Module(text)


# --- stand-in ---


def set_options(**how: Any) -> None:
    """Options of the launches that come through the stand-in, until ptx_reset."""
    library().ptx_set_options(ctypes.byref(options(**how)))


def launched_counts(kernel: str) -> list[tuple[int, int, str]]:
    """Module.counts of a kernel that the stand-in has run, by its full name."""
    return _counts(None, kernel)
