# SPDX-License-Identifier: Apache-2.0
"""The 2:4 GEMM and GEMV as nvcc compiled them: launchers over the stand-in runtime, no error on exact inputs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import interpreter
import pytest
import torch
from interpreter import LANDINGS, buffers, const, launchers

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "sparse24" / "cuda"
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
# rows, tokens, records of a stage, as in tiles.h; test_table_of_tiles compares.
TILES = [
    (256, 128, 2), (128, 128, 2), (128, 64, 2), (64, 64, 2), (64, 32, 4),
    (64, 16, 4), (64, 8, 4), (32, 32, 4), (32, 16, 4), (32, 8, 4),
]  # fmt: skip
GEMV = -1


class Arguments(ctypes.Structure):
    """LissomLinear of launch.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        *((name, ctypes.c_int32) for name in ("dtype", "out", "act", "bias_dtype")),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("records", "bias", "residual")),
        ("residual_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("scale_w", "scale_x", "y")),
    )


@pytest.fixture(scope="module")
def library(nvcc) -> ctypes.CDLL:
    lib = launchers([CUDA / "gemm.cu", CUDA / "gemv.cu"])
    lib.lissom_sparse24_gemm_workspace.restype = ctypes.c_int64
    lib.lissom_sparse24_gemm_workspace.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    return lib


def packed(values: torch.Tensor, nibbles: torch.Tensor) -> torch.Tensor:
    """sm80-v1 behind its header, as the picture in layout.h says. values [n, k / 2], nibbles [n, k / 4]."""
    n, size = values.shape[0], values.element_size()
    columns, meta = 64 // size, 256 // size
    panels, records = -(-n // 32), -(-nibbles.shape[1] * 4 // (2 * columns)) * 2
    out = torch.zeros(panels, records, meta + 1024, dtype=torch.uint8)
    rows = torch.zeros(panels * 32, records * 32, dtype=torch.uint8)
    rows[:n, : values.shape[1] * size] = values.view(torch.uint8)
    # [panel, fragment, half, g] [record, r / 2, t, byte]
    # -> [panel, record] [fragment, lane = (g, t), r = (r / 2, half), byte]
    pieces = rows.view(panels, 2, 2, 8, records, 2, 4, 4).permute(0, 4, 1, 3, 6, 5, 2, 7)
    out[:, :, meta:] = pieces.reshape(panels, records, 1024)
    padded = torch.full((panels * 32, records * columns // 4), 0xE, dtype=torch.uint8)
    padded[:n, : nibbles.shape[1]] = nibbles
    pairs = padded[:, 0::2] | padded[:, 1::2] << 4
    if (
        size == 2
    ):  # a word: two bytes (four quads) of row g, two of row g + 8; t = 2 fragment + half of the columns
        words = pairs.view(panels, 2, 2, 8, records, 2, 2).permute(0, 4, 3, 1, 5, 2, 6)
    else:  # [fragment] a word: four bytes (eight quads) of one row; t = half + 2 (half of the columns)
        words = pairs.view(panels, 2, 2, 8, records, 2, 4).permute(0, 4, 1, 3, 5, 2, 6)
    out[:, :, :meta] = words.reshape(panels, records, meta)
    return out.flatten()


@dataclass
class Case:
    tile: int
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    out: torch.dtype = torch.bfloat16
    splits: int = 1
    relu: bool = False


def exact(*shape: int) -> torch.Tensor:
    """Multiples of 1/64 in [-1, 1]: sums of products are exact in float32."""
    return torch.randint(-64, 65, shape) / 64


def solve(lib: ctypes.CDLL, case: Case, landing: str, seed: int) -> None:
    torch.manual_seed(seed)
    int8 = case.dtype is torch.int8
    draw = (lambda *s: torch.randint(-127, 128, s).float()) if int8 else exact
    granule = 8 if not int8 else 16
    x = torch.full((case.m, -(-case.k // granule) * granule), 100.0).to(case.dtype)
    x[:, : case.k] = draw(case.m, case.k).to(case.dtype)
    values = draw(case.n, case.k // 2).to(case.dtype)
    nibbles = torch.tensor(NIBBLES, dtype=torch.uint8)[torch.randint(0, 6, (case.n, case.k // 4))]
    dense = torch.zeros(case.n, case.k // 4, 4, dtype=torch.float64)
    for slot in (0, 1):
        at = (nibbles.long() >> (2 * slot)) & 3
        dense.scatter_(2, at[..., None], values.view(case.n, -1, 2)[..., slot : slot + 1].double())
    bias, residual = exact(case.n), exact(case.m, case.n).to(case.out)
    scale_w, scale_x = 2.0 ** -torch.randint(10, 13, (case.n,)), 2.0 ** torch.randint(0, 2, (case.m,))
    wanted = x[:, : case.k].double() @ dense.view(case.n, case.k).T
    if int8:
        wanted = wanted * scale_x[:, None].double() * scale_w.double()
    wanted = wanted + bias.double()
    wanted = (wanted.relu() if case.relu else wanted) + residual.double()

    records, y = packed(values, nibbles), torch.full((case.m, case.n), torch.nan).to(case.out)
    size = lib.lissom_sparse24_gemm_workspace(case.m, case.n, case.splits)
    workspace = torch.full((size // 4,), torch.nan)
    p = Arguments(
        m=case.m, n=case.n, k=case.k, dtype=CODES[case.dtype], out=CODES[case.out], act=int(case.relu)
    )
    p.x, p.x_stride, p.records, p.bias = x.data_ptr(), x.shape[1], records.data_ptr(), bias.data_ptr()
    p.residual, p.residual_stride, p.y = residual.data_ptr(), case.n, y.data_ptr()
    if int8:
        p.scale_w, p.scale_x = scale_w.data_ptr(), scale_x.data_ptr()
    read = {
        "x": x,
        "records": records,
        "bias": bias,
        "residual": residual,
        "scale_w": scale_w,
        "scale_x": scale_x,
    }
    interpreter.library().ptx_set_options(ctypes.byref(interpreter.options(landing, seed)))
    with buffers(y=y, workspace=workspace, **{name: const(array) for name, array in read.items()}):
        if case.tile == GEMV:
            status = lib.lissom_sparse24_gemv(ctypes.byref(p), None)
        else:
            where = ctypes.c_void_p(workspace.data_ptr())
            status = lib.lissom_sparse24_gemm(
                ctypes.byref(p), case.tile, case.splits, where, ctypes.c_int64(size), None
            )
    assert status == 0, interpreter.error()
    assert torch.equal(y, wanted.float().to(case.out))


def cases() -> list[Case]:
    found = []
    for tile, (rows, tokens, records) in enumerate(TILES):
        dtype = (torch.bfloat16, torch.float16, torch.int8)[tile % 3]
        stage = records * (64 if dtype is torch.int8 else 32)
        out = torch.float32 if tile % 4 == 3 else torch.float16 if dtype is torch.int8 else dtype
        found.append(Case(tile, tokens + 1, rows + 1, 2 * stage + 4, dtype, out, relu=tile % 2 == 0))
    found += [
        Case(3, 64, 64, 8 * 64, torch.float16, torch.float16),
        Case(6, 5, 72, 1100, torch.int8, torch.bfloat16),
        Case(5, 16, 64, 8 * 128),
        Case(5, 9, 72, 1000, splits=3),
        Case(8, 3, 40, 1028, torch.int8, torch.float32, splits=2),
        Case(6, 1, 8, 0),
        Case(GEMV, 1, 64, 2048),
        Case(GEMV, 2, 40, 1092, torch.float16, torch.float32),
        Case(GEMV, 3, 33, 132, relu=True),
        Case(GEMV, 4, 8, 1024),
    ]
    return found


@pytest.mark.parametrize(
    "case", cases(), ids=lambda c: f"{c.tile}-{c.m}x{c.n}x{c.k}-{c.dtype}".replace("torch.", "")
)
def test_no_error_on_exact_inputs(library, case):
    interpreter.library().ptx_set_device(80)
    for seed, landing in enumerate(LANDINGS):
        if case.m * case.n * case.k < 1 << 20 or seed == case.tile % 3:
            solve(library, case, landing, seed)


def test_nothing_to_do(library):
    for empty in (Arguments(m=0, n=32, k=32), Arguments(m=3, n=0, k=32)):
        assert library.lissom_sparse24_gemm(ctypes.byref(empty), 0, 1, None, ctypes.c_int64(0), None) == 0
        assert library.lissom_sparse24_gemv(ctypes.byref(empty), None) == 0


def test_table_of_tiles():
    text = (CUDA / "tiles.h").read_text()
    rows = [line.strip()[1:].split(",")[:3] for line in text.splitlines() if line.startswith("    {")]
    assert [tuple(map(int, row)) for row in rows] == TILES


def test_a_device_that_is_too_small(library):
    """The largest tile wants more shared memory than a consumer part has: an error of the launch, no crash."""
    interpreter.library().ptx_set_device(120)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    p = Arguments(m=1, n=1, k=64, dtype=1, out=1, x=x.data_ptr(), x_stride=64)
    assert library.lissom_sparse24_gemm(ctypes.byref(p), 0, 1, None, ctypes.c_int64(0), None) != 0
