# SPDX-License-Identifier: Apache-2.0
"""Measurements on the user's own machine: the machine itself, the kernels, a whole model."""
