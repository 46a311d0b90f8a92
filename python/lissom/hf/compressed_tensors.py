# SPDX-License-Identifier: Apache-2.0
"""Reads weights in the retired sparse formats of compressed-tensors, which no other library runs any more.

``sparse-24-bitmask`` and the older ``sparse-bitmask`` store three tensors a weight: ``shape`` (two int64),
``compressed`` (the kept values in row-major order) and ``bitmask`` (uint8 ``[N, ceil(K/8)]``; bit i of
byte j is set where column 8j+i is kept).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lissom import ops

_PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def from_compressed_tensors(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turns a bitmask-compressed state dict into lissom's: ``<module>.weight`` and ``<module>.weight_meta``.

    Load the result into a model after ``lissom.sparsify``, or write it as the weights of a packed folder.

    Args:
        state_dict: tensors named ``<module>.compressed`` or ``<module>.weight.compressed``, and so on for
            ``shape`` and ``bitmask``; all others are passed through.

    Returns:
        A new dict; values ``[N, K/2]`` in the dtype of ``compressed``, metadata uint8 ``[N, ceil(K/8)]``.

    Raises:
        ValueError: a part is missing, sizes disagree, or a weight is not 2:4.
        TypeError: ``compressed`` is not float32, bfloat16 or float16.

    Example:
        >>> old = {"up.shape": torch.tensor([[1], [4]]), "up.compressed": torch.tensor([[5., 7.]]),
        ...        "up.bitmask": torch.tensor([[0b1010]], dtype=torch.uint8)}
        >>> {name: tensor.tolist() for name, tensor in from_compressed_tensors(old).items()}
        {'up.weight': [[5.0, 7.0]], 'up.weight_meta': [[13]]}
    """
    owners = [name.removesuffix(".bitmask") for name in state_dict if name.endswith(".bitmask")]
    parts = {f"{owner}.{part}" for owner in owners for part in _PARTS}
    converted = {name: tensor for name, tensor in state_dict.items() if name not in parts}
    for owner in owners:
        for part in ("shape", "compressed"):
            if f"{owner}.{part}" not in state_dict:
                raise ValueError(f"{owner}.bitmask has no {owner}.{part} beside it")
        module = owner.removesuffix(".weight")
        dense = _decode(
            owner, *(state_dict[f"{owner}.{part}"] for part in ("shape", "compressed", "bitmask"))
        )
        try:
            values, meta = ops.sparse24_compress(dense)
        except ValueError as error:
            raise ValueError(f"{owner} cannot be packed: {error}") from error
        converted[f"{module}.weight"], converted[f"{module}.weight_meta"] = values, meta
    return converted


def _decode(owner: str, shape: torch.Tensor, compressed: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    if compressed.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{owner}.compressed must be float32, bfloat16 or float16, got {compressed.dtype}")
    sizes = shape.flatten().tolist()
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"{owner}.shape must hold two positive sizes, got {sizes}")
    rows, columns = sizes
    wanted = [rows, (columns + 7) // 8]
    if bitmask.dtype != torch.uint8 or list(bitmask.shape) != wanted:
        raise ValueError(f"{owner}.bitmask must be uint8 {wanted}, got {bitmask.dtype} {list(bitmask.shape)}")
    bits = bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    kept = bits.flatten(1)[:, :columns].bool()
    if int(kept.sum()) != compressed.numel():
        raise ValueError(
            f"{owner}.bitmask keeps {int(kept.sum())} values, compressed has {compressed.numel()}"
        )
    dense = torch.zeros(rows, columns, dtype=compressed.dtype)
    dense[kept] = compressed.flatten()
    return dense
