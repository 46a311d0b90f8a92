# SPDX-License-Identifier: Apache-2.0
"""Where a Hugging Face model keeps its blocks and linear layers, and how it calls them."""

from .names import matches, select
from .stream import BlockStream
from .walk import Block, LinearRef, ModelMap, UnsupportedModelError, describe

__all__ = [
    "Block",
    "BlockStream",
    "LinearRef",
    "ModelMap",
    "UnsupportedModelError",
    "describe",
    "matches",
    "select",
]
