# SPDX-License-Identifier: Apache-2.0
"""sparse24 operators under torch's tracers: opcheck, torch.compile, torch.export, fake tensors, vmap's absence."""

from __future__ import annotations

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from lissom import ops
from lissom.testing import random_sparse24

N, K = 20, 40
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def problem(dtype: torch.dtype = torch.float32):
    values, meta = ops.sparse24_compress(random_sparse24(N, K, dtype=dtype))
    return values, meta, ops.sparse24_pack(values, meta)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def samples(name: str, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    values, meta, packed = problem(dtype)
    w, trained = random_sparse24(N, K, dtype=dtype), values.clone().requires_grad_()
    x, bias, residual = leaf(2, 3, K, dtype=dtype), leaf(N), leaf(2, 3, N, dtype=dtype)
    dy = residual.detach()
    return {
        "compress": [((w,), {}), ((w,), {"pattern": "magnitude"}), ((w[:, :0],), {})],
        "decompress": [((values, meta, K), {}), ((trained, meta, K), {})],
        "check": [((w,), {})],
        "check_meta": [((meta, K), {})],
        "pack": [((values, meta), {}), ((values[:0], meta[:0]), {})],
        "unpack": [((packed, N, K), {"dtype": dtype})],
        "linear": [
            ((x, packed, N, K), {}),
            ((x.detach()[0, 0], packed, N, K), {}),
            ((x[:0], packed, N, K, bias), {}),
            ((x, packed, N, K, bias, "gelu", residual), {}),
            ((x.detach(), packed, N, K, bias, "silu"), {"out_dtype": torch.float32}),
            ((x.detach().transpose(0, 1), packed, N, K), {}),
        ],
        "linear_values": [
            ((x, trained, meta, bias), {}),
            ((x.detach(), trained, meta), {}),
            ((x, values, meta), {}),
        ],
        "grad_input": [((dy, packed, N, K), {}), ((dy.transpose(0, 1), packed, N, K), {})],
        "mask_mm": [((dy, x.detach(), meta), {}), ((dy[:0], x.detach()[:0], meta), {})],
    }[name]


NAMES = [
    "compress",
    "decompress",
    "check",
    "check_meta",
    "pack",
    "unpack",
    "linear",
    "linear_values",
    "grad_input",
    "mask_mm",
]


def test_every_operator_is_here():
    found = {name for name in dir(torch.ops.lissom) if name.startswith("sparse24_")}
    registered = torch._C._dispatch_get_all_op_names()
    found |= {op.split("::")[1] for op in registered if op.startswith("lissom::sparse24_")}
    assert {
        f"sparse24_{name}" for name in [*NAMES, "linear_int8", "quantize_rows"]
    } == found  # int8 has a file of its own


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    operator = getattr(torch.ops.lissom, f"sparse24_{name}").default
    for arguments, options in samples(name, dtype):
        result = torch.library.opcheck(operator, arguments, options, test_utils=CHECKS)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_fake_result_has_the_shape_dtype_and_strides_of_the_real_one(name, dtype):
    operator = getattr(torch.ops.lissom, f"sparse24_{name}")
    for arguments, options in samples(name, dtype):
        real = operator(*arguments, **options)
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = operator(*fakes, **options)
        metas = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        meta = operator(*metas, **options)
        for a, b, c in zip(*[t if isinstance(t, tuple) else (t,) for t in (real, fake, meta)], strict=True):
            assert a.shape == b.shape == c.shape
            assert a.dtype == b.dtype == c.dtype
            assert a.stride() == b.stride() == c.stride()
            assert (b.device.type, c.device.type) == ("cpu", "meta")


def test_one_graph_for_any_number_of_tokens():
    _, _, packed = problem()
    bias = leaf(N).detach()

    def f(x):
        return ops.sparse24_linear(x * 2, packed, N, K, bias, "silu") + 1

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for m in (5, 2, 33, 300, 17):
        x = leaf(m, K).detach()
        assert torch.equal(compiled(x), f(x))
    assert counter.frame_count == 1


def test_training_compiles_in_one_graph():
    values, meta, _ = problem()
    results = []
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(x, v, b):
        return ops.sparse24_linear_values(x, v, meta, b).relu()

    for run in (f, torch.compile(f, fullgraph=True, dynamic=True, backend=counter)):
        for m in (3, 8):
            inputs = leaf(m, K), values.clone().requires_grad_(), leaf(N)
            run(*inputs).sum().backward()
            results.append([t.grad for t in inputs])
    assert counter.frame_count == 1
    for eager, compiled in zip(results[:2], results[2:], strict=True):
        for a, b in zip(eager, compiled, strict=True):
            assert torch.equal(a, b)


def test_export_saves_and_loads():
    _, _, packed = problem()

    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", packed)

        def forward(self, x):
            return ops.sparse24_linear(x, self.packed, N, K, None, "relu")

    program = torch.export.export(
        Product(), (torch.ones(4, K),), dynamic_shapes=({0: torch.export.Dim("m", min=1)},)
    )
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    again = torch.export.load(stream).module()
    for m in (1, 2, 9):
        x = leaf(m, K).detach()
        assert torch.equal(again(x), ops.sparse24_linear(x, packed, N, K, None, "relu"))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_x_to_the_dtype_of_the_weight(weight):
    _, _, packed = problem(weight)
    x = leaf(3, K).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.sparse24_linear(x, packed, N, K)
    assert y.dtype == weight
    assert torch.equal(y, ops.sparse24_linear(x.to(weight), packed, N, K))


def test_inference_mode_and_no_grad():
    values, meta, packed = problem()
    x = leaf(3, K)
    wanted = ops.sparse24_linear(x, packed, N, K)
    with torch.inference_mode():
        assert torch.equal(ops.sparse24_linear(x, packed, N, K), wanted)
        assert torch.equal(ops.sparse24_linear_values(x, values, meta), wanted)
    with torch.no_grad():
        assert ops.sparse24_linear(x, packed, N, K).grad_fn is None
