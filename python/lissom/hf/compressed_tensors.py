# SPDX-License-Identifier: Apache-2.0
"""Reads state dicts in the retired sparse formats of compressed-tensors, which no other library runs any more.

`lissom.hf.convert_folder` converts whole folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lissom.hf.foreign.bitmask import BitmaskWeight
from lissom.hf.foreign.declared import Declared
from lissom.hf.foreign.find import find_weights
from lissom.models.shards import DTYPES

_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_VALUES = (torch.float32, torch.bfloat16, torch.float16)


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
    for name, tensor in state_dict.items():
        if name.endswith(".compressed") and tensor.dtype not in _VALUES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if not any(name.endswith(".bitmask") for name in state_dict):
        return dict(state_dict)
    held = {name: _Held(name, tensor) for name, tensor in state_dict.items()}
    found = find_weights(held, Declared())
    converted = {name: state_dict[name] for name in found.others}
    for weight in found.weights.values():
        if not isinstance(weight, BitmaskWeight):
            raise ValueError(
                f"{weight.name} is stored as {weight.format}: convert its folder with convert_folder"
            )
        obstacle = weight.obstacle()
        if obstacle is not None:
            raise ValueError(f"{weight.name} cannot be packed: {obstacle}")
        module = weight.name.removesuffix(".weight")
        converted[f"{module}.weight"], converted[f"{module}.weight_meta"] = weight.packed()
    return converted


@dataclass(frozen=True)
class _Held:
    """A tensor in memory, spoken of like one in a file."""

    name: str
    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        return _SPELLED.get(self.tensor.dtype, str(self.tensor.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> torch.Tensor:
        return self.tensor.detach().cpu().clone()
