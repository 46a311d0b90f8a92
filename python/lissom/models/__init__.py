# SPDX-License-Identifier: Apache-2.0
"""Where a Hugging Face model keeps its blocks and linear layers, and how it calls them."""

from .names import matches, select
from .stream import BlockStream
from .taps import Tap
from .walk import (
    Block,
    LinearRef,
    ModelMap,
    UnsupportedModelError,
    describe,
    packing_obstacles,
)

__all__ = [
    "Block",
    "BlockStream",
    "LinearRef",
    "ModelMap",
    "Tap",
    "UnsupportedModelError",
    "describe",
    "matches",
    "packing_obstacles",
    "select",
]
