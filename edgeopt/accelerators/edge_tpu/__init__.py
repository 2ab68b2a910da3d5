"""The Edge TPU: which operators it takes, what a network costs there, and its compiler where that is installed."""

from __future__ import annotations

from edgeopt.accelerators.edge_tpu.accelerator import EdgeTpuAccelerator
from edgeopt.accelerators.edge_tpu.predictor import predict

__all__ = ["EdgeTpuAccelerator", "predict"]
