"""Work of .pte files that are put together by hand with the flatbuffer compiler that ExecuTorch ships."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgeopt.prediction.count import count

ROOT = Path(next(iter(find_spec("executorch").submodule_search_locations)))
INVALID = 0xFFFFFFFF


def compiled(value: dict, schema: str, directory: Path, suffix: str) -> bytes:
    source = directory / "value.json"
    source.write_text(json.dumps(value))
    command = [ROOT / "data/bin/flatc", "--binary", "-o", directory, ROOT / schema, source]
    subprocess.run(list(map(str, command)), check=True)
    return (directory / f"value{suffix}").read_bytes()


def tensor(sizes: list[int], buffer: int = 0, dynamism: str = "STATIC") -> dict:
    value = {"scalar_type": "FLOAT", "sizes": sizes, "shape_dynamism": dynamism, "data_buffer_idx": buffer}
    return {"val_type": "Tensor", "val": value}


def value(number: int, datatype: str, dims: list[int], constant: int = 0) -> dict:
    plain = {
        "datatype": f"xnn_datatype_{datatype}", "constant_buffer_idx": constant, "id_out": number, "dims": dims,
        "num_dims": len(dims),
    }  # fmt: skip
    return {"xvalue_union_type": "XNNTensorValue", "xvalue_union": plain}


def blob(directory: Path) -> bytes:
    """int8 convolution, depthwise convolution and fully connected."""

    def node(kind: str, x: int, w: int, y: int) -> dict:
        fields = {"input1_id": x, "filter_id": w, "bias_id": INVALID, "output_id": y}
        return {"xnode_union_type": f"XNN{kind}", "xnode_union": fields, "debug_handle": y}

    nodes = [node("Conv2d", 0, 1, 2), node("DepthwiseConv2d", 2, 3, 4), node("FullyConnected", 4, 5, 6)]
    values = [
        value(0, "qint8", [1, 8, 8, 3]), value(1, "qcint8", [16, 3, 3, 3], 1), value(2, "qint8", [1, 4, 4, 16]),
        value(3, "qcint8", [1, 3, 3, 16], 2), value(4, "qint8", [1, 4, 4, 16]), value(5, "qcint8", [10, 16], 3),
        value(6, "qint8", [1, 4, 4, 10]),
    ]  # fmt: skip
    constants = [{"offset": 0, "size": size} for size in (0, 432, 144, 160)]
    graph = {"version": "0", "xnodes": nodes, "xvalues": values, "num_externs": 2, "constant_data": constants}
    flat = compiled(graph, "backends/xnnpack/serialization/schema.fbs", directory, ".bin")
    sizes = [(30).to_bytes(2, "little"), (32).to_bytes(4, "little"), len(flat).to_bytes(4, "little")]
    return b"".join([bytes(4), b"XH00", *sizes, bytes(14), flat])


def program(directory: Path, operator: str = "native_layer_norm", delegate: str = "XnnpackBackend") -> Path:
    values = [tensor([1, 192], dynamism="DYNAMIC_BOUND"), tensor([192, 4], buffer=1), tensor([1, 4])]
    instructions = [
        {"instr_args_type": "KernelCall", "instr_args": {"op_index": 0, "args": [0, 1, 2, 2]}},
        {"instr_args_type": "DelegateCall", "instr_args": {"delegate_index": 0, "args": [2, 2]}},
    ]
    plan = {
        "name": "forward",
        "values": values,
        "inputs": [0],
        "outputs": [2],
        "chains": [{"inputs": [], "outputs": [], "instructions": instructions}],
        "operators": [{"name": f"aten::{operator}", "overload": "out"}],
        "delegates": [{"id": delegate, "processed": {"location": "INLINE", "index": 0}, "compile_specs": []}],
        "non_const_buffer_sizes": [0],
    }
    root = {
        "version": 0,
        "execution_plan": [plan],
        "constant_buffer": [{"storage": []}, {"storage": [0] * 3072}],
        "backend_delegate_data": [{"data": list(blob(directory))}],
        "segments": [],
    }
    path = directory / "model.pte"
    path.write_bytes(compiled(root, "exir/_serialize/program.fbs", directory, ".pte"))
    return path


def test_inside_and_outside_of_the_delegate(tmp_path: Path) -> None:
    work = count(program(tmp_path), "executorch")
    assert [(op.type, op.kind, op.macs, op.weight_bytes) for op in work.ops] == [
        ("aten.native_layer_norm.out", "transcendental", 0, 3072),
        ("Conv2d", "conv", 4 * 4 * 16 * 27, 432),
        ("DepthwiseConv2d", "depthwise", 4 * 4 * 16 * 9, 144),
        ("FullyConnected", "matmul", 4 * 4 * 10 * 16, 160),
    ]
    assert {op.arithmetic for op in work.ops[1:]} == {"int8"}
    assert work.ops[1].activation_bytes == 8 * 8 * 3 + 4 * 4 * 16
    assert work.assumed == ("input_0: 1x<=192",)
    assert work.unsupported is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"operator": "mm"}, "portable kernels"), ({"delegate": "VulkanBackend"}, "hands work to VulkanBackend")],
)
def test_what_no_figure_tells(tmp_path: Path, changed: dict[str, str], why: str) -> None:
    assert why in (count(program(tmp_path, **changed), "executorch").unsupported or "")
