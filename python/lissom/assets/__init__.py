# SPDX-License-Identifier: Apache-2.0
"""What comes with the package: a small trained Llama and two public-domain texts (see tiny-llama/README.md).

Example:
    >>> from lissom import assets
    >>> (assets.TINY_LLAMA / "model.safetensors").is_file()
    True
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

TINY_LLAMA = _HERE / "tiny-llama"
"""Model directory for `AutoModelForCausalLM.from_pretrained`: 2.0 M parameters, bfloat16, 1024 positions."""

CALIBRATION_TEXT = _HERE / "calibration.txt"
"""Chapters of the King James Bible that the model was trained on, 0.25 MB."""

VALIDATION_TEXT = _HERE / "validation.txt"
"""Held-out chapters of the same text, 0.07 MB."""
