"""Checking a bundle on a real device from here, and taking the result into its report."""

from __future__ import annotations

from edgeopt.on_device.merging import merged
from edgeopt.on_device.run import DeviceRun, run

__all__ = ["DeviceRun", "merged", "run"]
