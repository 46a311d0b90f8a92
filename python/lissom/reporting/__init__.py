# SPDX-License-Identifier: Apache-2.0
"""What a run did, as one HTML file."""

from lissom.reporting.html import render_report, write_report
from lissom.reporting.verdict import judge

__all__ = ["judge", "render_report", "write_report"]
