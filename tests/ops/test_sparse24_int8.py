# SPDX-License-Identifier: Apache-2.0
"""int8 of the 2:4 operators: sums bit for bit on every path, scales and epilogue, forms, quantisation. Refusals and
tracing are in test_sparse24_int8_contract.py.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lissom
from lissom import ops, testing
from lissom.reference import sparse24 as twin
from lissom.reference import sparse24_int8 as twin_int8

ACTIVATIONS = testing.ACTIVATIONS
PATHS = {"permuted": "portable", "permuted-dot": "avx512x", "tiles": "amx"}  # and the first tier that has it
WIDE = [
    (n, k) for n in (0, 1, 15, 16, 17, 31, 32, 33, 70) for k in (0, 4, 28, 32, 36, 60, 64, 68, 124, 128, 132)
]


def _kernels() -> Iterator[tuple[str, str]]:
    """Every path once, in the lowest tier that compiles it anew."""
    tiers = testing.tiers()
    yield from ((isa, path) for isa in tiers[:3] for path in ("permuted", "lanes"))
    yield from ((isa, path) for path, isa in PATHS.items() if isa in tiers[3:])


@pytest.fixture(params=list(_kernels()), ids="-".join)
def path(request: pytest.FixtureRequest) -> str:
    isa, name = request.param
    lissom.set_cpu_isa(isa)
    lissom._C.force_path(name)
    assert lissom._C.path_name("int8", 8) == name
    return name


def draw(*shape: int, seed: int = 1, low: int = -128, high: int = 127) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)


def weight(n: int, k: int, *, seed: int = 2, full: float = 0.9) -> Tensor:
    """2:4 int8 [n, k] of all values; a share of the quads has fewer than two non-zeros."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.where(torch.rand(n, k // 4, 1, generator=generator) < full, 2, 1)
    order = torch.rand(n, k // 4, 4, generator=generator).argsort(-1).argsort(-1)
    return (draw(n, k // 4, 4, seed=seed) * (order < keep)).reshape(n, k)


def packed_of(w: Tensor, target: str | None = None) -> Tensor:
    return ops.sparse24_pack(*ops.sparse24_compress(w), target)


def sums(x: Tensor, w: Tensor) -> Tensor:
    """x W^T, exact: integers below 2^53."""
    return x.double() @ w.double().t()


def product(x: Tensor, w: Tensor, **options: object) -> Tensor:
    """The operator with scales of one: what comes out is the integer sum."""
    ones = torch.ones(x.shape[:-1]), torch.ones(w.shape[0])
    return ops.sparse24_linear_int8(x, ones[0], packed_of(w), ones[1], *w.shape, **options)


def check_sums(x: Tensor, w: Tensor) -> None:
    y = product(x, w)
    assert y.dtype == torch.float32
    assert torch.equal(y, sums(x, w).float())


# --- sums


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 48, 80])
def test_tails_of_n(path, n):
    check_sums(draw(9, 64), weight(n, 64))


@pytest.mark.parametrize("k", [4, 8, 12, 16, 20, 28, 32, 36, 60, 64, 68, 92, 96, 100, 124, 128, 132, 260])
def test_tails_of_k(path, k):
    check_sums(draw(5, k), weight(20, k))
    check_sums(draw(50, k), weight(37, k))


@pytest.mark.parametrize("m", [*range(1, 20), 31, 32, 33, 47, 48, 49, 63, 65, 96, 97, 129, 255, 257, 530])
def test_numbers_of_tokens(path, m):
    check_sums(draw(m, 36), weight(35, 36))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 20, 32), (3, 0, 32), (0, 0, 0), (3, 20, 0), (1, 1, 4), (0, 20, 0)]
)
def test_empty_dimensions(path, m, n, k):
    x, w, bias = draw(m, k), weight(n, k), torch.linspace(-1, 1, n)
    y = product(x, w, bias=bias, act="relu")
    assert torch.equal(y, (sums(x, w) + bias).relu().float())


@pytest.mark.parametrize("shape", [(2, 70, 4096), (40, 33, 2048), (5, 20, 11008)])
def test_long_sums_cancel(path, shape):
    """Each half of K goes beyond 2^24, where float32 has no longer all integers; the whole does not."""
    m, n, k = shape
    w = weight(n, k // 2, full=1.0)
    x = draw(m, k // 2, low=-127)
    check_sums(torch.cat((x, -x[:, : k // 2 - 4], x[:, k // 2 - 4 :]), 1), torch.cat((w, w), 1))


@pytest.mark.parametrize(("x", "w"), itertools.product((-128, 127), repeat=2))
def test_extremes_fill_int32(path, x, w):
    """The largest K: every product at its largest, and the sum one below 2^31."""
    k = twin.MOST_INT8_COLUMNS
    dense = torch.zeros(17, k, dtype=torch.int8)
    dense[:, 1::4], dense[:, 2::4] = w, w
    ours = product(torch.full((3, k), x, dtype=torch.int8), dense)
    exact = k // 2 * x * w
    assert abs(exact) < 2**31
    assert ours.unique().tolist() == [float(torch.tensor(exact, dtype=torch.float64).float())]


def test_every_value_meets_every_value(path):
    every = torch.arange(-128, 128)
    w = torch.zeros(256, 16, dtype=torch.int8)
    w[torch.arange(256), torch.arange(256) % 16] = every.to(torch.int8)
    x = every[:, None].expand(256, 16).to(torch.int8)
    assert torch.equal(product(x, w), torch.outer(every, every).float())


def test_each_position_picks_its_column(path):
    """One weight a row, in each position of each quad of four records: y names the column that it met."""
    w = torch.eye(128, dtype=torch.int8)
    x = torch.stack([torch.arange(128) - 64, torch.arange(128).flip(0)]).to(torch.int8).repeat(9, 1)
    assert torch.equal(product(x, w), x.float())
    assert torch.equal(product(x[:1], w), x[:1].float())


@given(
    m=st.integers(0, 70),
    n=st.integers(0, 50),
    quads=st.integers(0, 60),
    seed=st.integers(0, 2**20),
    full=st.sampled_from([1.0, 0.5]),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("tier", testing.tiers())
def test_random_problems(tier, m, n, quads, seed, full):
    lissom.set_cpu_isa(tier)
    x, w = draw(m, 4 * quads, seed=seed), weight(n, 4 * quads, seed=seed + 1, full=full)
    check_sums(x, w)


def test_fuzz(isa, request):
    """Everything at once, against the definition in float64; a failure names the seed."""
    count = request.config.getoption("--fuzz") // 20
    first = testing.TIERS.index(isa) * 1_000_000
    failures = []
    for seed in range(first, first + count):
        generator = torch.Generator().manual_seed(seed)
        m, n, quads, act, given, out = (int(v) for v in torch.randint(0, 1 << 20, (6,), generator=generator))
        m, n, k, act_name = m % 40, n % 70, 4 * (quads % 50), ACTIVATIONS[act % 5]
        dtype = twin.DTYPES[out % 3]
        x, w = draw(m, k, seed=seed), weight(n, k, seed=seed)
        scale_x, scale_w = torch.rand(m, generator=generator) / 64, torch.rand(n, generator=generator) / 64
        bias = torch.randn(n, generator=generator) if given & 1 else None
        residual = torch.randn(m, n, generator=generator).to(dtype) if given & 2 else None
        y = ops.sparse24_linear_int8(
            x, scale_x, packed_of(w), scale_w, n, k, bias, act_name, residual, out_dtype=dtype
        )
        if not close(y, wanted(x, w, scale_x, scale_w, bias, act_name, residual)):
            failures.append((seed, m, n, k, act_name, dtype))
    assert not failures, f"{len(failures)} of {count} on {isa}: {failures[:3]}"


# --- scales and the epilogue


def wanted(x, w, scale_x, scale_w, bias=None, act="none", residual=None) -> tuple[Tensor, Tensor]:
    """y in float64 and the size of its terms."""
    y = sums(x, w) * scale_x.double()[..., None] * scale_w.double()
    size = y.abs()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    y = testing.activate64(y, act)
    if residual is not None:
        y, size = y + residual.double(), size + residual.double().abs()
    return y, size


def close(y: Tensor, exact: tuple[Tensor, Tensor]) -> bool:
    """Within the roundings of float32, the error of the activation and the rounding to y's dtype."""
    bound = 4 * 2.0**-24 * exact[1] + testing.ROUNDING[y.dtype] * exact[0].abs() + 2e-6 + 1e-6 * exact[1]
    return y.shape == exact[0].shape and bool(((y.double() - exact[0]).abs() <= bound).all())


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("out", [None, *twin.DTYPES], ids=str)
def test_epilogue(path, act, out):
    dtype = out or torch.float32
    generator = torch.Generator().manual_seed(3)
    x, w = draw(11, 40), weight(37, 40)
    scale_x, scale_w = torch.rand(11, generator=generator) / 32, torch.rand(37, generator=generator) / 32
    for bias_type, has_residual in itertools.product([None, torch.float32, dtype], [False, True]):
        bias = None if bias_type is None else torch.randn(37, generator=generator).to(bias_type)
        residual = torch.randn(11, 37, generator=generator).to(dtype) if has_residual else None
        y = ops.sparse24_linear_int8(
            x, scale_x, packed_of(w), scale_w, 37, 40, bias, act, residual, out_dtype=out
        )
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert close(y, wanted(x, w, scale_x, scale_w, bias, act, residual))
        given = x, scale_x, packed_of(w), scale_w, 37, 40, bias, act, residual
        assert close(
            twin_int8.linear_int8(*given, out_dtype=out), wanted(x, w, scale_x, scale_w, bias, act, residual)
        )


def test_rounding_is_that_of_three_steps(path):
    """Sum to float32, scale_x times scale_w, their product: the same bits everywhere."""
    generator = torch.Generator().manual_seed(4)
    x, w = draw(19, 4096, low=-127), weight(35, 4096)
    scale_x, scale_w = torch.rand(19, generator=generator), torch.rand(35, generator=generator)
    y = ops.sparse24_linear_int8(x, scale_x, packed_of(w), scale_w, 35, 4096)
    assert torch.equal(y, sums(x, w).float() * (scale_x[:, None] * scale_w))
    assert torch.equal(y, twin_int8.linear_int8(x, scale_x, packed_of(w), scale_w, 35, 4096))


def test_nan_in_a_scale_reaches_its_row_or_column_only(path):
    x, w = draw(9, 64), weight(20, 64)
    scale_x, scale_w = torch.ones(9), torch.ones(20)
    scale_x[4] = scale_w[7] = torch.nan
    y = ops.sparse24_linear_int8(x, scale_x, packed_of(w), scale_w, 20, 64, None, "relu")
    assert y[4].isnan().all()
    assert y[:, 7].isnan().all()
    assert y.isnan().sum() == 20 + 9 - 1


@pytest.mark.parametrize("k", [36, 64])
def test_layouts(path, k):
    """Rows apart, repeated, transposed, unaligned: the values count, never the layout; scales and residual too."""
    w, flat = weight(20, k), draw(60 * k)
    wide = draw(12, 2 * k + 3)
    layouts = {
        "rows apart": wide[:, 1 : k + 1],
        "repeated": wide[:1, :k].expand(12, k),
        "overlapping": flat.as_strided((12, k), (3, 1)),
        "columns apart": wide[:, : 2 * k : 2],
        "transposed": draw(k, 12).t(),
        "unaligned": flat[1 : 12 * k + 1].view(12, k),
        "leading": draw(4, 3, k).transpose(0, 1),
        "one row": draw(k),
    }
    for name, x in layouts.items():
        lead = x.shape[:-1]
        check_sums(x, w)
        scale = (torch.arange(2.0 * lead.numel()) % 3 + 1)[::2].reshape(lead)  # all exact in float32
        scale_w = (torch.arange(40.0) % 5 + 1)[::2]
        residual = torch.arange(float(lead.numel() * 25)).reshape(*lead, 25)[..., 3:23]
        y = ops.sparse24_linear_int8(x, scale, packed_of(w), scale_w, 20, k, None, "none", residual)
        assert torch.equal(y.double(), sums(x, w) * scale.double()[..., None] * scale_w + residual), name


def test_threads_change_nothing(path):
    x, w = draw(130, 260), weight(200, 260)
    scale_x, scale_w = torch.rand(130), torch.rand(200)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.sparse24_linear_int8(x, scale_x, packed_of(w), scale_w, 200, 260, scale_w, "gelu"))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_fastest_path_is_chosen(isa):
    """Tiles need a tile of tokens; without a dot product of bytes, many tokens go by lanes."""
    few, many = {"avx512x": ("permuted-dot", "permuted-dot"), "amx": ("permuted-dot", "tiles")}.get(
        isa, ("permuted", "lanes")
    )
    assert [lissom._C.path_name("int8", m) for m in (1, 1 << 20)] == [few, many]


# --- forms


def slow_pack(values: Tensor, meta: Tensor) -> bytes:
    """cpu-v1 of int8, element by element from its drawing in csrc/sparse24/layout.h."""
    n, k = values.shape[0], values.shape[1] * 2
    panels, records = -(-n // 16), -(-k // 32)
    out = bytearray(64 + panels * (64 + records * 320))
    struct.pack_into("<8sIiqq", out, 0, b"LISSOM24", 1, 3, n, k)
    code = twin.nibbles(meta, k).tolist()
    for row in range(panels * 16):
        panel = 64 + row // 16 * (64 + records * 320)
        if row < n:
            struct.pack_into("<i", out, panel + 4 * (row % 16), sum(values[row].tolist()))
        for quad in range(records * 8):
            inside = row < n and quad < k // 4
            start, lane, i = panel + 64 + quad // 8 * 320, row % 16, quad % 8
            out[start + 4 * lane + i // 2] |= (code[row][quad] if inside else 0xE) << 4 * (i % 2)
            for slot in range(2 if inside else 0):
                value = int(values[row, 2 * quad + slot])
                struct.pack_into("<b", out, start + 64 + 64 * (i // 2) + 4 * lane + 2 * (i % 2) + slot, value)
    return bytes(out)


def slow_pack_sm80(values: Tensor, meta: Tensor) -> bytes:
    """sm80-v1 of int8, lane by lane, register by register."""
    n, k = values.shape[0], values.shape[1] * 2
    code, kept = twin.nibbles(meta, k).tolist(), values.tolist()
    out = struct.pack("<8sIiqq96x", b"LISSOM80", 1, 3, n, k)

    def nibble(row: int, quad: int) -> int:
        return code[row][quad] if row < n and quad < k // 4 else 0xE

    for panel, record in itertools.product(range(-(-n // 32)), range(2 * -(-k // 128))):
        for f, g, t in itertools.product(range(2), range(8), range(4)):
            row, first = 32 * panel + 16 * f + g + 8 * (t % 2), 16 * record + 8 * (t // 2)
            out += struct.pack("<I", sum(nibble(row, first + j) << 4 * j for j in range(8)))
        for f, g, t, r in itertools.product(range(2), range(8), range(4), range(4)):
            row, byte = 32 * panel + 16 * f + g + 8 * (r % 2), 32 * record + 4 * t + 16 * (r // 2)
            inside = [kept[row][b] if row < n and b < k // 2 else 0 for b in range(byte, byte + 4)]
            out += struct.pack("<4b", *inside)
    return out + bytes(48)


@pytest.mark.parametrize(("n", "k"), WIDE)
def test_forms_are_the_pictures(n, k):
    w = weight(n, k, full=0.7)
    values, meta = ops.sparse24_compress(w)
    assert values.dtype == torch.int8
    assert all(map(torch.equal, twin.compress(w), (values, meta)))
    assert torch.equal(ops.sparse24_decompress(values, meta, k), w)
    assert torch.equal(twin.decompress(values, meta, k), w)
    assert ops.sparse24_check(w) == (True, -1, -1)
    for target, slow in (("cpu-v1", slow_pack), ("sm80-v1", slow_pack_sm80)):
        packed = ops.sparse24_pack(values, meta, target)
        assert packed.numel() == twin.packed_bytes(n, k, torch.int8, target)
        assert packed.numpy().tobytes() == slow(values, meta)
        assert torch.equal(packed, twin.pack(values, meta, target))
        for unpack in (ops.sparse24_unpack, twin.unpack):
            again = unpack(packed, n, k, target)
            assert torch.equal(again[0], values)
            assert torch.equal(again[1], meta)


def test_largest_of_a_quad(isa):
    """-128 has the largest magnitude; of equal ones the lower position stays."""
    rows = [[1, -128, 127, -127], [5, -5, 5, 5], [0, 3, 0, 2], [-128, 127, -128, 0], [0, 0, 0, -128]]
    kept = [[-128, 127], [5, -5], [3, 2], [-128, -128], [0, -128]]
    w = torch.tensor(rows, dtype=torch.int8)
    for compress in (ops.sparse24_compress, twin.compress):
        values, meta = compress(w, pattern="magnitude")
        assert values.tolist() == kept
        assert meta.flatten().tolist() == [0x9, 0x4, 0xD, 0x8, 0xE]
    assert ops.sparse24_check(w) == (False, 0, 0)


# --- quantisation


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """By the kernel, which must agree with the twin bit for bit."""
    found, twins = ops.quantize_rows(x), twin_int8.quantize_rows(x)
    for ours, theirs in zip(found, twins, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(ours.nan_to_num(-7.0), theirs.nan_to_num(-7.0))
    return found


@pytest.mark.parametrize("shape", [(7,), (3, 40), (2, 3, 36), (0, 4), (3, 0), (5, 1), (70, 15), (4, 1031)])
def test_quantize_rows_is_its_definition(isa, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    q, scale = quantized(x)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, x.shape, torch.float32, x.shape[:-1])
    if x.numel():
        largest = x.float().abs().amax(-1)
        assert torch.equal(scale, largest / 127)
        assert torch.equal(q.float(), (x.float() / scale[..., None]).round())
        assert (q.abs().amax(-1) == 127).all()
        assert ((q.float() * scale[..., None] - x.float()).abs() <= 0.501 * scale[..., None]).all()


def test_quantize_rows_of_any_layout(isa):
    wide = torch.randn(9, 100, generator=torch.Generator().manual_seed(7))
    for x in (
        wide[:, 3:40],
        wide.t(),
        wide[:1].expand(5, 100),
        wide[::2, 1::3],
        wide.view(3, 3, 100).transpose(0, 1),
    ):
        q, scale = quantized(x)
        assert q.is_contiguous()
        assert torch.equal(q, ops.quantize_rows(x.contiguous())[0])
        assert torch.equal(scale, ops.quantize_rows(x.contiguous())[1])


def test_quantize_rows_halves_go_to_even(isa):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.0])
    assert quantized(x)[0].tolist() == [0, 2, 2, 0, -2, 127]


@pytest.mark.parametrize("largest", [0.0, -0.0, 1e-45, 1e-38, 1.4e-36])
def test_quantize_rows_of_almost_nothing(isa, largest):
    q, scale = quantized(torch.tensor([[largest, 0.0], [1.0, 0.5]]))
    assert q.tolist() == [[0, 0], [127, 64]]
    assert scale[0] == 1


@pytest.mark.parametrize("largest", [1.6e-36, 1e-30, 1.0, 3.4028234e38])
def test_quantize_rows_at_the_ends_of_the_range(isa, largest):
    q, scale = quantized(torch.tensor([[largest, -largest, largest / 4, 0.0]]))
    assert q.tolist() == [[127, -127, 32, 0]]
    assert scale.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_quantize_rows_marks_what_is_not_finite(isa, bad):
    x = torch.ones(3, 8)
    x[1, 5] = bad
    q, scale = quantized(x)
    assert scale.isnan().tolist() == [False, True, False]
    assert q[1].tolist() == [0] * 8
    w, scale_w = ops.quantize_rows(torch.eye(16, 8))
    y = ops.sparse24_linear_int8(q, scale, packed_of(w), scale_w, 16, 8)
    assert y.isnan().any(1).tolist() == [False, True, False]


def test_a_quantised_linear_is_near_the_real_one(isa):
    generator = torch.Generator().manual_seed(6)
    x, w = torch.randn(33, 512, generator=generator), testing.random_sparse24(100, 512)
    qx, scale_x = ops.quantize_rows(x)
    qw, scale_w = ops.quantize_rows(w)
    assert ops.sparse24_check(qw) == (True, -1, -1)
    y = ops.sparse24_linear_int8(qx, scale_x, packed_of(qw), scale_w, 100, 512)
    exact = x @ w.t()
    assert (y - exact).norm() < 0.02 * exact.norm()
