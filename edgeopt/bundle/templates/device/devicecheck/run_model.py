"""Runs a model in the Python of a board, with the arguments and the JSON of edgeopt-runner. Needs NumPy.

python3 run_model.py FORMAT MODEL --threads N --input [NAME=]FILE:TYPE:SIZES ... --output-dir DIR --json FILE
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    #: Arrays by name in the order given; outputs by name.
    Arrays = dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"]
    Run = Callable[[Arrays], Arrays]


def open_litert(path: str, threads: int) -> tuple[Run, str]:
    import ai_edge_litert
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads)
    version = str(getattr(ai_edge_litert, "__version__", ""))
    if interpreter.get_signature_list():
        runner = interpreter.get_signature_runner()
        return lambda feed: runner(**feed), version
    index = {entry["name"]: entry["index"] for entry in interpreter.get_input_details()}
    last: dict[str, tuple[int, ...]] = {}

    def run(feed: Arrays) -> Arrays:
        shapes = {name: array.shape for name, array in feed.items()}
        if shapes != last:
            for name, array in feed.items():
                interpreter.resize_tensor_input(index[name], array.shape)
            interpreter.allocate_tensors()
            last.update(shapes)
        for name, array in feed.items():
            interpreter.set_tensor(index[name], array)
        interpreter.invoke()
        return {entry["name"]: interpreter.get_tensor(entry["index"]) for entry in interpreter.get_output_details()}

    return run, version


def open_onnx(path: str, threads: int) -> tuple[Run, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, feed))), str(onnxruntime.__version__)


def open_executorch(path: str, threads: int) -> tuple[Run, str]:
    from importlib.metadata import version

    import torch
    from executorch.runtime import Runtime

    torch.set_num_threads(threads)
    method = Runtime.get().load_program(Path(path)).load_method("forward")

    def run(feed: Arrays) -> Arrays:
        results = method.execute([torch.from_numpy(array) for array in feed.values()])
        return {str(k): result.numpy().copy() for k, result in enumerate(results)}

    return run, version("executorch")


OPENERS = {"litert": open_litert, "onnx": open_onnx, "executorch": open_executorch}


def read_input(text: str) -> tuple[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    named, dtype, sizes = text.rsplit(":", 2)
    # Our paths have no "=", names may.
    name, _, path = named.rpartition("=")
    shape = tuple(int(size) for size in sizes.split(",") if size)
    return name or path, np.fromfile(path, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)


def milliseconds(run: Run, feed: Arrays) -> tuple[float, Arrays]:
    start = time.perf_counter()
    outputs = run(feed)
    return (time.perf_counter() - start) * 1e3, outputs


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("format", choices=sorted(OPENERS))
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--input", action="append", default=[])
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    start = time.perf_counter()
    run, version = OPENERS[arguments.format](arguments.model, arguments.threads)
    load_ms = (time.perf_counter() - start) * 1e3
    feed = dict(map(read_input, arguments.input))
    first_ms, outputs = milliseconds(run, feed)
    for _ in range(arguments.warmup):
        run(feed)
    latencies = [milliseconds(run, feed)[0] for _ in range(arguments.runs)]
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    listed = []
    for position, (name, array) in enumerate(outputs.items()):
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        file = f"output_{position}.bin"
        Path(arguments.output_dir, file).write_bytes(little.tobytes())
        listed.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "file": file})
    figures = {
        "load_ms": load_ms, "first_ms": first_ms, "latencies_ms": latencies, "peak_kb": peak_kb, "outputs": listed,
        "version": version,
    }  # fmt: skip
    Path(arguments.json).write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
