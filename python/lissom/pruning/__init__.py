# SPDX-License-Identifier: Apache-2.0
"""Post-training pruning: one pure function for a weight, one driver for a model."""

from .allocation import Budget, LossCurve, allocate, owl
from .driver import prune, prune_folder, prune_model
from .parallel import Ranks
from .pattern import Pattern
from .plan import plan_prune
from .problem import Options
from .reconstruct import Reconstruction
from .refit import refit, refit_exactly, stationarity
from .report import BlockProgress, BlockReport, LayerReport, PrunePlan, PruneReport
from .selection import PatternMap
from .settings import Settings
from .solver import prune_weight
from .training import KeepMasksCallback, SparsityKeeper, keep_masks

__all__ = [
    "BlockProgress",
    "BlockReport",
    "Budget",
    "KeepMasksCallback",
    "LayerReport",
    "LossCurve",
    "Options",
    "Pattern",
    "PatternMap",
    "PrunePlan",
    "PruneReport",
    "Ranks",
    "Reconstruction",
    "Settings",
    "SparsityKeeper",
    "allocate",
    "keep_masks",
    "owl",
    "plan_prune",
    "prune",
    "prune_folder",
    "prune_model",
    "prune_weight",
    "refit",
    "refit_exactly",
    "stationarity",
]
