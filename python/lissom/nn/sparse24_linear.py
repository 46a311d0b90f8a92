# SPDX-License-Identifier: Apache-2.0
"""nn.Linear with a 2:4 sparse weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lissom import ops
from lissom.reference.sparse24 import DTYPES, meta_columns


class Sparse24Linear(nn.Linear):
    """y = x W^T + bias with W [out, in] 2:4 sparse, kept in 9/16 of the bytes (16-bit types), read as such.

    The state dict holds the canonical form: `weight` [out, in/2] the kept values, `weight_meta`
    [out, ceil(in/8)] uint8, `bias` [out]. In memory a frozen weight exists only in the layout of the kernels:
    `weight` is then a placeholder of the right shape, dtype and device whose every element is NaN, so that
    code which takes it for a dense matrix fails visibly; use `dense_weight()`. A weight that requires grad is
    kept canonical and packed at every call. Weights start frozen: call `requires_grad_(True)` to train them.
    The mask never changes in training.

    Each device has its own layout: a move unpacks on the old device and packs on the new one. float32 has none
    on CUDA: the weight stays canonical there and is expanded at every call, with a warning once.

    Args:
        in_features: a multiple of 4.
        out_features, bias, device, dtype: as nn.Linear; float32, bfloat16 or float16.

    Raises:
        ValueError: in_features is not a multiple of 4. TypeError: other dtypes.

    >>> layer = Sparse24Linear(32, 16)
    >>> layer(torch.ones(3, 32)).shape
    torch.Size([3, 16])
    """

    weight_meta: Tensor | None
    packed: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if in_features % 4:
            raise ValueError(f"Sparse24Linear: in_features must be a multiple of 4; got {in_features}")
        self.in_features, self.out_features = in_features, out_features
        made = torch.empty(out_features, in_features // 2, device=device, dtype=dtype)
        if made.dtype not in DTYPES:
            raise TypeError(f"Sparse24Linear: dtype must be float32, bfloat16 or float16; got {made.dtype}")
        self.weight = nn.Parameter(made, requires_grad=False)
        meta = torch.empty(out_features, meta_columns(in_features), dtype=torch.uint8, device=made.device)
        self.register_buffer("weight_meta", meta)
        self.register_buffer("packed", None, persistent=False)
        offset = torch.empty(out_features, device=made.device, dtype=made.dtype) if bias else None
        self.register_parameter("bias", None if offset is None else nn.Parameter(offset))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A random 2:4 weight with the scale of nn.Linear's."""
        if self.weight.is_meta:
            return
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, self.weight.device)
        with torch.no_grad():
            self._set_canonical(
                *ops.sparse24_compress(dense.weight.to(self.weight.dtype), pattern="magnitude")
            )
            if self.bias is not None:
                self.bias.copy_(dense.bias)
        self.pack_()

    # --- the two states

    def _set_canonical(self, values: Tensor, meta: Tensor) -> None:
        self.weight.data = values
        self.weight_meta, self.packed = meta, None

    def canonical(self) -> tuple[Tensor, Tensor]:
        """(values [out, in/2], meta [out, ceil(in/8)] uint8), unpacked where only the packed form exists.

        >>> [t.shape for t in Sparse24Linear(32, 16).canonical()]
        [torch.Size([16, 16]), torch.Size([16, 4])]
        """
        if self.packed is None:
            assert self.weight_meta is not None
            return self.weight, self.weight_meta
        return ops.sparse24_unpack(self.packed, self.out_features, self.in_features, dtype=self.weight.dtype)

    def pack_(self) -> Sparse24Linear:
        """Checks the metadata; moves a frozen weight into the layout of the kernels.

        Called by loading, `.to()` and `from_linear`; call it yourself after assigning `weight` or
        `weight_meta`.

        Raises:
            ValueError: corrupt metadata, or shapes that do not fit this layer.
            RuntimeError: the weight was taken from another layer that is packed.

        >>> Sparse24Linear(32, 16).pack_().packed.dtype
        torch.uint8
        """
        if self.packed is not None or self.weight.is_meta:
            return self
        assert self.weight_meta is not None
        shape = (self.out_features, self.in_features // 2)
        if tuple(self.weight.shape) != shape:
            raise ValueError(f"Sparse24Linear: weight must be {list(shape)}; got {list(self.weight.shape)}")
        if self.weight.stride() == (0, 0):
            raise RuntimeError(
                "Sparse24Linear: weight is the placeholder of another layer's packed weight; "
                "share the layer itself, or call unpack_() on the other one first"
            )
        if self.weight.requires_grad or not self._has_packed_form():
            ops.sparse24_validate_meta(self.weight_meta, self.in_features)
            return self
        self.packed = ops.sparse24_pack(self.weight.detach(), self.weight_meta)
        self.weight.data = torch.full(
            (), torch.nan, dtype=self.weight.dtype, device=self.weight.device
        ).expand(shape)
        self.weight_meta = None
        return self

    def _has_packed_form(self) -> bool:
        return ops.sparse24_target(self.weight.device, self.weight.dtype) is not None

    def unpack_(self) -> Sparse24Linear:
        """Moves the weight back into its canonical form, as training and edits need it.

        >>> Sparse24Linear(32, 16).unpack_().weight.isnan().any().item()
        False
        """
        if self.packed is not None:
            self._set_canonical(*self.canonical())
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled():
            self.unpack_()
        elif self.packed is None and not self.weight.requires_grad and self._has_packed_form():
            self.pack_()
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.weight.dtype)
        if self.packed is None:
            assert self.weight_meta is not None
            return ops.sparse24_linear_values(x, self.weight, self.weight_meta, self.bias)
        return ops.sparse24_linear(x, self.packed, self.out_features, self.in_features, self.bias)

    # --- dense and back

    def dense_weight(self) -> Tensor:
        """W [out, in] with its zeros.

        >>> Sparse24Linear(32, 16).dense_weight().count_nonzero().item()
        256
        """
        values, meta = self.canonical()
        return ops.sparse24_decompress(values.detach(), meta, self.in_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, pattern: str = "auto") -> Sparse24Linear:
        """The sparse form of a dense layer; the bias is shared, not copied.

        Args:
            pattern: "auto" wants the weight to be 2:4 already; "magnitude" keeps the two largest of a quad.

        Raises:
            ValueError: the weight is not 2:4, or in_features is not a multiple of 4.

        >>> Sparse24Linear.from_linear(nn.Linear(32, 16), pattern="magnitude").packed.dtype
        torch.uint8
        """
        values, meta = ops.sparse24_compress(linear.weight.detach(), pattern=pattern)
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", dtype=values.dtype)
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.weight_meta = meta
        layer.bias = linear.bias
        layer.train(linear.training)
        return layer.pack_()

    def to_linear(self) -> nn.Linear:
        """An ordinary nn.Linear with the same function; the bias is shared.

        >>> type(Sparse24Linear(32, 16).to_linear()) is nn.Linear
        True
        """
        linear = nn.Linear(
            self.in_features, self.out_features, bias=False, device="meta", dtype=self.weight.dtype
        )
        linear.weight = nn.Parameter(self.dense_weight(), requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    # --- nn.Module's hooks: the state dict is canonical, whatever the state in memory

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            values, meta = self.canonical()
            destination[prefix + "weight"] = (
                nn.Parameter(values, requires_grad=False) if keep_vars else values
            )
            destination[prefix + "weight_meta"] = meta

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        strict_errors: list[str] = args[4]
        before = len(strict_errors)
        self.unpack_()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(strict_errors) > before:
            return
        try:
            self.pack_()
        except ValueError as error:
            strict_errors.append(f"{prefix}weight_meta: {error}")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Sparse24Linear:
        # Through the canonical form: each device has its own layout, and a change of dtype needs the values themselves.
        was_packed = self.packed is not None
        self.unpack_()
        super()._apply(fn, recurse)
        return self.pack_() if was_packed else self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern=2:4"
