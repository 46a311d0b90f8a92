# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules."""

from lissom.nn.sparse24_linear import Sparse24Linear
from lissom.nn.sparsify import SparsifyReport, sparsify

__all__ = ["Sparse24Linear", "SparsifyReport", "sparsify"]
