# SPDX-License-Identifier: Apache-2.0
"""Every sparse24 operator against slow float64 references on random problems.

Long runs: `pytest tests/ops/test_sparse24_fuzz.py --fuzz 100000`. A failure is one line that repeats it.
"""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom import testing


def test_random_problems(isa, request):
    torch.set_num_threads(1)
    count = -(-request.config.getoption("--fuzz") // len(testing.tiers()))
    first = testing.TIERS.index(isa) * 10_000_000  # other problems in every tier
    failures = [line for seed in range(first, first + count) if (line := testing.fuzz_sparse24(seed, isa))]
    if failures:
        pytest.fail(f"{len(failures)} of {count}:\n" + "\n".join(failures[:5]), pytrace=False)


@pytest.mark.parametrize("name", ["linear", "mask_mm", "compress", "unpack", "grad_input"])
def test_a_wrong_result_is_one_line_that_repeats_it(monkeypatch, name, capsys):
    right = getattr(lissom.ops, f"sparse24_{name}")

    def wrong(*args, **options):
        result = right(*args, **options)
        spoiled = result[0] if isinstance(result, tuple) else result
        if spoiled.numel():
            spoiled.view(-1)[-1] += 1
        return result

    monkeypatch.setattr(lissom.ops, f"sparse24_{name}", wrong)
    found = [line for seed in range(12) if (line := testing.fuzz_sparse24(seed, "portable"))]
    assert found
    command = found[0].split("  #")[0].split()
    assert command[:3] == ["python", "-m", "lissom.testing"]
    assert testing.main(command[3:]) == 1
    assert capsys.readouterr().out.splitlines()[0] == found[0]


def test_settings_survive_a_failure(monkeypatch):
    monkeypatch.setattr(lissom.ops, "sparse24_check", lambda w: 1 / 0)
    before = lissom.cpu_isa()
    assert "ZeroDivisionError" in testing.fuzz_sparse24(0, "portable")
    assert lissom.cpu_isa() == before
