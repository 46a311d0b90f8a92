# SPDX-License-Identifier: Apache-2.0
"""PTX that nobody here wrote: Triton compiles a matmul and a softmax for sm_80, without a GPU; run here.

An independent proof of cp.async, ldmatrix, ldmatrix.trans, mma.sync and the shuffles. Optional: needs Triton, in
this environment or in another one whose Python --triton-python names.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import interpreter
import numpy as np
import pytest
import torch
from interpreter import const

pytestmark = pytest.mark.optional
KERNELS = Path(__file__).resolve().parent / "kernels" / "triton_kernels.py"


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    python = request.config.getoption("--triton-python", default=None) or sys.executable
    probe = subprocess.run([python, "-c", "import triton"], capture_output=True)
    if probe.returncode:
        pytest.skip("no triton in this environment: --triton-python names another one")
    done = subprocess.run(
        [python, str(KERNELS), str(tmp_path_factory.mktemp("triton"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("landing", interpreter.LANDINGS)
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 32), (100, 72, 96), (128, 128, 256), (256, 256, 256)])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_matmul_is_exact(compiled, dtype, m, n, k, landing):
    rng = np.random.default_rng(m + n + k)
    kind = torch.float16 if dtype == "fp16" else torch.bfloat16
    a, b = (torch.from_numpy(rng.integers(-64, 65, shape) / 64).to(kind) for shape in ((m, k), (k, n)))
    c = torch.full((m, n), float("nan"))
    module = interpreter.load(Path(compiled[f"matmul_{dtype}"]["ptx"]).read_text(encoding="utf-8"))
    args = [const(a), const(b), c, m, n, k, k, n, n, 0, 0]
    grid = ((m + 63) // 64, (n + 63) // 64)
    shared = compiled[f"matmul_{dtype}"]["shared"]
    module.launch(
        "matmul", grid, 128, args, shared=shared, landing=landing, seed=len(landing), strict_zero_fill=0
    )
    assert torch.equal(c.double(), a.double() @ b.double())


@pytest.mark.parametrize("columns", [1, 777, 1024])
def test_softmax(compiled, columns):
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    y = torch.full_like(x, float("nan"))
    module = interpreter.load(Path(compiled["softmax"]["ptx"]).read_text(encoding="utf-8"))
    module.launch(
        "softmax", 5, 128, [y, const(x), columns, columns, 0, 0], shared=compiled["softmax"]["shared"], seed=4
    )
    torch.testing.assert_close(y, x.softmax(1), rtol=1e-5, atol=1e-7)
