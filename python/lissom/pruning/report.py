# SPDX-License-Identifier: Apache-2.0
"""What pruning says about itself: plan, progress, result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One pruned linear layer.

    Attributes:
        name: full module name.
        shape: (outputs, inputs).
        pattern: the pattern as text.
        sparsity: share of the weights that the mask prunes.
        relative_error: ||W' X - W X||^2 / ||W X||^2 on the calibration tokens; None when none were given.
        seconds: its share of the time its group took to solve.
        dead_inputs: inputs that were zero on every calibration token.
        damp: share of the mean diagonal that was added to the Gram matrix; None without one.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    relative_error: float | None
    seconds: float
    dead_inputs: int = 0
    damp: float | None = None


@dataclass(frozen=True)
class BlockReport:
    """Where the time of one block went: statistics, solves, training, the forward pass that feeds the next block.

    Attributes:
        losses: mean relative error of a token of the block's output in the first and the last pass of its
            reconstruction; None without one.
    """

    name: str
    collect_seconds: float
    solve_seconds: float
    advance_seconds: float = 0.0
    reconstruct_seconds: float = 0.0
    losses: tuple[float, float] | None = None

    @property
    def seconds(self) -> float:
        """The whole time spent on the block."""
        return self.collect_seconds + self.solve_seconds + self.reconstruct_seconds + self.advance_seconds


@dataclass(frozen=True)
class BlockProgress:
    """Sent to `on_progress` after each block.

    Attributes:
        block: how many blocks are finished (1 for the first).
        blocks: how many there are to do.
        name: the block that was just finished.
        seconds: time of this block.
        elapsed: time of all finished blocks.
        remaining: estimate for the blocks that are not resumed, from the mean of those solved so far.
        resumed: the block's weights came from `state_dir`.
        layers: reports of the block's layers.
    """

    block: int
    blocks: int
    name: str
    seconds: float
    elapsed: float
    remaining: float
    resumed: bool
    layers: list[LayerReport]


@dataclass(frozen=True)
class PruneReport:
    """The result of pruning a model.

    Attributes:
        method, pattern: as asked for.
        layers: every pruned layer, in running order.
        left: a reason for every linear layer that was not pruned.
        blocks: where the time went.
        touched_parameters: weights in pruned layers.
        total_parameters: parameters of the model.
        calibration: tokens and how they were chosen; empty for magnitude without data.
        seconds: whole run.
        refit: how kept weights were solved for under the final mask; False when they were not.
        blend: weight of the dense model's outputs in every layer's target.
        permuted: channels were put in another order first.
    """

    method: str
    pattern: str
    layers: list[LayerReport]
    left: dict[str, str]
    blocks: list[BlockReport]
    touched_parameters: int
    total_parameters: int
    calibration: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    refit: bool | str = False
    blend: float = 0.0
    permuted: bool = False

    @property
    def touched_share(self) -> float:
        """Share of the model's parameters that lie in pruned layers."""
        return self.touched_parameters / self.total_parameters

    @property
    def sparsity(self) -> float:
        """Share of the touched weights that was pruned."""
        pruned = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in self.layers)
        return pruned / self.touched_parameters

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return {**asdict(self), "touched_share": self.touched_share, "sparsity": self.sparsity}


@dataclass(frozen=True)
class PrunePlan:
    """What a run would do.

    Attributes:
        method, pattern: as asked for.
        touched: names of the layers that would be pruned.
        left: a reason for every other linear layer.
        touched_parameters: weights in these layers.
        total_parameters: parameters of the model.
        peak_bytes: estimate of the memory at the peak, the model included.
        estimated_seconds: estimate of the time, from short matmuls on this machine.
    """

    method: str
    pattern: str
    touched: list[str]
    left: dict[str, str]
    touched_parameters: int
    total_parameters: int
    peak_bytes: int
    estimated_seconds: float

    @property
    def touched_share(self) -> float:
        """Share of the model's parameters that lie in layers to be pruned."""
        return self.touched_parameters / self.total_parameters

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        return {**asdict(self), "touched_share": self.touched_share}
