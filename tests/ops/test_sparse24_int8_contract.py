# SPDX-License-Identifier: Apache-2.0
"""What the int8 operators refuse and with which words; gradients, fake tensors, torch.compile, export."""

from __future__ import annotations

import struct

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from lissom import ops
from lissom.reference import sparse24 as twin
from lissom.reference import sparse24_int8 as twin_int8
from lissom.testing import random_sparse24


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)


def weight(n: int, k: int) -> torch.Tensor:
    return ops.sparse24_decompress(*ops.sparse24_compress(draw(n, k), pattern="magnitude"), k)


def packed_of(w: torch.Tensor, target: str | None = None) -> torch.Tensor:
    return ops.sparse24_pack(*ops.sparse24_compress(w), target)


N, K = 20, 40
W = weight(N, K)
VALUES, META = ops.sparse24_compress(W)
PACKED = packed_of(W)
X, SCALE_X, SCALE_W = draw(3, K), torch.rand(3) + 0.5, torch.rand(N) + 0.5
RESIDUAL = torch.ones(3, N)
OPERATOR = torch.ops.lissom.sparse24_linear_int8
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def given(**changes: object) -> dict[str, object]:
    """Right arguments, some of them changed."""
    right = {"x": X, "scale_x": SCALE_X, "packed": PACKED, "scale_w": SCALE_W, "N": N, "K": K}
    return right | changes


def header(**changes: object) -> torch.Tensor:
    fields = {"magic": b"LISSOM24", "version": 1, "dtype": 3, "n": N, "k": K} | changes
    damaged = PACKED.clone()
    head = struct.pack("<8sIiqq", *fields.values())
    damaged[: len(head)] = torch.tensor(list(head), dtype=torch.uint8)
    return damaged


REAL = ops.sparse24_pack(*ops.sparse24_compress(random_sparse24(N, K)))

# what is wrong -> (arguments, exception, words); those marked * only the header tells
CASES = {
    "x dtype": ({"x": X.float()}, TypeError, "x must be int8; got .*quantize_rows"),
    "x uint8": ({"x": X.to(torch.uint8)}, TypeError, "x must be int8"),
    "x K": ({"x": X[:, :36]}, ValueError, r"x must be \[..., K=40\]; got \[3, 36\]"),
    "x 0-D": ({"x": X[0, 0], "scale_x": SCALE_X[0]}, ValueError, r"x must be \[..., K=40\]; got \[\]"),
    "scale_x size": ({"scale_x": SCALE_X[:2]}, ValueError, r"leading shape of x, \[3\]; got \[2\]"),
    "scale_x one for all": ({"scale_x": SCALE_X[0]}, ValueError, r"leading shape of x, \[3\]; got \[\]"),
    "scale_x column": ({"scale_x": SCALE_X[:, None]}, ValueError, r"leading shape of x, \[3\]; got \[3, 1\]"),
    "scale_x dtype": ({"scale_x": SCALE_X.half()}, TypeError, "scale_x and scale_w must be float32"),
    "scale_w size": ({"scale_w": SCALE_W[1:]}, ValueError, r"scale_w must be \[N=20\]; got \[19\]"),
    "scale_w 2-D": ({"scale_w": SCALE_W[:, None]}, ValueError, r"scale_w must be \[N=20\]; got \[20, 1\]"),
    "scale_w dtype": ({"scale_w": SCALE_W.double()}, TypeError, "scale_x and scale_w must be float32"),
    "bias size": ({"bias": SCALE_W[1:]}, ValueError, r"bias must be \[N=20\]; got \[19\]"),
    "bias dtype": ({"bias": SCALE_W.half()}, TypeError, "bias must be float32"),
    "residual shape": ({"residual": RESIDUAL[:2]}, ValueError, r"y's shape \[3, 20\]; got \[2, 20\]"),
    "residual dtype": ({"residual": RESIDUAL.half()}, TypeError, "residual must have y's dtype"),
    "act": ({"act": "swish"}, ValueError, "none, relu, gelu, gelu_tanh, silu; got .swish"),
    "out_dtype": ({"out_dtype": torch.int8}, TypeError, "out_dtype must be float32, bfloat16 or float16"),
    "truncated": ({"packed": PACKED[:-1]}, RuntimeError, "damaged"),
    "empty": ({"packed": PACKED[:0]}, RuntimeError, "uint8 vector"),
    "N *": ({"N": 24, "scale_w": torch.ones(24)}, RuntimeError, "holds a weight of N=20, K=40; got N=24"),
    "float weight *": ({"packed": REAL}, TypeError, "packed must hold an int8 weight; got"),
    "sm80-v1 *": ({"packed": packed_of(W, "sm80-v1")}, RuntimeError, "sm80-v1, for CUDA"),
    "version *": ({"packed": header(version=2)}, RuntimeError, "no cpu-v1 header"),
    "unknown type *": ({"packed": header(dtype=4)}, RuntimeError, "no cpu-v1 header"),
    "other type *": ({"packed": header(dtype=1)}, RuntimeError, "damaged"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusal(case):
    changes, error, words = CASES[case]
    with pytest.raises(error, match=rf"^lissom::sparse24_linear_int8: (.|\n)*{words}"):
        ops.sparse24_linear_int8(**given(**changes))
    twin_names = {"N": "n", "K": "k"}
    with pytest.raises(error, match=r"^lissom::sparse24_linear_int8: "):
        twin_int8.linear_int8(**{twin_names.get(name, name): v for name, v in given(**changes).items()})
    if "*" not in case:
        traced = {name: on_meta(value) for name, value in given(**changes).items()}
        with pytest.raises(error, match=r"^lissom::sparse24_linear_int8: "):
            ops.sparse24_linear_int8(**traced)


def on_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", ["x", "scale_x", "packed", "scale_w", "bias", "residual"])
def test_mixed_devices(name):
    arguments = given(bias=SCALE_W, residual=RESIDUAL)
    with pytest.raises(RuntimeError, match=r"all tensors must be on one device; got .* on (cpu|meta), "):
        ops.sparse24_linear_int8(**arguments | {name: arguments[name].to("meta")})


FLOATS = {
    "linear": lambda: ops.sparse24_linear(X, PACKED, N, K),
    "linear of floats": lambda: ops.sparse24_linear(X.float(), PACKED, N, K),
    "linear_values": lambda: ops.sparse24_linear_values(X.float(), VALUES, META),
    "linear_values of integers": lambda: ops.sparse24_linear_values(X, VALUES, META),
    "grad_input": lambda: ops.sparse24_grad_input(RESIDUAL, PACKED, N, K),
    "mask_mm": lambda: ops.sparse24_mask_mm(draw(3, N), X, META),
}


@pytest.mark.parametrize("case", FLOATS)
def test_operators_of_floats_say_no(case):
    with pytest.raises(TypeError, match=rf"^lissom::sparse24_{case.split()[0]}: (.|\n)*(int8|Char)"):
        FLOATS[case]()
    with pytest.raises(TypeError, match=r"^lissom::sparse24_(linear|linear_values|grad_input|mask_mm): "):
        {
            "linear": lambda: twin.linear(X.float(), PACKED, N, K),
            "linear_values": lambda: twin.linear_values(X.float(), VALUES, META),
            "grad_input": lambda: twin.grad_input(RESIDUAL, PACKED, N, K),
            "mask_mm": lambda: twin.mask_mm(draw(3, N), X, META),
        }[case.split()[0]]()


def test_k_is_bounded_where_sums_would_leave_int32():
    most = twin.MOST_INT8_COLUMNS
    assert most // 2 * 128 * 128 < 2**31 <= (most + 4) // 2 * 128 * 128
    values, meta = ops.sparse24_compress(torch.zeros(1, most + 4, dtype=torch.int8))
    words = rf"sparse24_pack: an int8 weight may have K={most} at most.*; got K={most + 4}"
    for target in twin.TARGETS:
        for pack in (ops.sparse24_pack, twin.pack):
            with pytest.raises(ValueError, match=words):
                pack(values, meta, target)
        with pytest.raises(ValueError, match="an int8 weight may have K="):
            ops.sparse24_pack(values.to("meta"), meta.to("meta"), target)
        fits = ops.sparse24_compress(torch.zeros(1, most, dtype=torch.int8))
        assert ops.sparse24_pack(*fits, target).numel() > most // 2
    forged = header(k=most + 4)
    with pytest.raises(RuntimeError, match="damaged: its header says"):
        ops.sparse24_unpack(forged, N, most + 4)


def test_forged_bytes_give_numbers_and_no_fault(isa):
    packed = packed_of(weight(37, 72))
    generator = torch.Generator().manual_seed(0)
    packed[64:] = torch.randint(0, 256, (packed.numel() - 64,), dtype=torch.uint8, generator=generator)
    for m in (1, 70):
        y = ops.sparse24_linear_int8(draw(m, 72), torch.ones(m), packed, torch.ones(37), 37, 72)
        assert y.shape == (m, 37)


@pytest.mark.parametrize("quantize", [ops.quantize_rows, twin_int8.quantize_rows], ids=["kernel", "twin"])
def test_quantize_rows_refuses(quantize):
    for device in ("cpu", "meta"):
        for dtype in (torch.int32, torch.float64, torch.int8):
            with pytest.raises(
                TypeError, match=r"quantize_rows: x must be float32, bfloat16 or float16; got "
            ):
                quantize(torch.ones(2, 4, dtype=dtype, device=device))
        with pytest.raises(ValueError, match=r"quantize_rows: x must be \[..., K\]; got \[\]"):
            quantize(torch.ones((), device=device))


def test_rounding_has_no_gradient():
    q, scale = ops.quantize_rows(torch.randn(3, 8, requires_grad=True))
    assert not q.requires_grad
    with pytest.raises(RuntimeError, match="sparse24_quantize_rows: rounding has no gradient"):
        scale.sum().backward()


@pytest.mark.parametrize("name", ["scale_x", "scale_w", "bias", "residual"])
def test_a_gradient_is_refused(name):
    arguments = given(bias=SCALE_W, residual=RESIDUAL, act="silu")
    wants = arguments | {name: arguments[name].clone().requires_grad_()}
    y = ops.sparse24_linear_int8(**wants)
    with pytest.raises(RuntimeError, match=r"sparse24_linear_int8: not differentiable: detach scale_x"):
        y.sum().backward()
    with torch.no_grad():
        assert not ops.sparse24_linear_int8(**wants).requires_grad


# --- tracing

SAMPLES = [
    ((X, SCALE_X, PACKED, SCALE_W, N, K), {}),
    ((X[0], SCALE_X[0], PACKED, SCALE_W, N, K), {}),
    ((X[:0], SCALE_X[:0], PACKED, SCALE_W, N, K, SCALE_W), {}),
    ((X[None], SCALE_X[None], PACKED, SCALE_W, N, K, SCALE_W, "gelu", RESIDUAL[None]), {}),
    ((X, SCALE_X, PACKED, SCALE_W, N, K, SCALE_W.half(), "silu"), {"out_dtype": torch.float16}),
    ((draw(K, 3).t(), SCALE_X, PACKED, SCALE_W, N, K), {"out_dtype": torch.bfloat16}),
    ((X, SCALE_X.clone().requires_grad_(), PACKED, SCALE_W, N, K), {}),
]


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_opcheck(index):
    arguments, options = SAMPLES[index]
    # A gradient is refused, so the traced backward pass cannot be compared.
    checks = CHECKS[:3] if any(getattr(a, "requires_grad", False) for a in arguments) else CHECKS
    result = torch.library.opcheck(OPERATOR.default, arguments, options, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_fake_result_is_like_the_real_one(index):
    arguments, options = SAMPLES[index]
    real = OPERATOR(*arguments, **options)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    with FakeTensorMode() as mode:
        fake = OPERATOR(
            *[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments], **options
        )
    meta = OPERATOR(*[on_meta(a) for a in arguments], **options)
    for other in (fake, meta):
        assert (other.shape, other.dtype, other.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", ["quantize_rows", "compress", "decompress", "check", "pack", "unpack"])
def test_opcheck_of_the_forms(name):
    operator = getattr(torch.ops.lissom, f"sparse24_{name}").default
    cases = {
        "quantize_rows": [((RESIDUAL,), {}), ((RESIDUAL.half()[0],), {}), ((RESIDUAL.t()[:0],), {})],
        "compress": [((W,), {}), ((draw(N, K),), {"pattern": "magnitude"})],
        "decompress": [((VALUES, META, K), {})],
        "check": [((W,), {})],
        "pack": [((VALUES, META), {}), ((VALUES, META, "sm80-v1"), {})],
        "unpack": [((PACKED, N, K), {"dtype": torch.int8})],
    }[name]
    for arguments, options in cases:
        result = torch.library.opcheck(operator, arguments, options, test_utils=CHECKS)
        assert set(result.values()) == {"SUCCESS"}


def test_one_graph_for_any_number_of_tokens():
    """Quantisation of x included."""

    def f(x):
        q, scale = ops.quantize_rows(x)
        return ops.sparse24_linear_int8(q, scale, PACKED, SCALE_W, N, K, SCALE_W, "silu") + 1

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for m in (5, 2, 33, 300, 17):
        x = torch.randn(m, K, generator=torch.Generator().manual_seed(m))
        assert torch.equal(compiled(x), f(x))
    assert counter.frame_count == 1


def test_export():
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", PACKED)
            self.register_buffer("scale", SCALE_W)

        def forward(self, x, scale_x):
            return ops.sparse24_linear_int8(x, scale_x, self.packed, self.scale, N, K)

    m = torch.export.Dim("m", min=1)
    program = torch.export.export(Product(), (draw(4, K), torch.ones(4)), dynamic_shapes=({0: m}, {0: m}))
    for count in (1, 9):
        x, scale = draw(count, K), torch.ones(count)
        assert torch.equal(program.module()(x, scale), Product()(x, scale))


def test_autocast_leaves_integers_alone():
    wanted = ops.sparse24_linear_int8(**given())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.sparse24_linear_int8(**given()), wanted)
        with pytest.raises(TypeError, match="call sparse24_linear_int8"):
            ops.sparse24_linear(X.float(), PACKED, N, K)
