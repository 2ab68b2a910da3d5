"""Reading .pte files, on files put together by hand with the flatbuffer compiler that ExecuTorch ships."""

from __future__ import annotations

import json
import subprocess
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgeopt.errors import UsageError
from edgeopt.formats import summarize
from edgeopt.formats.executorch import read_program
from edgeopt.formats.executorch_layers import add_layers, decode, encode

ROOT = Path(next(iter(find_spec("executorch").submodule_search_locations)))
INVALID = 0xFFFFFFFF


def compile_json(value: dict, schema: str, directory: Path, suffix: str) -> bytes:
    source = directory / "value.json"
    source.write_text(json.dumps(value))
    command = [ROOT / "data/bin/flatc", "--binary", "-o", directory, ROOT / schema, source]
    subprocess.run(list(map(str, command)), check=True)
    return (directory / f"value{suffix}").read_bytes()


def tensor(scalar_type: str, sizes: list[int], dynamism: str = "STATIC", buffer: int = 0) -> dict:
    value = {"scalar_type": scalar_type, "sizes": sizes, "shape_dynamism": dynamism, "data_buffer_idx": buffer}
    return {"val_type": "Tensor", "val": value}


def xnn_value(number: int, datatype: str, constant: int = 0) -> dict:
    plain = {"datatype": datatype, "constant_buffer_idx": constant, "id_out": number}
    return {"xvalue_union_type": "XNNTensorValue", "xvalue_union": plain}


def xnn_blob(directory: Path) -> bytes:
    """int8 fully connected with a clamp to infinity, then a float sigmoid."""
    linear = {"input1_id": 0, "filter_id": 1, "bias_id": INVALID, "output_id": 2}
    nodes = [
        {
            "xnode_union_type": "XNNFullyConnected",
            "xnode_union": linear,
            "debug_handle": 7,
            "output_min_max": {"output_min": 0, "output_max": "+inf"},
        },
        {"xnode_union_type": "XNNConvert", "xnode_union": {"input_id": 2, "output_id": 3}, "debug_handle": 8},
        {"xnode_union_type": "XNNSigmoid", "xnode_union": {"input_id": 3, "output_id": 4}, "debug_handle": 9},
    ]
    values = [
        xnn_value(0, "xnn_datatype_qint8"),
        xnn_value(1, "xnn_datatype_qcint8", 1),
        xnn_value(2, "xnn_datatype_qint8"),
        xnn_value(3, "xnn_datatype_fp32"),
        xnn_value(4, "xnn_datatype_fp32"),
    ]
    constants = [{"offset": 0, "size": 0}, {"offset": 0, "size": 48}]
    graph = {"version": "0", "xnodes": nodes, "xvalues": values, "num_externs": 2, "constant_data": constants}
    flat = compile_json(graph, "backends/xnnpack/serialization/schema.fbs", directory, ".bin")
    sizes = [(30).to_bytes(2, "little"), (32).to_bytes(4, "little"), len(flat).to_bytes(4, "little")]
    return b"".join([bytes(4), b"XH00", *sizes, bytes(14), flat])


@pytest.fixture
def program(tmp_path: Path) -> Path:
    values = [
        tensor("FLOAT", [4, 8], "DYNAMIC_BOUND"),
        tensor("FLOAT", [8], buffer=1),
        tensor("FLOAT", [1, 8]),
        tensor("CHAR", [1, 8]),
    ]
    instructions = [
        {"instr_args_type": "KernelCall", "instr_args": {"op_index": 0, "args": [0, 1, 2, 2]}},
        {"instr_args_type": "DelegateCall", "instr_args": {"delegate_index": 0, "args": [2, 3]}},
        {"instr_args_type": "DelegateCall", "instr_args": {"delegate_index": 1, "args": [3, 3]}},
    ]
    plan = {
        "name": "forward",
        "values": values,
        "inputs": [0],
        "outputs": [3],
        "chains": [{"inputs": [], "outputs": [], "instructions": instructions}],
        "operators": [{"name": "aten::native_layer_norm", "overload": "out"}],
        "delegates": [
            {"id": "XnnpackBackend", "processed": {"location": "INLINE", "index": 0}, "compile_specs": []},
            {"id": "CoreMLBackend", "processed": {"location": "INLINE", "index": 1}, "compile_specs": []},
        ],
        "non_const_buffer_sizes": [0],
    }
    root = {
        "version": 0,
        "execution_plan": [plan],
        "constant_buffer": [{"storage": []}, {"storage": [0] * 32}],
        "backend_delegate_data": [{"data": list(xnn_blob(tmp_path))}, {"data": [1, 2, 3]}],
        "segments": [],
    }
    path = tmp_path / "model.pte"
    path.write_bytes(compile_json(root, "exir/_serialize/program.fbs", tmp_path, ".pte"))
    return path


def test_operators_inside_and_outside_of_delegates(program: Path) -> None:
    summary = summarize(program)
    rows = [(op.name, op.dtype, op.delegate, op.weight_bytes) for op in summary.ops]
    assert rows == [
        ("aten.native_layer_norm.out_0", "float32", None, 32),
        ("FullyConnected_0", "int8", "XNNPACK", 48),
        ("Convert_0", "float32", "XNNPACK", 0),
        ("Sigmoid_0", "float32", "XNNPACK", 0),
        ("CoreMLBackend_0", "unknown", "CoreMLBackend", 0),
    ]
    assert summary.metadata["delegated blocks: XnnpackBackend"] == "1"


def test_signature_tells_types_and_bounds(program: Path) -> None:
    signature = summarize(program).signature
    assert [(t.native_name, t.shape, t.dtype) for t in signature.inputs] == [("input_0", ("<=4", "<=8"), "float32")]
    assert [(t.native_name, t.shape, t.dtype) for t in signature.outputs] == [("output_0", (1, 8), "int8")]


def test_handles_for_exporters(program: Path) -> None:
    ops = read_program(program).ops
    assert [(op.instruction, op.debug_handle) for op in ops] == [(0, None), (1, 7), (1, 8), (1, 9), (2, None)]
    assert ops[1].inputs == ("int8", "int8")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"\x3c\0\0\0ET12" + bytes(40)])
def test_what_is_no_program_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pte"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"broken\.pte: is not a readable ExecuTorch program"):
        summarize(path)


def test_corruption_never_crashes(program: Path, tmp_path: Path) -> None:
    data = program.read_bytes()
    path = tmp_path / "broken.pte"
    for cut in range(0, len(data), len(data) // 12):
        flipped = bytearray(data)
        flipped[cut] ^= 0xFF
        for content in (data[:cut], bytes(flipped)):
            path.write_bytes(content)
            try:
                summarize(path)
            except UsageError as error:
                assert "ExecuTorch program" in error.line()  # noqa: PT017 - some corruptions go unnoticed, rightly


# --- source layers ----------------------------------------------------------------------------------------------------


def test_layers_survive_their_encoding() -> None:
    layers = {0: "embed", (1, 7): "head.fc", (1, 8): "head.fc", (2, 7): ""}
    assert decode(encode(layers)) == {0: "embed", (1, 7): "head.fc", (1, 8): "head.fc"}
    assert encode(layers) == encode(dict(layers))


@pytest.mark.parametrize("data", [b"", b"x", zlib.compress(b"[1]"), zlib.compress(b'{"a":[[1]]}'), zlib.compress(b"{")])
def test_a_damaged_table_of_layers_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


def test_a_program_without_data_keeps_its_layers(tmp_path: Path) -> None:
    """Regression: neither weights nor a delegate, so that the table is the file's only segment."""
    import torch
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(torch.nn.Softmax(1), (torch.ones(1, 4, 3),))
    path = tmp_path / "model.pte"
    path.write_bytes(to_edge_transform_and_lower(exported).to_executorch().buffer)
    add_layers(path, {0: "norm"})
    assert [op.layer for op in read_program(path).ops][:1] == ["norm"]
