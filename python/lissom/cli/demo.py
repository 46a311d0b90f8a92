# SPDX-License-Identifier: Apache-2.0
def demo() -> None:
    """x"""
