# SPDX-License-Identifier: Apache-2.0
"""What the tests of kernels share: one table of tolerances, random 2:4 problems, and slow references.

The references are written from the definitions, in Python integers and float64, and share nothing with the
kernels or their torch twins. `python -m lissom.testing sparse24 --seed 123 --isa avx2` repeats one fuzz problem.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import struct
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import lissom
from lissom import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIERS = ("portable", "avx2", "avx512", "avx512x", "amx")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")

# --- tolerances

# Of an fp32 sum of K/2 products, as error / sum |x| |w|. Roundings of signed terms add up like the root of their
# number, not like their number: 1.7e-7 was measured at K = 11008, and 1e-6 holds to K = 16384. (Error / max |y|
# grows with K and must not be tested.)
ACCUMULATION = 1e-6
# Of one rounding to a type: half a unit in the last place, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def relative_error(y: Tensor, exact: Tensor, scale: Tensor, *, roundings: int = 1) -> float:
    """Largest error of y beyond its unavoidable roundings, divided by `scale`; compare it with ACCUMULATION.

    Args:
        y: result. exact: the float64 result, same shape. scale: sum of the absolute values of the terms, same shape.
        roundings: how often a value passes through y's dtype: the last rounding is relative to the result, the ones
            before it to the terms.

    Returns:
        The error; inf where y is NaN or infinite and the exact result, rounded to y's dtype, is not, or the reverse.

    >>> relative_error(torch.tensor([3.0]), torch.tensor([3.0]).double(), torch.tensor([3.0]))
    0.0
    """
    if y.shape != exact.shape:
        return float("inf")
    wanted, unit = exact.to(y.dtype), ROUNDING[y.dtype]
    finite = wanted.isfinite()
    same = torch.where(wanted.isnan(), y.isnan(), y == wanted)
    if not bool((same | finite).all() and (y.isfinite() | ~finite).all()):
        return float("inf")
    limits = torch.finfo(y.dtype)
    free = unit * (exact.abs() + (roundings - 1) * scale.double()) + limits.smallest_normal * limits.eps
    excess = ((y.double() - exact).abs() - free)[finite].clamp_min(0)
    return float((excess / scale.double()[finite].clamp_min(1e-30)).max()) if excess.numel() else 0.0


# --- random problems


def tiers() -> list[str]:
    """The tiers that this CPU has, from the lowest.

    >>> tiers()[0]
    'portable'
    """
    return list(TIERS[: TIERS.index(lissom.cpu_info()["detected_isa"]) + 1])


def paths(isa: str, dtype: torch.dtype) -> list[str]:
    """Names of the kernel paths of a tier for a dtype, as `lissom._C.force_path` takes them.

    >>> paths("portable", torch.float32)
    ['permuted', 'lanes']
    """
    level = TIERS.index(isa) if dtype == torch.bfloat16 else 0
    return ["permuted", "lanes", *["permuted-dot"] * (level >= 3), *["tiles"] * (level >= 4)]


def random_sparse24(
    n: int, k: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, full: float = 1.0
) -> Tensor:
    """A random 2:4 weight [n, k], scaled so that a product with unit activations has unit size.

    Args:
        full: share of quads with two non-zeros; the others have none or one.

    >>> bool(ops.sparse24_check(random_sparse24(3, 16, seed=1))[0])
    True
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, k // 4, 4, generator=generator)
    keep = torch.full((n, k // 4, 1), 2)
    sparser = torch.rand(n, k // 4, 1, generator=generator) >= full
    keep = torch.where(sparser, torch.randint(0, 2, keep.shape, generator=generator), keep)
    mask = scores.argsort(-1).argsort(-1) < keep
    w = torch.randn(n, k // 4, 4, generator=generator) * (2 / max(k, 1)) ** 0.5
    w = torch.where(w == 0, torch.ones(()), w)
    return (w * mask).reshape(n, k).to(dtype)


# --- sparse24: slow references

_PAIRS = list(itertools.combinations(range(4), 2))


def _bits(t: Tensor) -> list[list[int]]:
    """Bit patterns, unsigned."""
    size = t.element_size() * 8
    as_int = t.contiguous().view(torch.int32 if size == 32 else torch.int16)
    return [[v % 2**size for v in row] for row in as_int.tolist()]


def slow_compress(w: Tensor, *, keep_largest: bool = False) -> tuple[list[list[int]], list[list[int]]]:
    """Bit patterns of the values and metadata bytes of w, quad by quad from the definition.

    >>> slow_compress(torch.tensor([[0.0, -0.0, 0.0, 1.0]]))
    ([[0, 1065353216]], [[14]])
    """
    all_values, all_meta = [], []
    for row, bits in zip(w.double().tolist(), _bits(w), strict=True):
        values, nibbles = [], []
        for at in range(0, len(row), 4):
            quad = row[at : at + 4]
            kept = [i for i in range(4) if quad[i] != 0]
            if len(kept) > 2:
                if not keep_largest:
                    raise ValueError("not 2:4")
                # NaN before infinity, ties to the lower position
                kept = sorted(kept, key=lambda i: (quad[i] == quad[i], -abs(quad[i]), i))[:2]
            p0, p1 = max((pair for pair in _PAIRS if set(kept) <= set(pair)), key=sum)
            nibbles.append(p0 | p1 << 2)
            values += [bits[at + p] if quad[p] != 0 else 0 for p in (p0, p1)]
        nibbles += [0] * (len(nibbles) % 2)
        all_values.append(values)
        all_meta.append([low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)])
    return all_values, all_meta


def slow_positions(meta: Tensor, k: int) -> list[list[int]]:
    """Column of every kept value, row by row.

    >>> slow_positions(torch.tensor([[0x4E]], dtype=torch.uint8), 8)
    [[2, 3, 4, 5]]
    """
    rows = []
    for row in meta.tolist():
        nibbles = [(row[q // 2] >> 4 * (q % 2)) & 15 for q in range(k // 4)]
        rows.append([4 * q + p for q, code in enumerate(nibbles) for p in (code & 3, code >> 2)])
    return rows


def slow_pack(values: Tensor, meta: Tensor) -> bytes:
    """The cpu-v1 form, element by element from its drawing in csrc/sparse24/layout.h."""
    n, k, size = values.shape[0], values.shape[1] * 2, values.element_size()
    panels, records, record = -(-n // 16), -(-k // 32), 64 + 256 * size
    out = bytearray(64 + panels * records * record)
    struct.pack_into("<8sIiqq", out, 0, b"LISSOM24", 1, DTYPES.index(values.dtype), n, k)
    held, codes = _bits(values), meta.tolist()
    for row in range(panels * 16):
        for quad in range(records * 8):
            inside = row < n and quad < k // 4
            start = 64 + (row // 16 * records + quad // 8) * record
            lane, i = row % 16, quad % 8
            code = (codes[row][quad // 2] >> 4 * (quad % 2)) & 15 if inside else 0xE
            out[start + 4 * lane + i // 2] |= code << 4 * (i % 2)
            for slot in range(2):
                value = held[row][2 * quad + slot] if inside else 0
                if size == 4:
                    struct.pack_into("<I", out, start + 64 + (2 * i + slot) * 64 + 4 * lane, value)
                else:
                    struct.pack_into("<H", out, start + 64 + i * 64 + 4 * lane + 2 * slot, value)
    return bytes(out)


def activate64(pre: Tensor, act: str) -> Tensor:
    """An activation in float64, from its definition."""
    if act == "relu":
        return torch.where(pre <= 0, torch.zeros((), dtype=pre.dtype), pre)
    if act == "silu":
        return pre / (1 + torch.exp(-pre))
    if act == "gelu":
        return 0.5 * pre * (1 + torch.erf(pre / math.sqrt(2)))
    if act == "gelu_tanh":
        return 0.5 * pre * (1 + torch.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)))
    return pre


@dataclass(frozen=True)
class Exact:
    """y of a product in float64, what went into its activation, and the sum of absolute terms that errors refer to."""

    y: Tensor
    pre: Tensor
    scale: Tensor


def exact_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    **more: Tensor | None,
) -> Exact:
    """act(x W^T + bias) + residual in float64 over the kept positions only: a pruned position never sees x.

    Args:
        x: [..., K]. values, meta: canonical. bias: [N]. more: residual [..., N].

    >>> exact_linear(torch.ones(1, 4), torch.ones(1, 2), torch.tensor([[0xE]])).y.item()
    2.0
    """
    columns = torch.tensor(slow_positions(meta, x.shape[-1]), dtype=torch.long).reshape(values.shape)
    terms = x.double()[..., columns] * values.double()  # [..., N, K/2]
    pre, scale = terms.sum(-1), terms.detach().abs().sum(-1)
    if bias is not None:
        pre, scale = pre + bias.double(), scale + bias.detach().double().abs()
    y = activate64(pre, act)
    residual = more.get("residual")
    if residual is not None:
        y, scale = y + residual.double(), scale + residual.detach().double().abs()
    return Exact(y, pre, scale.nan_to_num(1.0, posinf=1.0))


# --- sparse24: fuzzing


@dataclass(frozen=True)
class Sparse24Problem:
    """One random problem, made of its seed alone; its tier comes from outside."""

    seed: int
    isa: str
    path: str
    dtype: torch.dtype
    lead: tuple[int, ...]
    n: int
    k: int
    full: float
    special: bool
    layout: str
    act: str
    bias: torch.dtype | None
    residual: bool
    out: torch.dtype

    @staticmethod
    def draw(seed: int, isa: str) -> Sparse24Problem:
        """The problem of a seed.

        >>> Sparse24Problem.draw(3, "portable") == Sparse24Problem.draw(3, "portable")
        True
        """
        r = random.Random(seed)
        dtype = r.choice(DTYPES)
        small = [0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 18, 31, 33]
        m = r.choice([*small, 47, 48, 49, 64, 65, 100, 257, 300]) if r.random() < 0.8 else r.randint(1, 40)
        lead = (
            {0: (m,), 1: (1, m), 2: (m, 1), 3: (2, m)}[r.randrange(4)] if m != 1 or r.random() < 0.7 else ()
        )
        most = 60 if m > 40 else 140
        n = r.choice([0, 1, 15, 16, 17, 32, 33, 48]) if r.random() < 0.3 else r.randint(1, most)
        k = 4 * (r.choice([0, 1, 2, 7, 8, 9, 16]) if r.random() < 0.3 else r.randint(1, most // 4))
        return Sparse24Problem(
            seed=seed,
            isa=isa,
            dtype=dtype,
            lead=lead,
            n=n,
            k=k,
            full=r.choice([1.0, 1.0, 0.5, 0.0]),
            special=r.random() < 0.15,
            layout=r.choice(["dense", "dense", "rows apart", "offset", "transposed", "repeated"]),
            act=r.choice(ACTIVATIONS),
            bias=r.choice([None, dtype, torch.float32]),
            residual=r.random() < 0.4,
            out=r.choice([dtype, torch.float32]),
            path=r.choice(["", *paths(isa, dtype)]),  # last: all else is the same in every tier
        )


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """Values like t's in another layout: strided views must be read as they are."""
    if layout == "rows apart":
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), torch.nan if t.is_floating_point() else 255)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    if layout == "offset":
        flat = torch.cat((t.new_full((3,), torch.nan), t.flatten()))  # not aligned to a vector
        return flat[3:].view(t.shape)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "repeated" and t.dim() > 1 and t.shape[0] > 0:
        return t[:1].expand(t.shape)
    return t


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def _require_close(what: str, y: Tensor, exact: Tensor, scale: Tensor, **how: float) -> None:
    limit = how.pop("limit", ACCUMULATION)
    error = relative_error(y, exact, scale, roundings=int(how.pop("roundings", 1)))
    _require(error <= limit, f"{what}: error {error:.3g} > {limit:.3g}")


def _random(
    p: Sparse24Problem, salt: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "dense"
) -> Tensor:
    generator = torch.Generator().manual_seed(8 * p.seed + salt)
    t = torch.randn(shape, generator=generator).to(dtype)
    return _laid_out(t, layout)


def _spoil(p: Sparse24Problem, t: Tensor, count: int) -> Tensor:
    """Puts Inf, -Inf and NaN at random places that hold a value."""
    r = random.Random(p.seed)
    where = t.flatten().nonzero().flatten().tolist()
    for at in r.sample(where, min(count, len(where))):
        t.view(-1)[at] = r.choice([math.inf, -math.inf, math.nan])
    return t


def _fuzz_format(p: Sparse24Problem) -> tuple[Tensor, Tensor, Tensor]:
    """check, compress, decompress, check_meta, pack and unpack; returns values, meta, packed of the 2:4 weight."""
    w = random_sparse24(p.n, p.k, dtype=p.dtype, seed=p.seed, full=p.full)
    dense = _random(p, 0, (p.n, p.k), p.dtype)
    if p.special:
        _spoil(p, w, 2)
    layout = random.Random(p.seed).choice(["dense", "rows apart", "transposed"])
    for pattern, source in (("auto", w), ("magnitude", dense)):
        values, meta = ops.sparse24_compress(_laid_out(source, layout), pattern=pattern)
        slow_values, slow_meta = slow_compress(source, keep_largest=pattern == "magnitude")
        _require(_bits(values) == slow_values and meta.tolist() == slow_meta, f"compress {pattern}")
        packed = ops.sparse24_pack(_laid_out(values, layout), _laid_out(meta, layout))
        _require(packed.numpy().tobytes() == slow_pack(values, meta), f"pack {pattern}")
        again, meta_again = ops.sparse24_unpack(packed, p.n, p.k)
        _require(_bits(again) == slow_values and torch.equal(meta_again, meta), f"unpack {pattern}")
    _require(ops.sparse24_check(_laid_out(w, layout)) == (True, -1, -1), "check of a 2:4 weight")
    bad = [
        (i, q)
        for i in range(p.n)
        for q in range(p.k // 4)
        if int((dense[i, 4 * q : 4 * q + 4] != 0).sum()) > 2
    ][:1]
    _require(
        ops.sparse24_check(dense) == ((False, *bad[0]) if bad else (True, -1, -1)), "check of a dense weight"
    )
    values, meta = ops.sparse24_compress(w)
    plain = w.masked_fill(w == 0, 0)  # -0.0 becomes 0.0
    _require(_bits(ops.sparse24_decompress(values, meta, p.k)) == _bits(plain), "decompress")
    if meta.numel():
        r = random.Random(~p.seed)
        row, quad = r.randrange(p.n), r.randrange(p.k // 4)
        legal = {p0 | p1 << 2 for p0, p1 in _PAIRS}
        damaged, code = meta.clone(), r.choice(sorted(set(range(16)) - legal))
        shift = 4 * (quad % 2)
        damaged[row, quad // 2] = (int(meta[row, quad // 2]) & ~(15 << shift)) | code << shift
        _require(
            ops.sparse24_check_meta(damaged, p.k) == (False, row, quad), "check_meta of a damaged nibble"
        )
    _require(ops.sparse24_check_meta(meta, p.k) == (True, -1, -1), "check_meta")
    return values, meta, ops.sparse24_pack(values, meta)


def _fuzz_linear(p: Sparse24Problem, values: Tensor, meta: Tensor, packed: Tensor) -> None:
    x = _random(p, 1, (*p.lead, p.k), p.dtype)
    x = _laid_out(_spoil(p, x, 2) if p.special else x, p.layout)
    bias = None if p.bias is None else _random(p, 2, (p.n,), p.bias)
    residual = _random(p, 3, (*p.lead, p.n), p.out, p.layout) if p.residual else None
    y = ops.sparse24_linear(x, packed, p.n, p.k, bias, p.act, residual, out_dtype=p.out)
    exact = exact_linear(x, values, meta, bias, p.act, residual=residual)
    _require_close("linear", y, exact.y, exact.scale)
    y = ops.sparse24_linear_values(x, values, meta, bias)
    exact = exact_linear(x, values, meta, bias)
    _require_close("linear_values", y, exact.y, exact.scale)


def _fuzz_gradients(p: Sparse24Problem, values: Tensor, meta: Tensor, packed: Tensor) -> None:
    x = _random(p, 1, (*p.lead, p.k), p.dtype, p.layout).requires_grad_()
    bias = None if p.bias is None else _random(p, 2, (p.n,), p.bias).requires_grad_()
    w = ops.sparse24_decompress(values, meta, p.k).double()
    leaves = [x.detach().double().requires_grad_(), values.double().requires_grad_()]
    bias64 = None if bias is None else bias.detach().double().requires_grad_()
    exact = exact_linear(leaves[0], leaves[1], meta, bias64, p.act)
    # At the kink of relu a tiny error of the sum flips the derivative: let no gradient pass there.
    away = exact.pre.detach().abs() > 1e-4 * exact.scale
    dy = _random(p, 4, (*p.lead, p.n), p.out) * away
    slack = ACCUMULATION * (
        1 if p.act == "none" else 2 + float(exact.scale.max()) if exact.scale.numel() else 1
    )
    if bias64 is not None:
        leaves.append(bias64)
    wanted = torch.autograd.grad(exact.y, leaves, dy.double())
    size = 1.13 * dy.double().abs()  # no activation is steeper
    y = ops.sparse24_linear(x, packed, p.n, p.k, bias, p.act, out_dtype=p.out)
    got = torch.autograd.grad(y, [x] if bias is None else [x, bias], dy)
    # dy, blocks of the product and the sum of blocks are each rounded to x's dtype
    _require_close("gradient of x", got[0], wanted[0], size @ w.abs(), roundings=3, limit=slack)
    if bias is not None:
        _require_close("gradient of bias", got[1], wanted[2], size.sum_to_size(p.n), limit=slack)
    if p.act == "none":
        dy = dy.to(p.dtype)
        trained = values.clone().requires_grad_()
        m = math.prod(p.lead)
        ops.sparse24_linear_values(x, trained, meta, bias).backward(dy)
        columns = torch.tensor(slow_positions(meta, p.k), dtype=torch.long).reshape(values.shape)
        rows, inputs = dy.double().reshape(m, p.n), x.detach().double().reshape(m, p.k)
        sampled = (rows.t() @ inputs).gather(1, columns), (rows.t().abs() @ inputs.abs()).gather(1, columns)
        assert trained.grad is not None
        _require_close("gradient of values", trained.grad, *sampled, roundings=2)
        _require_close("mask_mm", ops.sparse24_mask_mm(dy, x.detach(), meta), *sampled, roundings=2)
        dx = ops.sparse24_grad_input(dy, packed, p.n, p.k)
        _require_close("grad_input", dx, dy.double() @ w, dy.double().abs() @ w.abs(), roundings=2)


def fuzz_sparse24(seed: int, isa: str) -> str | None:
    """Runs every sparse24 operator on the problem of a seed.

    Returns:
        None, or one line that says what is wrong and how to repeat it.

    >>> fuzz_sparse24(1, "portable")
    """
    p = Sparse24Problem.draw(seed, isa)
    before = lissom.cpu_isa()
    try:
        lissom.set_cpu_isa(isa)
        lissom._C.force_path(p.path)
        form = _fuzz_format(p)
        _fuzz_linear(p, *form)
        if not p.special:
            _fuzz_gradients(p, *form)
    except Exception as error:  # noqa: BLE001  (whatever it is, the seed must come out)
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        what = str(error).splitlines()[0] if str(error) else f"line {line}"
        return f"python -m lissom.testing sparse24 --seed {seed} --isa {isa}  # {type(error).__name__}: {what}; {p}"
    finally:
        lissom._C.force_path("")
        lissom.set_cpu_isa(before)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: repeats one fuzz problem, or runs many."""
    parser = argparse.ArgumentParser(prog="python -m lissom.testing", description=main.__doc__)
    parser.add_argument("family", choices=["sparse24"])
    parser.add_argument("--seed", type=int, default=0, help="the (first) problem")
    parser.add_argument("--count", type=int, default=1, help="number of problems, from --seed upwards")
    parser.add_argument("--isa", choices=tiers(), help="only this tier (default: all of this CPU)")
    chosen = parser.parse_args(arguments)
    failures = 0
    for seed in range(chosen.seed, chosen.seed + chosen.count):
        for isa in [chosen.isa] if chosen.isa else tiers():
            line = fuzz_sparse24(seed, isa)
            if line is not None:
                print(line)
                failures += 1
    print(f"{failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
