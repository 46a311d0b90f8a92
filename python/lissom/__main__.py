# SPDX-License-Identifier: Apache-2.0
"""`python -m lissom` is the command `lissom`."""

from lissom.cli import main

if __name__ == "__main__":
    main()
