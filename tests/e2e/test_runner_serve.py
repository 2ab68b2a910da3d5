"""edgeopt-runner as a server, built for this machine: requests, answers, and what can go wrong between them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edgeopt.types import Array, Format

pytestmark = pytest.mark.e2e

FORMATS: tuple[Format, ...] = ("litert", "onnx", "executorch")
SUFFIX = {"litert": ".tflite", "onnx": ".onnx", "executorch": ".pte"}

Runners = Callable[[Format], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    """For each format a file with inputs x and y of n rows (1 to 4) and 3 columns, and the outputs x + y and x * y."""
    directory = tmp_path_factory.mktemp("models")
    paths: dict[Format, Path] = {format_: directory / f"model{SUFFIX[format_]}" for format_ in FORMATS}
    _write_litert(paths["litert"])
    _write_onnx(paths["onnx"])
    _write_executorch(paths["executorch"])
    return paths


def _write_litert(path: Path, rows: int = -1, dtype: str = "FLOAT32", custom: str | None = None) -> None:
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    def tensor(name: str) -> schema.TensorT:
        made = schema.TensorT()
        made.name, made.type, made.buffer = name.encode(), getattr(schema.TensorType, dtype), 0
        made.shape = np.array([max(rows, 1), 3], np.int32)
        made.shapeSignature = np.array([rows, 3], np.int32)
        if dtype == "INT8":
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = np.float32([0.5]), np.array([0])
        return made

    def operator(code: int, options: str, output: int) -> schema.OperatorT:
        made = schema.OperatorT()
        made.opcodeIndex = code
        made.inputs, made.outputs = np.array([0, 1], np.int32), np.array([output], np.int32)
        if custom is None:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            made.builtinOptions = getattr(schema, f"{options}T")()
        return made

    def code(name: str) -> schema.OperatorCodeT:
        made = schema.OperatorCodeT()
        made.builtinCode = made.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, "CUSTOM" if custom else name)
        if custom:
            made.deprecatedBuiltinCode, made.customCode = schema.BuiltinOperator.CUSTOM, custom.encode()
        return made

    graph = schema.SubGraphT()
    graph.tensors = [tensor(name) for name in ("x", "y", "sum", "product")]
    graph.operators = [operator(0, "AddOptions", 2), operator(1, "MulOptions", 3)]
    graph.inputs, graph.outputs = np.array([0, 1], np.int32), np.array([2, 3], np.int32)
    model = schema.ModelT()
    model.version, model.buffers, model.subgraphs = 3, [schema.BufferT()], [graph]
    model.operatorCodes = [code("ADD"), code("MUL")]
    flatbuffer_utils.write_model(model, str(path))


def _write_onnx(path: Path, dtype: str = "FLOAT") -> None:
    from onnx import TensorProto, checker, helper, save

    kind = getattr(TensorProto, dtype)
    names = {"in": ("x", "y"), "out": ("sum", "product")}
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "y"], ["sum"]), helper.make_node("Mul", ["x", "y"], ["product"])],
        "g",
        [helper.make_tensor_value_info(name, kind, ["n", 3]) for name in names["in"]],
        [helper.make_tensor_value_info(name, kind, ["n", 3]) for name in names["out"]],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model)
    save(model, str(path))


def _write_executorch(path: Path) -> None:
    import torch
    from executorch.exir import to_edge

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + y, x * y

    rows = {0: torch.export.Dim("n", min=1, max=4)}
    example = (torch.zeros(2, 3), torch.ones(2, 3))
    exported = torch.export.export(Net(), example, dynamic_shapes=(rows, rows))
    path.write_bytes(to_edge(exported).to_executorch().buffer)


@dataclass
class Server:
    """A runner that serves."""

    process: subprocess.Popen[bytes]

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def line(self) -> dict[str, object]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        types = " ".join(f"{a.dtype.name}:{','.join(map(str, a.shape))}" for a in arrays)
        self.send(f"run {types}\n".encode() + b"".join(a.tobytes() for a in arrays))
        return self.outputs()

    def outputs(self) -> list[Array]:
        assert self.process.stdout is not None
        answer = self.line()
        assert "error" not in answer, answer
        arrays = []
        for entry in answer["outputs"]:  # type: ignore[attr-defined]
            dtype = np.dtype(entry["dtype"])
            size = int(np.prod(entry["shape"])) * dtype.itemsize
            arrays.append(np.frombuffer(self.process.stdout.read(size), dtype).reshape(entry["shape"]))
        return arrays

    def end(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.stdout.read() == b""
        self.process.stdout.close()
        return self.process.wait(timeout=20)


def _serve(runner: Path, model: Path) -> Server:
    process = subprocess.Popen(
        [runner, model, "--threads", "2", "--serve"], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL
    )
    return Server(process)


def _arrays(rows: int) -> tuple[Array, Array]:
    x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    return x, np.cos(x)


@pytest.mark.parametrize("format_", FORMATS)
def test_serves_and_follows_free_sizes(host_runner: Runners, models: dict[Format, Path], format_: Format) -> None:
    server = _serve(host_runner(format_), models[format_])
    ready = server.line()
    names = {"litert": ["x", "y"], "onnx": ["x", "y"], "executorch": ["", ""]}[format_]
    assert ready["ready"] is True
    rows = {"litert": 1, "onnx": -1, "executorch": 4}[format_]
    assert ready["inputs"] == [{"name": name, "dtype": "float32", "shape": [rows, 3]} for name in names]
    for count in (1, 4, 4, 2):
        x, y = _arrays(count)
        total, product = server.run([x, y])
        np.testing.assert_array_equal(total, x + y)
        np.testing.assert_array_equal(product, x * y)
    assert server.end() == 0


@pytest.mark.parametrize("format_", FORMATS)
def test_what_does_not_fit_is_refused_and_the_next_request_is_answered(
    host_runner: Runners, models: dict[Format, Path], format_: Format
) -> None:
    x, y = _arrays(2)
    server = _serve(host_runner(format_), models[format_])
    server.line()
    # ExecuTorch's file tells its largest sizes only; which others it takes its runtime knows.
    narrow = "inputs of these shapes" if format_ == "executorch" else "has the shape (3, 2), "
    for arrays, reason in (
        ([x], "got 1 inputs, the model takes 2"),
        ([x, y.astype(np.int8)], "int8, the model takes float32"),
        ([x.T.copy(), y], narrow),
        ([x[0], y], "the shape (3), the model takes"),
        ([x, np.zeros((5, 4), np.float32)], "the shape (5, 4), "),
    ):
        types = " ".join(f"{a.dtype.name}:{','.join(map(str, a.shape))}" for a in arrays)
        server.send(f"run {types}\n".encode() + b"".join(a.tobytes() for a in arrays))
        assert reason in str(server.line()["error"])
    np.testing.assert_array_equal(server.run([x, y])[0], x + y)
    assert server.end() == 0


@pytest.mark.parametrize("format_", FORMATS)
def test_rows_that_differ_are_the_runtimes_own_error(
    host_runner: Runners, models: dict[Format, Path], format_: Format
) -> None:
    server = _serve(host_runner(format_), models[format_])
    server.line()
    x, y = _arrays(2)[0], _arrays(3)[1]
    server.send(b"run float32:2,3 float32:3,3\n" + x.tobytes() + y.tobytes())
    assert " can't " in str(server.line()["error"])
    x, y = _arrays(3)
    np.testing.assert_array_equal(server.run([x, y])[0], x + y)
    assert server.end() == 0


@pytest.mark.parametrize(
    "line",
    [
        b"run float32\n", b"run float33:1\n", b"run float32:-1,3\n", b"run float32:1, 3\n", b"walk float32:1,3\n",
        b"run float32:99999999999,99999999999\n", b"run float32:1,3x\n", b"\xff\x00\xfe\n", b"run float32:1,,3\n",
        b"run float32:2,3 float32:2,3\n1234", b"run float32:1", b"r" * (1 << 21), b"\n",
    ],
)  # fmt: skip
def test_a_malformed_request_ends_it_with_an_error(
    host_runner: Runners, models: dict[Format, Path], line: bytes
) -> None:
    done = subprocess.run(
        [host_runner("litert"), models["litert"], "--serve"], input=line, capture_output=True, timeout=20
    )
    assert done.returncode == 2
    ready, error = done.stdout.splitlines()
    assert json.loads(ready)["ready"] is True
    assert list(json.loads(error)) == ["error"]


def test_a_request_larger_than_memory_is_refused(host_runner: Runners, models: dict[Format, Path]) -> None:
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v 2000000; exec {host_runner('litert')} {models['litert']} --serve"],
        input=b"run float32:1000000000,3\n",
        capture_output=True,
        timeout=20,
    )
    if b"ready" not in done.stdout:
        pytest.skip("the sanitizer needs more memory than that")
    assert done.returncode == 2


def test_an_operator_of_an_accelerator_is_an_error(host_runner: Runners, tmp_path: Path) -> None:
    _write_litert(tmp_path / "m.tflite", rows=1, custom="edgetpu-custom-op")
    done = subprocess.run(
        [host_runner("litert"), tmp_path / "m.tflite", "--serve"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "an operator that this LiteRT lacks" in json.loads(done.stdout)["error"]
    assert "edgetpu-custom-op" in done.stderr


def test_integers_are_fed_as_they_are(host_runner: Runners, tmp_path: Path) -> None:
    _write_litert(tmp_path / "m.tflite", rows=2, dtype="INT8")
    x, y = np.int8([[1, -2, 3], [100, 120, -128]]), np.int8([[4, 5, -6], [100, 2, -128]])
    server = _serve(host_runner("litert"), tmp_path / "m.tflite")
    assert server.line()["inputs"][0]["dtype"] == "int8"  # type: ignore[index]
    total, product = server.run([x, y])
    np.testing.assert_array_equal(total, np.clip(x.astype(int) + y, -128, 127))
    assert product.dtype == np.int8
    assert server.end() == 0


@pytest.mark.parametrize("dtype", ["FLOAT16", "INT32", "INT64", "UINT8", "INT8"])
def test_every_type_of_onnx(host_runner: Runners, tmp_path: Path, dtype: str) -> None:
    _write_onnx(tmp_path / "m.onnx", dtype)
    x = np.arange(6).reshape(2, 3).astype(dtype.lower())
    server = _serve(host_runner("onnx"), tmp_path / "m.onnx")
    if "error" in server.line():
        pytest.skip(f"ONNX Runtime has no kernel for {dtype}")
    np.testing.assert_array_equal(server.run([x, x])[0], x + x)
    assert server.end() == 0
