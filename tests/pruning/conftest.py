# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture
def layer():
    """Makes the synthetic layer of docs/systems/pruning.md: correlated inputs with a few outliers."""

    def make(columns, rows=128, tokens=4096, seed=0, dtype=torch.float64):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        rotation = torch.linalg.qr(normal(columns, columns))[0]
        spectrum = torch.arange(1, columns + 1, dtype=torch.float64).rsqrt()
        scales = torch.exp(0.5 * normal(columns))
        scales[torch.randperm(columns, generator=random)[:4]] *= 10
        inputs = scales[:, None] * (rotation @ (spectrum[:, None] * normal(columns, tokens)))
        weight = normal(rows, columns) * torch.exp(0.4 * normal(rows, columns))
        return weight.to(dtype), (inputs @ inputs.t()).to(dtype)

    return make
