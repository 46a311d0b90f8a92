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
from .parallel import Ranks


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


class _Trainee:
    """The weights of a block that are trained: float32 masters, which of their entries move, and their Adam."""

    def __init__(self, block: nn.Module, linears: Sequence[LinearRef], learning_rate: float) -> None:
        names = {id(parameter): name for name, parameter in block.named_parameters()}
        self.weights = {names[id(linear.parameter)]: linear.parameter for linear in linears}
        chosen = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        for linear in linears:
            mine = chosen[names[id(linear.parameter)]]
            (mine if linear.expert is None else mine[linear.expert]).fill_(True)
        self.moving = {name: chosen[name] & (weight != 0) for name, weight in self.weights.items()}
        self.masters = {
            name: weight.detach().float().requires_grad_() for name, weight in self.weights.items()
        }
        self.adam = torch.optim.Adam(self.masters.values(), lr=learning_rate, betas=(0.9, 0.95))

    def rounded(self) -> dict[str, torch.Tensor]:
        """The masters in the type of the weights, differentiable."""
        return {name: master.to(self.weights[name].dtype) for name, master in self.masters.items()}

    def step(self, loss: torch.Tensor, learning_rate: float) -> None:
        """One step of Adam down the gradient of a loss; what does not move keeps its bits."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.zero_grad()
        loss.backward()
        for name, master in self.masters.items():
            assert master.grad is not None
            master.grad.mul_(self.moving[name])
        self.adam.step()

    def hand_over(self, ranks: Ranks, owner: int) -> None:
        """Give all processes the masters and moments of one of them."""
        own = self.adam.state
        if ranks.rank != owner:
            for master in self.masters.values():
                own[master] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(master),
                    "exp_avg_sq": torch.zeros_like(master),
                }
        held = {f"{name}.master": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            held |= {f"{name}.{key}": value for key, value in own[master].items()}
        found = ranks.exchange({name: each if ranks.rank == owner else None for name, each in held.items()})
        for name, each in held.items():
            each.copy_(found[name])

    def write(self) -> None:
        """Put what was trained into the block."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(torch.where(self.moving[name], self.masters[name].to(weight.dtype), weight))


def reconstruct_block(
    block: nn.Module,
    linears: Sequence[LinearRef],
    stream: BlockStream,
    target: torch.Tensor,
    *,
    settings: Reconstruction,
    ranks: Ranks,
) -> tuple[float, float]:
    """Train the weights of pruned linears that are not zero, in place; zeros stay zeros.

    The loss of a token is ||y - t||^2 / ||t||^2 with t the dense model's output of this block (its residual
    stream) and y that of the pruned block on the pruned model's inputs: relative, because a few tokens (the
    first of a text) are hundreds of times larger than the rest. Weights are kept in float32 while they are
    trained and rounded to their own type in every forward pass.

    Of several processes one trains at a time, on its own share of the tokens, and hands weights and moments on: the
    order of the steps, and so the result, is that of one process. More processes do not make it faster.

    Args:
        block: the block in front of which `stream` stands, pruned weights in place.
        linears: its pruned linears.
        stream: hidden states of the pruned model, this process's share.
        target: outputs [S, T, d] of the dense model's block.
        settings: passes and learning rate.
        ranks: the processes; all of them call this.

    Returns:
        Mean loss of a token in the first and in the last pass.
    """
    trainee = _Trainee(block, linears, settings.learning_rate)
    turns: list[int] = ranks.gather_objects(stream.batch_count)
    steps, done = settings.passes * sum(turns), 0
    losses = []
    for _ in range(settings.passes):
        total = 0.0
        for owner, turn in enumerate(turns):
            with ranks.section("block reconstruction"):
                if owner == ranks.rank:
                    rates = [
                        settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                        for step in range(done, done + turn)
                    ]
                    total += _train(block, trainee, stream, target, rates)
            if ranks.size > 1:
                trainee.hand_over(ranks, owner)
            done += turn
        losses.append(sum(ranks.gather_objects(total)) / sum(turns))
    trainee.write()
    return losses[0], losses[-1]


@torch.enable_grad()
def _train(
    block: nn.Module, trainee: _Trainee, stream: BlockStream, target: torch.Tensor, rates: list[float]
) -> float:
    """One pass over this process's batches, each with its learning rate; the sum of their losses."""
    total = 0.0
    for number, (low, high, real) in enumerate(stream.bounds()):
        weights = trainee.rounded()
        out = stream.call(number, lambda *args, w=weights, **kwargs: functional_call(block, w, args, kwargs))
        loss = _token_loss(out, target[low:high], real)
        trainee.step(loss, rates[number])
        total += loss.item()
    return total


def _token_loss(out: torch.Tensor, target: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    wanted = target.float()
    lost = (out.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
    return lost.mean() if real is None else lost.reshape(-1)[real].mean()
