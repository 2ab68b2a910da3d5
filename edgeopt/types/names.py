"""The words that types, targets and messages share."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

Precision = Literal["fp32", "fp16", "w8a8", "w8a16", "w8", "w4", "8da4w"]
DType = Literal["float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"]
Format = Literal["litert", "onnx", "executorch", "coreml"]
PassName = Literal[
    "fold-batch-norm", "equalize", "absorb-high-bias", "smooth", "clip-outliers", "round-adaptively", "correct-bias"
]  # fmt: skip
#: What the names of runtimes that emulate a phone begin with: "phone:cortex-a76".
PHONE = "phone:"
#: And those under which figures of a real device stand in a report: "device:google-pixel-6".
DEVICE = "device:"
Provenance = Literal["measured-host", "emulated", "estimated", "measured-device"]
