"""Runs this bundle's golden vectors. Needs Python 3.11, NumPy and the model's runtime; nothing of edgeopt.

Exit code 0: every file is intact and every output agrees. 1: one doesn't. 2: it could not be run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]
Json = dict[str, Any]
#: Takes every input by name, in the model's order; gives every output by name.
Run = Callable[[Arrays], Arrays]


def open_litert(path: Path, outputs: list[str]) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    if interpreter.get_signature_list():
        runner = interpreter.get_signature_runner()
        return lambda feed: runner(**feed)

    def run(feed: Arrays) -> Arrays:
        index = {d["name"]: d["index"] for d in (*interpreter.get_input_details(), *interpreter.get_output_details())}
        for name, array in feed.items():
            interpreter.resize_tensor_input(index[name], array.shape)
        interpreter.allocate_tensors()
        for name, array in feed.items():
            interpreter.set_tensor(index[name], array)
        interpreter.invoke()
        return {name: interpreter.get_tensor(index[name]) for name in outputs}

    return run


def open_onnx(path: Path, outputs: list[str]) -> Run:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # its packages for Linux would report usage from here on
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda feed: dict(zip(outputs, session.run(outputs, feed), strict=True))


def open_executorch(path: Path, outputs: list[str]) -> Run:
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(feed: Arrays) -> Arrays:
        results = method.execute([torch.from_numpy(array) for array in feed.values()])
        return {name: result.numpy().copy() for name, result in zip(outputs, results, strict=True)}

    return run


def open_coreml(path: Path, outputs: list[str]) -> Run:
    from coremltools.models import MLModel

    if platform.system() != "Darwin":
        raise ImportError("Core ML runs on macOS only")
    model = MLModel(str(path))

    def run(feed: Arrays) -> Arrays:
        results = model.predict(feed)
        return {name: np.asarray(results[name]) for name in outputs}

    return run


def open_tosa(path: Path, outputs: list[str]) -> Run:
    import tosa_reference_model

    program = path.read_bytes()

    def run(feed: Arrays) -> Arrays:
        results, _ = tosa_reference_model.run(program, list(feed.values()))
        return dict(zip(outputs, results, strict=True))

    return run


OPENERS = {
    ".tflite": open_litert,
    ".onnx": open_onnx,
    ".pte": open_executorch,
    ".mlpackage": open_coreml,
    ".tosa": open_tosa,
}


def load(stored: Json) -> Array:
    array: Array = np.fromfile(HERE / stored["file"], np.dtype(stored["dtype"]).newbyteorder("<"))
    return array.reshape(stored["shape"]).astype(stored["dtype"])


def damaged(manifest: Json) -> list[str]:
    """Files that are missing or not what the manifest says."""
    return [
        name
        for name, entry in manifest["files"].items()
        if not (HERE / name).is_file() or hashlib.sha256((HERE / name).read_bytes()).hexdigest() != entry["sha256"]
    ]


def deviation(actual: Array, golden: Array) -> float:
    """Largest difference as a fraction of the golden output's range; infinite where shapes or NaNs differ."""
    if actual.shape != golden.shape:
        return float("inf")
    a, b = actual.astype(np.float64), golden.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))  # equal infinities included
    if same.all():
        return 0.0
    finite = b[np.isfinite(b)]
    span = (finite.max() - finite.min() if finite.size > 1 else 0.0) or np.abs(finite).max(initial=0.0) or 1.0
    largest = np.abs(a[~same] - b[~same]).max() / span
    return float(largest) if np.isfinite(largest) else float("inf")


def main() -> int:
    manifest: Json = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    broken = damaged(manifest)
    if broken:
        print(f"damaged or missing: {', '.join(broken)}")
        return 1
    signature = manifest["model"]["signature"]
    inputs = {tensor["name"]: tensor["native_name"] for tensor in signature["inputs"]}
    outputs = {tensor["name"]: tensor["native_name"] for tensor in signature["outputs"]}
    model = HERE / (manifest["model"].get("emulation") or manifest["model"]["file"])
    if model.suffix not in OPENERS:
        print(f"{model.name} runs in turns on the NPU and the CPU: edgeopt validate {HERE}")
        return 2
    try:
        run = OPENERS[model.suffix](model, list(outputs.values()))
    except ImportError as error:
        print(f"the runtime is not installed: {error}")
        return 2
    failures = 0
    for number, vector in enumerate(manifest["golden"]):
        results = run({native: load(vector["inputs"][name]) for name, native in inputs.items()})
        for name, stored in vector["outputs"].items():
            difference = deviation(results[outputs[name]], load(stored))
            agrees = difference <= manifest["golden_tolerance"]
            failures += not agrees
            print(f"golden {number}, {name}: {difference:.2%} of the range off, {'ok' if agrees else 'FAILED'}")
    print("all outputs agree" if not failures else f"{failures} outputs do not agree")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
