"""What a person looks at, and what a tool reads."""

from __future__ import annotations

from edgeopt.report.text import placed, render, render_summary
from edgeopt.report_file import from_json, to_json

__all__ = ["from_json", "placed", "render", "render_summary", "to_json"]
