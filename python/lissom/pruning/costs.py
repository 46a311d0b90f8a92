# SPDX-License-Identifier: Apache-2.0
"""What a layer costs in a pattern: bytes, weights that stay, or measured seconds of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F

from .pattern import Pattern
from .selection import DENSE

Cost = Callable[[tuple[int, int], "Pattern | None"], float]


def option_text(option: str) -> str:
    """One spelling for each option: "dense", or the text of the pattern."""
    return option if option == DENSE else str(Pattern.parse(option))


def price(
    shapes: Mapping[str, tuple[int, int]], options: Iterable[str], cost: Cost
) -> dict[str, dict[str, float]]:
    """The cost of every option of every layer.

    Args:
        shapes: (outputs, inputs) of each layer by name.
        options: "dense" and pattern texts; a pattern that does not fit a layer is not among its options.
        cost: of a layer of a shape in a pattern (None: dense), such as `layer_bytes`, `kept_weights` or a
            `DecodeTimer`.

    Returns:
        Costs by layer name and option.

    Example:
        >>> price({"up": (16, 8)}, ["dense", "2:4", "50%", "3:5"], layer_bytes)
        {'up': {'dense': 256, '2:4': 144, '50%': 256}}
    """
    parsed = {option_text(option): None if option == DENSE else Pattern.parse(option) for option in options}
    return {
        name: {
            option: cost(shape, pattern)
            for option, pattern in parsed.items()
            if pattern is None or pattern.obstacle(shape[1], shape[0]) is None
        }
        for name, shape in shapes.items()
    }


def layer_bytes(shape: tuple[int, int], pattern: Pattern | None, *, itemsize: int = 2) -> int:
    """Bytes of a weight as it is saved.

    Only what fits the packed 2:4 form is smaller: K/2 values and K/8 bytes of metadata a row. Zeros of every
    other pattern (unstructured, 4:8, ...) are stored like any value, so under a budget in bytes they only cost
    accuracy and are never chosen.

    Args:
        shape: (outputs N, inputs K).
        pattern: None for dense.
        itemsize: bytes of a value.

    Returns:
        Bytes.

    Example:
        >>> layer_bytes((1, 16), None), layer_bytes((1, 16), Pattern.parse("2:4"))
        (32, 18)
    """
    outputs, inputs = shape
    if _runs_packed(shape, pattern):
        return outputs * (inputs // 2 * itemsize + -(-inputs // 8))
    return outputs * inputs * itemsize


def kept_weights(shape: tuple[int, int], pattern: Pattern | None) -> int:
    """Weights that stay: the cost for a budget that is a share of all weights, whatever form they are stored in.

    Args:
        shape: (outputs, inputs).
        pattern: None for dense.

    Returns:
        Number of weights.
    """
    total = shape[0] * shape[1]
    return total if pattern is None else total - pattern.count(total)


class DecodeTimer:
    """Seconds that a linear layer takes for one token on this machine, with weights that come from memory.

    Patterns that fit the packed 2:4 form are timed in `lissom.ops.sparse24_linear`, all others in `F.linear`,
    which gains nothing from zeros. Each shape is timed once, both forms interleaved, and the median is kept.

    Args:
        dtype: of weights and activations.
        threads: None leaves torch's.
        rounds: of the timing.
        cold_bytes: copies of the weight fill this many bytes, so that each call finds its own uncached.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        *,
        threads: int | None = None,
        rounds: int = 9,
        cold_bytes: int = 256 << 20,
    ) -> None:
        self.dtype = dtype
        self.threads = threads
        self.rounds = rounds
        self.cold_bytes = cold_bytes
        self._seconds: dict[tuple[int, int], dict[str, float]] = {}

    def __call__(self, shape: tuple[int, int], pattern: Pattern | None) -> float:
        """Seconds of a layer (outputs, inputs) in a pattern; None for dense."""
        if shape not in self._seconds:
            self._seconds[shape] = self._measure(shape)
        return self._seconds[shape]["packed" if _runs_packed(shape, pattern) else "dense"]

    def _measure(self, shape: tuple[int, int]) -> dict[str, float]:
        from lissom import ops
        from lissom.benchmark.machine import median_seconds, torch_threads

        outputs, inputs = shape
        x = torch.ones(1, inputs, dtype=self.dtype)
        weights = self._copies(torch.ones(shape, dtype=self.dtype))
        calls: dict[str, Callable[[int], torch.Tensor]] = {
            "dense": lambda index: F.linear(x, weights[index % len(weights)])
        }
        if inputs % 4 == 0:
            pruned = torch.ones(outputs, inputs // 4, 4, dtype=self.dtype)
            pruned[..., :2] = 0
            packed = self._copies(ops.sparse24_pack(*ops.sparse24_compress(pruned.view(shape))))
            calls["packed"] = lambda index: ops.sparse24_linear(
                x, packed[index % len(packed)], outputs, inputs
            )
        with torch_threads(self.threads or torch.get_num_threads()), torch.inference_mode():
            return median_seconds(calls, self.rounds)

    def _copies(self, tensor: torch.Tensor) -> torch.Tensor:
        count = max(2, -(-self.cold_bytes // (tensor.numel() * tensor.element_size())))
        return tensor.expand(count, *tensor.shape).contiguous()


def _runs_packed(shape: tuple[int, int], pattern: Pattern | None) -> bool:
    return pattern is not None and pattern.fits_quads and shape[1] % 4 == 0
