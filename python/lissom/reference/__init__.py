# SPDX-License-Identifier: Apache-2.0
"""Torch twins: the same maths in plain torch. They document the kernels, test them, and serve every other device."""
