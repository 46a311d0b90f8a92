# SPDX-License-Identifier: Apache-2.0
"""Block reconstruction: the kept weights of one block trained a little against the dense block's outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from ..models.stream import BlockStream
from ..models.walk import LinearRef


@dataclass(frozen=True)
class Reconstruction:
    """How long and how fast the kept weights of a block are trained.

    Attributes:
        passes: over the calibration tokens.
        learning_rate: of Adam at the start; it falls to zero along a half cosine.
        sequences: per step.
    """

    passes: int = 4
    learning_rate: float = 5e-4
    sequences: int = 1

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"reconstruct passes must be at least 1, got {self.passes}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"reconstruct learning_rate must lie in (0, 1), got {self.learning_rate}")
        if self.sequences < 1:
            raise ValueError(f"reconstruct sequences must be at least 1, got {self.sequences}")


def reconstruct_block(
    block: nn.Module,
    linears: Sequence[LinearRef],
    stream: BlockStream,
    target: torch.Tensor,
    settings: Reconstruction,
) -> tuple[float, float]:
    """Train the weights of pruned linears that are not zero, in place; zeros stay zeros.

    The loss of a token is ||y - t||^2 / ||t||^2 with t the dense model's output of this block (its residual
    stream) and y that of the pruned block on the pruned model's inputs: relative, because a few tokens (the
    first of a text) are hundreds of times larger than the rest. Weights are kept in float32 while they are
    trained and rounded to their own type in every forward pass.

    Args:
        block: the block in front of which `stream` stands, pruned weights in place.
        linears: its pruned linears.
        stream: hidden states of the pruned model.
        target: outputs [S, T, d] of the dense model's block.
        settings: passes and learning rate.

    Returns:
        Mean loss of a token in the first and in the last pass.
    """
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    trained = {names[id(linear.parameter)]: linear.parameter for linear in linears}
    masters = {name: weight.detach().float().requires_grad_() for name, weight in trained.items()}
    kept = {name: weight != 0 for name, weight in trained.items()}
    adam = torch.optim.Adam(masters.values(), lr=settings.learning_rate, betas=(0.9, 0.95))
    steps = settings.passes * stream.batch_count
    losses = []
    with torch.enable_grad():
        for number in range(settings.passes):
            total = 0.0
            for step, (low, high, real) in enumerate(stream.bounds()):
                for group in adam.param_groups:
                    done = (number * stream.batch_count + step) / steps
                    group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
                weights = {name: master.to(trained[name].dtype) for name, master in masters.items()}
                out = stream.call(
                    step, lambda *args, w=weights, **kwargs: functional_call(block, w, args, kwargs)
                )
                loss = _token_loss(out, target[low:high], real)
                adam.zero_grad()
                loss.backward()
                for name, master in masters.items():
                    assert master.grad is not None
                    master.grad.mul_(kept[name])
                adam.step()
                total += loss.item()
            losses.append(total / stream.batch_count)
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(masters[name] * kept[name])
    return losses[0], losses[-1]


def _token_loss(out: torch.Tensor, target: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    wanted = target.float()
    lost = (out.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
    return lost.mean() if real is None else lost.reshape(-1)[real].mean()
