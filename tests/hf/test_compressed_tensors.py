# SPDX-License-Identifier: Apache-2.0
"""State dicts of the retired compressed-tensors formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom import ops
from lissom.hf.compressed_tensors import from_compressed_tensors
from lissom.nn import Sparse24Linear


def bitmask_compress(weight: torch.Tensor, name: str, *, two_four: bool = True) -> dict[str, torch.Tensor]:
    """The old writer, told by its format: top 2 of 4 by magnitude are kept, or all non-zeros."""
    if two_four:
        quads = weight.abs().view(-1, 4)
        kept = torch.zeros_like(quads, dtype=torch.bool).scatter_(1, quads.topk(2, 1).indices, True)
        kept = kept.view_as(weight)
        compressed = weight[kept].view(weight.shape[0], -1)
    else:
        kept = weight != 0
        compressed = weight[kept]
    bits = torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little"))
    shape = torch.tensor(weight.shape).view(-1, 1)
    return {f"{name}.shape": shape, f"{name}.compressed": compressed, f"{name}.bitmask": bits}


@pytest.fixture
def weight():
    torch.manual_seed(0)
    weight = torch.randn(16, 36)
    weight.view(-1, 4).scatter_(1, weight.abs().view(-1, 4).topk(2, 1, largest=False).indices, 0)
    weight[0, :8] = 0  # quads with fillers
    weight[1, 1:4] = 0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("two_four", [True, False])
def test_decodes_to_the_same_weight(weight, dtype, suffix, two_four):
    weight = weight.to(dtype)
    old = bitmask_compress(weight, f"mlp.up{suffix}", two_four=two_four)
    if not two_four:
        counts = (weight != 0).sum(1)
        old[f"mlp.up{suffix}.row_offsets"] = counts.cumsum(0) - counts
    state = from_compressed_tensors({**old, "norm.weight": torch.ones(3)})
    assert set(state) == {"mlp.up.weight", "mlp.up.weight_meta", "norm.weight"}
    assert torch.equal(
        ops.sparse24_decompress(state["mlp.up.weight"], state["mlp.up.weight_meta"], 36), weight
    )
    values, meta = ops.sparse24_compress(weight)
    assert torch.equal(state["mlp.up.weight"], values)
    assert torch.equal(state["mlp.up.weight_meta"], meta), "the canonical form is unique"


def test_loads_into_the_module(weight):
    state = from_compressed_tensors(bitmask_compress(weight, "layer"))
    module = Sparse24Linear(36, 16, bias=False)
    module.load_state_dict({name.removeprefix("layer."): tensor for name, tensor in state.items()})
    x = torch.randn(3, 36)
    torch.testing.assert_close(module(x), x @ weight.T)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a.shape": None}, ValueError, r"a\.bitmask has no a\.shape"),
        (
            {"a.compressed": torch.zeros(16, 18, dtype=torch.int8)},
            TypeError,
            "must be float32, bfloat16 or float16",
        ),
        (
            {"a.compressed": torch.zeros(16, 17)},
            ValueError,
            r"a\.compressed must be \[16, 18\], .* got \[16, 17\]",
        ),
        ({"a.compressed": torch.zeros(272)}, ValueError, r"keeps 288 values, a\.compressed has 272"),
        (
            {"a.shape": torch.tensor([16, 44])},
            ValueError,
            r"must be U8 \[16, 6\] .* got U8 \[16, 5\]",
        ),
        ({"a.shape": torch.tensor([16])}, ValueError, r"must be U8 \[2\] for a tensor of \[16\]"),
        ({"a.shape": torch.tensor([16, 0])}, ValueError, "positive sizes"),
        (
            {"a.bitmask": torch.tensor([[0x77] * 4 + [0x07]] * 16).byte(), "a.compressed": torch.ones(432)},
            ValueError,
            r"cannot be packed: it is not 2:4 \(row 0, columns 0 to 7\)",
        ),
        (
            {"a.bitmask": torch.full((16, 5), 0x17, dtype=torch.uint8)},
            ValueError,
            "keeps columns behind the last",
        ),
    ],
)
def test_refusals(weight, change, error, message):
    state = bitmask_compress(weight, "a") | change
    with pytest.raises(error, match=message):
        from_compressed_tensors({name: tensor for name, tensor in state.items() if tensor is not None})


def test_what_has_no_bitmask_is_passed_through():
    state = {"a.weight": torch.ones(2)}
    assert from_compressed_tensors(state) == state
