# SPDX-License-Identifier: Apache-2.0
"""Post-training pruning: one pure function for a weight, one driver for a model."""

from .driver import prune, prune_model
from .pattern import Pattern
from .plan import plan_prune
from .problem import Options
from .report import BlockProgress, BlockReport, LayerReport, PrunePlan, PruneReport
from .solver import prune_weight

__all__ = [
    "BlockProgress",
    "BlockReport",
    "LayerReport",
    "Options",
    "Pattern",
    "PrunePlan",
    "PruneReport",
    "plan_prune",
    "prune",
    "prune_model",
    "prune_weight",
]
