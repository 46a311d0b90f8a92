# SPDX-License-Identifier: Apache-2.0
"""How good a model is: perplexity, bits per byte, benchmark tasks."""

from .data import calibration_windows
from .harness import evaluate_tasks
from .perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "calibration_windows", "evaluate_tasks", "perplexity"]
