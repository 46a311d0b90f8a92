# SPDX-License-Identifier: Apache-2.0
"""What every sparse24 operator refuses, with which exception and words; what damaged buffers can and cannot do."""

from __future__ import annotations

import struct

import pytest
import torch

from lissom import ops
from lissom.reference import sparse24 as twin
from lissom.testing import random_sparse24

N, K = 20, 40
W = random_sparse24(N, K)
VALUES, META = ops.sparse24_compress(W)
PACKED = ops.sparse24_pack(VALUES, META)
X = torch.ones(3, K)
DY = torch.ones(3, N)


def header(**changes: object) -> torch.Tensor:
    """PACKED with another header."""
    fields = {"magic": b"LISSOM24", "version": 1, "dtype": 0, "n": N, "k": K} | changes
    damaged = PACKED.clone()
    head = struct.pack("<8sIiqq", *fields.values())
    damaged[: len(head)] = torch.tensor(list(head), dtype=torch.uint8)
    return damaged


def linear(x=X, packed=PACKED, n=N, k=K, **options):
    return ops.sparse24_linear(x, packed, n, k, **options)


# what is wrong -> (call, exception, words that must be in the message)
CASES = {
    "compress 1-D": (lambda: ops.sparse24_compress(W[0]), ValueError, r"w must be \[N, K\].*\[40\]"),
    "compress 3-D": (
        lambda: ops.sparse24_compress(W[None]),
        ValueError,
        r"w must be \[N, K\].*\[1, 20, 40\]",
    ),
    "compress K": (lambda: ops.sparse24_compress(W[:, :6]), ValueError, r"multiple of 4.*\[20, 6\]"),
    "compress float64": (
        lambda: ops.sparse24_compress(W.double()),
        TypeError,
        r"float32, bfloat16, float16 or int8.*ouble",
    ),
    "compress int32": (
        lambda: ops.sparse24_compress(W.to(torch.int32)),
        TypeError,
        "float32, bfloat16, float16 or int8; got Int",
    ),
    "compress dense": (
        lambda: ops.sparse24_compress(torch.cat((W, torch.ones(1, K)))),
        ValueError,
        r"not 2:4 sparse: row 20, quad 0 \(columns 0..3\) has 4 non-zeros.*magnitude",
    ),
    "compress pattern": (
        lambda: ops.sparse24_compress(W, pattern="2:4"),
        ValueError,
        r'"auto" or "magnitude".*2:4',
    ),
    "check K": (lambda: ops.sparse24_check(W[:, :6]), ValueError, "multiple of 4"),
    "check int": (lambda: ops.sparse24_check(W.int()), TypeError, "float32, bfloat16, float16 or int8"),
    "check_meta dtype": (
        lambda: ops.sparse24_check_meta(META.int(), K),
        TypeError,
        "meta must be uint8; got",
    ),
    "check_meta columns": (lambda: ops.sparse24_check_meta(META, K + 8), ValueError, r"\[20, 5\] and K=48"),
    "check_meta K": (lambda: ops.sparse24_check_meta(META, 38), ValueError, r"multiple of 4.*K=38"),
    "check_meta negative K": (lambda: ops.sparse24_check_meta(META[:, :0], -8), ValueError, r"K=-8"),
    "decompress K": (
        lambda: ops.sparse24_decompress(VALUES, META, K + 4),
        ValueError,
        r"\[20, 20\] and K=44",
    ),
    "decompress K % 4": (
        lambda: ops.sparse24_decompress(VALUES[:, :1], META, 2),
        ValueError,
        "multiple of 4",
    ),
    "decompress meta rows": (lambda: ops.sparse24_decompress(VALUES, META[1:], K), ValueError, r"\[19, 5\]"),
    "decompress meta dtype": (lambda: ops.sparse24_decompress(VALUES, META.int(), K), TypeError, "uint8"),
    "decompress int": (
        lambda: ops.sparse24_decompress(VALUES.int(), META, K),
        TypeError,
        "float32, bfloat16, float16 or int8",
    ),
    "pack target": (
        lambda: ops.sparse24_pack(VALUES, META, "sm80"),
        ValueError,
        r'target must be "cpu-v1".*sm80',
    ),
    "pack 1-D": (
        lambda: ops.sparse24_pack(VALUES[0], META),
        ValueError,
        r"values must be \[N, K/2\].*\[20\]",
    ),
    "pack odd": (lambda: ops.sparse24_pack(VALUES[:, :3], META), ValueError, "multiple of 4"),
    "pack meta": (
        lambda: ops.sparse24_pack(VALUES, META[:, :4]),
        ValueError,
        r"ceil\(K/8\)=5\]; got \[20, 4\]",
    ),
    "pack float64": (
        lambda: ops.sparse24_pack(VALUES.double(), META),
        TypeError,
        "float32, bfloat16, float16 or int8",
    ),
    "unpack target": (lambda: ops.sparse24_unpack(PACKED, N, K, "sm90"), ValueError, r'"cpu-v1".*sm90'),
    "unpack dtype": (
        lambda: ops.sparse24_unpack(PACKED, N, K, dtype=torch.half),
        TypeError,
        "holds Float; got",
    ),
    "unpack N": (lambda: ops.sparse24_unpack(PACKED, 21, K), RuntimeError, "N=20, K=40; got N=21, K=40"),
    "linear K": (lambda: linear(X[:, :36]), ValueError, r"x must be \[..., K=40\]; got \[3, 36\]"),
    "linear 0-D": (lambda: linear(torch.ones(())), ValueError, r"x must be \[..., K=40\]; got \[\]"),
    "linear dtype": (lambda: linear(X.bfloat16()), TypeError, "BFloat16 and Float; cast x"),
    "linear int": (lambda: linear(X.int()), TypeError, "one dtype"),
    "linear N": (lambda: linear(n=24), RuntimeError, "holds a weight of N=20, K=40; got N=24, K=40"),
    "linear K of packed": (lambda: linear(torch.ones(3, 44), k=44), RuntimeError, "got N=20, K=44"),
    "linear bias size": (
        lambda: linear(bias=torch.ones(19)),
        ValueError,
        r"bias must be \[N=20\]; got \[19\]",
    ),
    "linear bias 2-D": (
        lambda: linear(bias=torch.ones(1, N)),
        ValueError,
        r"bias must be \[N=20\]; got \[1, 20\]",
    ),
    "linear bias dtype": (
        lambda: linear(bias=torch.ones(N).half()),
        TypeError,
        "bias must be float32 or x's dtype",
    ),
    "linear act": (lambda: linear(act="swish"), ValueError, 'none, relu, gelu, gelu_tanh, silu; got "swish"'),
    "linear residual": (
        lambda: linear(residual=DY[:2]),
        ValueError,
        r"residual must have y's shape \[3, 20\]",
    ),
    "linear residual dtype": (
        lambda: linear(residual=DY.half()),
        TypeError,
        "residual must have y's dtype Float",
    ),
    "linear out_dtype": (
        lambda: linear(out_dtype=torch.half),
        TypeError,
        "out_dtype must be float32 or x's dtype",
    ),
    "linear_values K": (
        lambda: ops.sparse24_linear_values(X[:, 4:], VALUES, META),
        ValueError,
        r"K=40\]; got",
    ),
    "linear_values 1-D": (lambda: ops.sparse24_linear_values(X, VALUES[0], META), ValueError, "N, K/2"),
    "grad_input N": (
        lambda: ops.sparse24_grad_input(X, PACKED, N, K),
        ValueError,
        r"dy must be \[..., N=20\]",
    ),
    "grad_input dtype": (lambda: ops.sparse24_grad_input(DY.half(), PACKED, N, K), TypeError, "one dtype"),
    "mask_mm lead": (
        lambda: ops.sparse24_mask_mm(DY[:2], X, META),
        ValueError,
        r"leading dimensions.*\[2, 20\]",
    ),
    "mask_mm dtype": (
        lambda: ops.sparse24_mask_mm(DY.half(), X, META),
        TypeError,
        "one dtype; got Half and Float",
    ),
    "mask_mm meta": (
        lambda: ops.sparse24_mask_mm(DY, X, META[1:]),
        ValueError,
        r"meta must be \[N=20, .*\[19, 5\]",
    ),
    "mask_mm meta dtype": (lambda: ops.sparse24_mask_mm(DY, X, META.int()), TypeError, "meta must be uint8"),
    "mask_mm K": (lambda: ops.sparse24_mask_mm(DY, X[:, :38], META), ValueError, "multiple of 4"),
    "mask_mm 0-D": (lambda: ops.sparse24_mask_mm(DY[0, 0], X[0, 0], META), ValueError, "leading dimensions"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusal_names_operator_and_sizes(case):
    call, error, words = CASES[case]
    operator = "sparse24_linear" if case.startswith("linear_values K") else f"sparse24_{case.split()[0]}"
    with pytest.raises(error, match=rf"^lissom::{operator}: (.|\n)*{words}"):
        call()


FOREIGN = {
    "empty": (PACKED[:0], "contiguous uint8 vector"),
    "no room for a header": (PACKED[:63], "contiguous uint8 vector"),
    "header only": (PACKED[:64], "damaged.*need 4416 bytes; got 64"),
    "truncated by a byte": (PACKED[:-1], "damaged.*need 4416 bytes; got 4415"),
    "a byte too long": (torch.cat((PACKED, PACKED[:1])), "damaged.*got 4417"),
    "zeros": (torch.zeros_like(PACKED), "no cpu-v1 header"),
    "two-dimensional": (PACKED.view(2, -1), "contiguous uint8 vector"),
    "not contiguous": (torch.stack((PACKED, PACKED), 1)[:, 0], "contiguous uint8 vector"),
    "other type": (PACKED.to(torch.int8), "contiguous uint8 vector"),
    "floats": (PACKED.view(torch.float32), "contiguous uint8 vector"),
    "other magic": (header(magic=b"MARLIN24"), "no cpu-v1 header"),
    "later version": (header(version=2), "no cpu-v1 header of version 1"),
    "unknown dtype": (header(dtype=4), "no cpu-v1 header"),
    "int8": (header(dtype=3), "damaged"),
    "negative dtype": (header(dtype=-1), "no cpu-v1 header"),
    "other dtype": (header(dtype=1), "damaged"),
    "other N": (header(n=36), "holds a weight of N=36"),
    "other K": (header(k=44), "K=44"),
    "negative N": (header(n=-20), "N=-20"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("operator", ["linear", "grad_input", "unpack"])
def test_foreign_packed_buffer(name, operator):
    packed, words = FOREIGN[name]
    with pytest.raises(RuntimeError, match=rf"lissom::sparse24_{operator}: .*{words}"):
        {
            "linear": lambda: linear(packed=packed),
            "grad_input": lambda: ops.sparse24_grad_input(DY, packed, N, K),
            "unpack": lambda: ops.sparse24_unpack(packed, N, K),
        }[operator]()


@pytest.mark.parametrize(
    ("n", "k"), [(2**62, 2**62), (-20, -40), (2**31, 2**31), (0, 2**60), (2**62, 0), (20, 42)]
)
def test_sizes_in_a_header_are_not_believed(n, k):
    """A forged header that agrees with the arguments must not overflow into an accepted size."""
    with pytest.raises(RuntimeError, match="sparse24_unpack: packed is damaged"):
        ops.sparse24_unpack(header(n=n, k=k), n, k)


def test_a_size_that_wraps_around_is_not_believed():
    """2^32 panels of 2^26 records of 17 * 2^6 bytes are 0 modulo 2^64: a bare header would seem complete."""
    with pytest.raises(RuntimeError, match="sparse24_unpack: packed is damaged: its header says"):
        ops.sparse24_unpack(header(n=2**36, k=2**31)[:64], 2**36, 2**31)


def test_forged_metadata_in_a_packed_buffer_stays_in_bounds(kernel):
    """Kernels index with two-bit fields only: any bytes behind a right header give numbers, never a fault."""
    values, meta = ops.sparse24_compress(random_sparse24(37, 72, dtype=kernel.dtype))
    packed = ops.sparse24_pack(values, meta)
    generator = torch.Generator().manual_seed(0)
    packed[64:] = torch.randint(0, 256, (packed.numel() - 64,), dtype=torch.uint8, generator=generator)
    x = torch.ones(70, 72, dtype=kernel.dtype)
    assert ops.sparse24_linear(x, packed, 37, 72).shape == (70, 37)
    assert ops.sparse24_grad_input(torch.ones(3, 37, dtype=kernel.dtype), packed, 37, 72).shape == (3, 72)
    values, meta = ops.sparse24_unpack(packed, 37, 72)
    with pytest.raises(ValueError, match="corrupt metadata"):
        ops.sparse24_decompress(values, meta, 72)


def test_refusal_leaves_inputs_alone():
    before = W.clone(), META.clone(), PACKED.clone()
    for call, error, _ in CASES.values():
        with pytest.raises(error):
            call()
    assert all(torch.equal(a, b) for a, b in zip(before, (W, META, PACKED), strict=True))


META_DEVICE = {
    "linear packed": lambda: linear(packed=PACKED.to("meta")),
    "linear x": lambda: linear(X.to("meta")),
    "linear bias": lambda: linear(bias=torch.ones(N, device="meta")),
    "linear residual": lambda: linear(residual=DY.to("meta")),
    "linear_values x": lambda: ops.sparse24_linear_values(X.to("meta"), VALUES, META),
    "linear_values values": lambda: ops.sparse24_linear_values(X, VALUES.to("meta"), META),
    "linear_values meta": lambda: ops.sparse24_linear_values(X, VALUES, META.to("meta")),
    "linear_values bias": lambda: ops.sparse24_linear_values(X, VALUES, META, torch.ones(N, device="meta")),
    "decompress meta": lambda: ops.sparse24_decompress(VALUES, META.to("meta"), K),
    "pack values": lambda: ops.sparse24_pack(VALUES.to("meta"), META),
    "grad_input packed": lambda: ops.sparse24_grad_input(DY, PACKED.to("meta"), N, K),
    "mask_mm meta": lambda: ops.sparse24_mask_mm(DY, X, META.to("meta")),
    "mask_mm dy": lambda: ops.sparse24_mask_mm(DY.to("meta"), X, META),
}


@pytest.mark.parametrize("case", META_DEVICE)
def test_mixed_devices_are_refused(case):
    """The dispatcher hands them to a fake kernel, whose result would be uninitialised memory."""
    with pytest.raises(RuntimeError, match=r"all tensors must be on one device; got .* on (cpu|meta), .* on"):
        META_DEVICE[case]()


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return value


# What the shape alone tells must be refused while tracing too; messages may be shorter there.
TRACED = {
    "compress": [(W[0],), (W[:, :6],), (W.double(),)],
    "check": [(W[:, :6],), (W.int(),)],
    "check_meta": [(META.int(), K), (META, K + 8), (META, 38)],
    "decompress": [
        (VALUES, META, K + 4),
        (VALUES, META[1:], K),
        (VALUES, META.int(), K),
        (VALUES.int(), META, K),
    ],
    "pack": [(VALUES, META, "sm80"), (VALUES[0], META), (VALUES[:, :3], META), (VALUES, META[:, :4])],
    "unpack": [(PACKED, N, K, "sm90"), (PACKED[:-1], N, K)],
    "linear": [
        (X[:, :36], PACKED, N, K),
        (X.int(), PACKED, N, K),
        (X, PACKED, 40, K),
        (X.bfloat16(), PACKED, N, K),
        (X, PACKED[:64], N, K),
        (X, PACKED.int(), N, K),
        (X, PACKED, N, K, DY[0, :19]),
        (X, PACKED, N, K, DY[0].half()),
        (X, PACKED, N, K, None, "swish"),
        (X, PACKED, N, K, None, "none", DY[:2]),
        (X, PACKED, N, K, None, "none", DY.half()),
    ],
    "linear_values": [(X[:, 4:], VALUES, META), (X, VALUES[0], META), (X, VALUES, META[1:])],
    "grad_input": [(X, PACKED, N, K), (DY.int(), PACKED, N, K), (DY, PACKED, N, K + 32)],
    "mask_mm": [(DY[:2], X, META), (DY.half(), X, META), (DY, X, META[1:]), (DY[0, 0], X[0, 0], META)],
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, cases in TRACED.items() for i in range(len(cases))]
)
def test_tracing_and_twin_refuse_what_the_kernel_refuses(name, index):
    arguments = TRACED[name][index]
    operator = getattr(torch.ops.lissom, f"sparse24_{name}")
    refused = (ValueError, TypeError, RuntimeError)
    dtype = {"dtype": torch.float32} if name == "unpack" else {}
    with pytest.raises(refused, match="lissom::sparse24_"):
        operator(*arguments)
    with pytest.raises(refused, match="lissom::sparse24_"):
        operator(*[on_meta(a) for a in arguments], **dtype)
    with pytest.raises(refused, match="lissom::sparse24_"):
        getattr(twin, name)(*arguments)


def test_unpack_without_dtype_cannot_be_traced():
    with pytest.raises(RuntimeError, match="pass dtype="):
        torch.ops.lissom.sparse24_unpack(PACKED.to("meta"), N, K)


def test_unknown_tier_and_path():
    import lissom

    with pytest.raises(ValueError, match=r"portable, avx2, avx512, avx512x, amx; got 'sse2'"):
        lissom.set_cpu_isa("sse2")
    with pytest.raises(ValueError, match="no path is called 'fast'"):
        lissom._C.force_path("fast")
