# SPDX-License-Identifier: Apache-2.0
"""The torch side of sparse24 on CUDA, run without a GPU: cuda/sparse24_host.cpp, registered for CPU tensors under
another name, over the real launchers, the stand-in runtime and the PTX that nvcc made. Three places are changed on
the way: the name, the stream and the number of the device.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import interpreter
import pytest
import torch
from interpreter import BUILD, CXX, ROOT, launchers

from lissom import ops
from lissom.reference import sparse24 as twin
from lissom.testing import random_sparse24

SPARSE24 = ROOT / "csrc" / "sparse24"
KERNELS = [ROOT / "csrc/core/cuda/device.cu"]
KERNELS += [
    SPARSE24 / "cuda" / f"{name}.cu" for name in ("format", "pack", "mask_mm", "grad_input", "gemm", "gemv")
]
HALVES = (torch.bfloat16, torch.float16)
STREAM = 0x5EED0
CHANGES = {
    ROOT / "csrc/schemas.cpp": {"TORCH_LIBRARY(lissom, m)": "TORCH_LIBRARY(lissom_standin, m)"},
    SPARSE24 / "cuda/sparse24_host.cpp": {
        "TORCH_LIBRARY_IMPL(lissom, CUDA, m)": "TORCH_LIBRARY_IMPL(lissom_standin, CPU, m)",
        "c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle()": (
            f"reinterpret_cast<void*>(intptr_t{{{STREAM}}})"
        ),
        "device_facts(device.index(), &asked)": "device_facts(0, &asked)",
    },
}


def build() -> Path:
    """The library of the changed host, kept as long as nothing of it changes."""
    kernels = Path(launchers(KERNELS)._name)
    headers = [*SPARSE24.glob("*.h"), *(SPARSE24 / "cuda").glob("*.h"), *(ROOT / "csrc/core").rglob("*.h")]
    key = interpreter._digest([*CHANGES, *headers, Path(__file__)], torch.__version__, kernels.name)
    target = BUILD / f"libhost-{key}.so"
    if target.exists():
        return target
    folder = Path(torch.__file__).parent
    include = [f"-I{ROOT / 'csrc'}", f"-isystem{folder / 'include'}"]
    include += [f"-isystem{folder / 'include/torch/csrc/api/include'}"]
    copies = []
    for source, changes in CHANGES.items():
        text = source.read_text(encoding="utf-8")
        for old, new in changes.items():
            assert text.count(old) == 1, f"{source.name} has not one {old!r}"
            text = text.replace(old, new)
        copies.append(BUILD / f"standin-{key}-{source.name}")
        copies[-1].write_text(text, encoding="utf-8")
    fresh = target.with_suffix(".tmp")
    libraries = [f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{BUILD}", kernels]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    interpreter._run([CXX, *flags, *include, *copies, *libraries, "-o", fresh])
    return fresh.replace(target)


@pytest.fixture(scope="module")
def library(nvcc):
    torch.ops.load_library(str(build()))
    return torch.ops.lissom_standin


@pytest.fixture
def cuda(library):
    """The operators; all of this process's memory is the device's."""
    lib = interpreter.library()
    base = 1 << 12
    lib.ptx_set_options(ctypes.byref(interpreter.options("late", 1, global_shadow=0)))
    assert lib.ptx_buffer(ctypes.c_void_p(base), ctypes.c_size_t((1 << 47) - base), 1, b"everything") == 0
    yield library
    lib.ptx_forget_all()


def kernels() -> list[str]:
    """Of each launch since the test began, all on the stream that was asked for."""
    lines = [line.split("\t") for line in interpreter.library().ptx_launches().decode().splitlines()]
    assert {int(line[4], 0) for line in lines} <= {STREAM}
    return [re.sub(r"^_ZN6lissom8sparse24\d*", "", line[0]) for line in lines]


def exact(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Multiples of 1/64 in [-1, 1]: sums of products are exact in float32."""
    return (torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(seed)) / 64).to(dtype)


def problem(n: int, k: int, dtype: torch.dtype):
    values, meta = twin.compress(exact(n, k, dtype=dtype, seed=3), pattern="magnitude")
    return values, meta, twin.pack(values, meta, None if dtype == torch.float32 else "sm80-v1")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("n", "k"), [(0, 8), (20, 36), (33, 128), (3, 0)])
def test_forms(cuda, n, k, dtype):
    w = random_sparse24(n, k, dtype=dtype, full=0.7)
    form = ops.sparse24_compress(w)
    unaligned = torch.cat((w.flatten()[:1], w.flatten()))[1:].view(n, k) if n * k else w
    for source in (w, unaligned):
        assert all(map(same, cuda.sparse24_compress(source), form))
    assert cuda.sparse24_check(w).tolist() == [1, -1, -1]
    assert cuda.sparse24_check_meta(form[1], k).tolist() == [1, -1, -1]
    assert same(cuda.sparse24_decompress(*form, k), w)
    dense = exact(n, k, dtype=dtype)
    wanted = ops.sparse24_compress(dense, pattern="magnitude")
    assert all(map(same, cuda.sparse24_compress(dense.t().contiguous().t(), pattern="magnitude"), wanted))
    if dtype != torch.float32:
        packed = cuda.sparse24_pack(*form)
        assert same(packed, ops.sparse24_pack(*form, "sm80-v1"))
        assert same(packed, cuda.sparse24_pack(*form, "sm80-v1"))
        assert all(map(same, cuda.sparse24_unpack(packed, n, k, dtype=dtype), form))


LAYOUTS = {
    "whole": lambda m, k, t: exact(m, k, dtype=t),
    "rows apart": lambda m, k, t: exact(m, 2 * k + 3, dtype=t)[:, 1 : k + 1],
    "transposed": lambda m, k, t: exact(k, m, dtype=t).t(),
    "one row for all": lambda m, k, t: exact(1, k, dtype=t).expand(m, k),
    "leading": lambda m, k, t: exact(m, 2, k, dtype=t).transpose(0, 1),
    "unaligned": lambda m, k, t: exact(m * k + 1, dtype=t)[1:].view(m, k),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 33, 36), (20, 40, 132)])
def test_linear(cuda, layout, m, n, k):
    dtype = HALVES[(m + len(layout)) % 2]
    values, meta, packed = problem(n, k, dtype)
    x = LAYOUTS[layout](m, k, dtype)
    native = twin.pack(values, meta)
    for bias, residual, act, out in (
        (None, None, "none", None),
        (exact(n), exact(*x.shape[:-1], n + 5, dtype=dtype)[..., 2 : n + 2], "relu", None),
        (exact(2 * n, dtype=dtype)[::2], exact(*x.shape[:-1], n), "none", torch.float32),
    ):
        y = cuda.sparse24_linear(x, packed, n, k, bias, act, residual, out_dtype=out)
        assert same(y, twin.linear(x, native, n, k, bias, act, residual, out_dtype=out))
    assert same(
        cuda.sparse24_linear_values(x, values, meta, exact(n)), twin.linear(x, native, n, k, exact(n))
    )
    started = " ".join(kernels())
    assert ("gemv" in started) == (x.numel() // k <= 4)
    assert ("sparse24_gemm" in started) == (x.numel() // k > 4)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 20, 32), (3, 0, 32), (3, 20, 0), (9, 20, 0), (0, 0, 0)])
def test_nothing_to_do(cuda, m, n, k):
    values, meta, packed = problem(n, k, torch.bfloat16)
    x, dy, bias = exact(m, k, dtype=torch.bfloat16), exact(m, n, dtype=torch.bfloat16), exact(n)
    assert same(cuda.sparse24_linear(x, packed, n, k, bias), bias.bfloat16().expand(m, n).contiguous())
    assert same(cuda.sparse24_grad_input(dy, packed, n, k), torch.zeros(m, k, dtype=torch.bfloat16))
    assert same(cuda.sparse24_mask_mm(dy, x, meta), torch.zeros_like(values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients(cuda, layout, dtype):
    m, n, k = 70, 36, 68
    values, meta, packed = problem(n, k, dtype)
    x, dy = LAYOUTS[layout](m, k, dtype), LAYOUTS[layout](m, n, dtype)
    assert same(
        cuda.sparse24_grad_input(dy, packed, n, k),
        (dy.float() @ twin.decompress(values, meta, k).float()).to(dtype),
    )
    assert same(cuda.sparse24_mask_mm(dy, x, meta), twin.mask_mm(dy, x, meta))


def test_float32_is_canonical_and_says_so(cuda, capfd):
    values, meta, _ = problem(20, 36, torch.float32)
    x, dy = exact(3, 36), exact(3, 20)
    torch.set_warn_always(True)
    try:
        y = cuda.sparse24_linear_values(x, values, meta, exact(20))
    finally:
        torch.set_warn_always(False)
    assert "no tensor cores for 2:4 in float32" in capfd.readouterr().err
    assert torch.equal(y, twin.linear_values(x, values, meta, exact(20)))
    assert torch.equal(cuda.sparse24_mask_mm(dy, x, meta), twin.mask_mm(dy, x, meta))
    assert any("gather_kernel" in name for name in kernels())
    with pytest.raises(
        TypeError, match=r"sm80-v1 holds bfloat16, float16 and int8.*sparse24_linear_values takes float32"
    ):
        cuda.sparse24_pack(values, meta)


def test_unchecked_metadata_gives_nan_and_no_wait(cuda):
    """In training nothing is read back: a forged nibble shows in the numbers."""
    values, meta, _ = problem(20, 36, torch.bfloat16)
    meta[7, 1] = 0x4F
    x, dy = exact(9, 36, dtype=torch.bfloat16), exact(9, 20, dtype=torch.bfloat16)
    y = cuda.sparse24_linear_values(x, values, meta)
    assert y.isnan().any(0).nonzero().flatten().tolist() == [7]
    assert cuda.sparse24_mask_mm(dy, x, meta).isnan().nonzero().tolist() == [[7, 4], [7, 5]]
    assert not any("check" in name for name in kernels())


W = random_sparse24(20, 36, dtype=torch.bfloat16)
VALUES, META = ops.sparse24_compress(W)
PACKED = ops.sparse24_pack(VALUES, META, "sm80-v1")
X, DY = torch.ones(3, 36).bfloat16(), torch.ones(3, 20).bfloat16()
CORRUPT = META.clone()
CORRUPT[11, 2] = 0x40


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.sparse24_compress(torch.cat((W, torch.ones(1, 36).bfloat16()))),
        lambda o: o.sparse24_compress(W[:, :6]),
        lambda o: o.sparse24_compress(W, pattern="2:4"),
        lambda o: o.sparse24_decompress(VALUES, CORRUPT, 36),
        lambda o: o.sparse24_pack(VALUES, CORRUPT),
        lambda o: o.sparse24_pack(VALUES, META, "sm90"),
        lambda o: o.sparse24_check_meta(META, 44),
        lambda o: o.sparse24_mask_mm(DY, X.half(), META),
        lambda o: o.sparse24_mask_mm(DY, X, META[1:]),
        lambda o: o.sparse24_linear_values(X[:, 4:], VALUES, META),
    ],
)
def test_refusals_are_those_of_the_cpu(cuda, call):
    words = []
    for operators in (torch.ops.lissom, cuda):
        with pytest.raises((ValueError, TypeError)) as refused:
            call(operators)
        words.append((type(refused.value), str(refused.value)))
    assert words[0] == words[1]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda o: o.sparse24_pack(VALUES, META, "cpu-v1"),
            ValueError,
            "layout of the CPU; on CUDA leave target out",
        ),
        (
            lambda o: o.sparse24_linear(X, ops.sparse24_pack(VALUES, META), 20, 36),
            RuntimeError,
            "packed again on the device",
        ),
        (lambda o: o.sparse24_linear(X, PACKED, 20, 100), RuntimeError, "sm80-v1 form of N=20, K=100"),
        (
            lambda o: o.sparse24_linear(X.half(), PACKED, 20, 36),
            TypeError,
            "one dtype; got Half and BFloat16",
        ),
        (lambda o: o.sparse24_linear(X, PACKED[:-16], 20, 36), RuntimeError, r"got \d+ bytes"),
        (lambda o: o.sparse24_grad_input(DY.half(), PACKED, 20, 36), TypeError, "one dtype"),
        (lambda o: o.sparse24_grad_input(X, PACKED, 20, 36), ValueError, r"dy must be \[..., N=20\]"),
        (lambda o: o.sparse24_unpack(PACKED, -1, 36), RuntimeError, "no packed weight has N=-1"),
        (lambda o: o.sparse24_linear(X, PACKED, 20, 36, act="swish"), ValueError, "none, relu, gelu"),
    ],
)
def test_refusal(cuda, call, error, words):
    with pytest.raises(error, match=rf"^lissom::sparse24_\w+: (.|\n)*{words}"):
        call(cuda)
    assert kernels() == []


@pytest.mark.parametrize("call", ["linear", "pack", "check"])
def test_an_error_of_the_launch_is_raised(cuda, call):
    interpreter.library().ptx_inject(b"cudaLaunchKernel", 1, 719)
    with pytest.raises(
        RuntimeError, match=rf"^lissom::sparse24_{call}: CUDA could not start the kernel .*\(error 719\)"
    ):
        {
            "linear": lambda: cuda.sparse24_linear(X, PACKED, 20, 36),
            "pack": lambda: cuda.sparse24_pack(VALUES, META),
            "check": lambda: cuda.sparse24_check(W),
        }[call]()
