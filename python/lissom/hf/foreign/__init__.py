# SPDX-License-Identifier: Apache-2.0
"""Retired formats of 2:4 checkpoints: what a folder declares, which tensors belong together, what they mean."""
