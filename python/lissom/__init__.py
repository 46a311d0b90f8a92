# SPDX-License-Identifier: Apache-2.0
"""lissom: foundation models made lean and fast.

Public names load on first use, the native library with the first of them: `import torch` imports this package
(see lissom._autoload), and must not fail when the library does not fit the torch that is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_LAZY = {
    "prune": "lissom.pruning",
    "sparsify": "lissom.nn",
    "save": "lissom.hf.save",
    "compress": "lissom.run",
}
_MODULES = (
    "benchmark",
    "evaluation",
    "hf",
    "models",
    "nn",
    "ops",
    "pruning",
    "reference",
    "reporting",
    "testing",
)

__all__ = [
    "build_info",
    "compress",
    "cpu_info",
    "cpu_isa",
    "cuda_info",
    "prune",
    "save",
    "set_cpu_isa",
    "sparsify",
]

if TYPE_CHECKING:
    from lissom.hf.save import save
    from lissom.nn.sparsify import sparsify
    from lissom.pruning import prune
    from lissom.run import compress


def _library() -> Any:
    import torch  # its libraries must be loaded before ours

    try:
        return importlib.import_module("lissom._C")
    except ImportError as error:
        if "undefined symbol" not in str(error):
            raise
        raise ImportError(
            f"lissom was built with another version of torch than this one, {torch.__version__}; install lissom "
            f"again in this environment, so that it is built with its torch ({error})"
        ) from error


def build_info() -> dict[str, Any]:
    """Versions that the native library was built with: `torch`, `compiler`, `cxx`, `cuda` (None without CUDA kernels).

    >>> import lissom
    >>> sorted(lissom.build_info())
    ['compiler', 'cuda', 'cxx', 'torch']
    """
    return dict(_library().build_info())


def cuda_info() -> dict[str, Any]:
    """What the CUDA kernels were compiled for and what can run them: `architectures`, `toolkit`, number of `devices`,
    and `trouble`, the reason why there is none (no CUDA kernels in this build, no driver...), or None.

    >>> import lissom
    >>> (lissom.cuda_info()["devices"] > 0) == (lissom.cuda_info()["trouble"] is None)
    True
    """
    return dict(_library().cuda_info())


def cpu_info() -> dict[str, Any]:
    """What the kernels know of this CPU: `model`, `detected_isa`, `isa` in use, `core` (row of the kernel table),
    `core_measured`, and for each family the path by dtype and number of tokens.

    >>> import lissom
    >>> sorted(lissom.cpu_info()["sparse24"])
    ['bfloat16', 'float16', 'float32', 'int8']
    """
    return dict(_library().cpu_info())


def cpu_isa() -> str:
    """The tier in use: `portable`, `avx2`, `avx512`, `avx512x` or `amx`.

    >>> import lissom
    >>> lissom.cpu_isa() in ("portable", "avx2", "avx512", "avx512x", "amx")
    True
    """
    return str(_library().cpu_isa())


def set_cpu_isa(name: str) -> None:
    """Switches the tier inside this process; LISSOM_CPU_ISA caps it from the start.

    Raises:
        ValueError: unknown name, or a tier that this CPU lacks.

    >>> import lissom
    >>> lissom.set_cpu_isa("portable"); lissom.cpu_isa()
    'portable'
    """
    _library().set_cpu_isa(name)


def __getattr__(name: str) -> Any:
    if name == "_C":  # `from lissom import _C` asks here first
        return _library()
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"lissom.{name}")
    raise AttributeError(f"module 'lissom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_MODULES])
