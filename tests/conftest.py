"""What tests of several folders share: a small bundle that is really written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeopt.bundle import BundleContents, GoldenVector, write_bundle
from edgeopt.device_profiles import load_device
from edgeopt.targets import load_target
from edgeopt.types import (
    Artifact,
    Model,
    QuantParams,
    Report,
    Signature,
    SignatureTensor,
    StepRecord,
    TensorSpec,
)


@pytest.fixture
def small_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Writes a bundle around any bytes, which nobody runs."""

    def make(name: str, model: bytes = b"weights" * 100, licence: str | None = None, status: str = "passed") -> Path:
        source = tmp_path / f"{name}.onnx"
        source.write_bytes(model)
        quantized = SignatureTensor("x", "x", (1, 4), "int8", "float32", quantization=QuantParams((0.5,), (3,)))
        signature = Signature((quantized,), (SignatureTensor("y", "y", (1, 4), "float32", "float32"),))
        artifact = Artifact(
            path=source,
            format="onnx",
            precision="w8a8",
            signature=signature,
            size_bytes=len(model),
            sha256=hashlib.sha256(model).hexdigest(),
            history=(StepRecord("quantize", {"weights": "per-channel", "samples": 8, "symmetric": True}),),
            tools={"onnxruntime": "1.31.1", "torch": "2.13.0+cpu"},
            unquantized_ops=(),
        )
        trained = Model(
            name="net",
            module=None,
            native=None,
            inputs=(TensorSpec("x", (1, 4), "float32"),),
            outputs=(TensorSpec("y", (1, 4), "float32"),),
            example_inputs={},
            preprocessing=None,
            labels=(),
            history=(),
            source_sha256="ab" * 32,
        )
        x, y = np.zeros((1, 4), np.int8), np.ones((1, 4), np.float32)
        contents = BundleContents(
            target=load_target("android-onnx-int8"),
            device=load_device("pixel-6"),
            model=trained,
            artifact=artifact,
            float_artifact=None,
            report=Report(status, "net", "android-onnx-int8", "onnxruntime", (), (), (), (), (), {}),
            golden=(GoldenVector({"x": x}, {"y": y}, {"y": y}, label=1),),
            licence=licence,
        )
        return write_bundle(tmp_path / name, contents).path

    return make
