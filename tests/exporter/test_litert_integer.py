"""What is decided about files for integer NPUs, without converting a model; whole conversions are in tests/e2e."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from edgeopt.calibration.ranges import Range
from edgeopt.device_profiles import load_device
from edgeopt.exporter.litert_integer import finite_masks, integer_npu, wide_by_nature
from edgeopt.exporter.litert_names import rename_conversions
from edgeopt.exporter.litert_plan import Graph, Op
from edgeopt.runtimes.tosa_tables import with_wide_tables
from edgeopt.types import Array, Scheme

STATIC = Scheme("w8a8", "static")
FLOATS = ("scores", "bias", "one", "open", "factor", "hidden", "masked", "weights")


def _attention(factor: Array) -> tuple[schema.ModelT, Graph]:
    """softmax(scores + (one - open) * factor), where factor is the mask's minus infinity."""
    constants = {"one": np.ones(1, np.float32), "factor": factor}
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.buffers, model.subgraphs, graph.tensors = [schema.BufferT()], [graph], []
    for name in FLOATS:
        tensor = schema.TensorT()
        tensor.name, tensor.buffer = name.encode(), 0
        if name in constants:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(constants[name].tobytes(), np.uint8)
            model.buffers.append(buffer)
            tensor.buffer = len(model.buffers) - 1
        graph.tensors.append(tensor)
    ops = (
        Op("SUB", ("one", "open"), ("hidden",)),
        Op("MUL", ("hidden", "factor"), ("bias",)),
        Op("ADD", ("scores", "bias"), ("masked",)),
        Op("SOFTMAX", ("masked",), ("weights",)),
    )
    floats = {name: index for index, name in enumerate(FLOATS)}
    masks = {name: float(factor.min()) for name in ("factor", "bias", "masked")}
    return model, Graph(ops, ("scores", "open"), floats, constants, masks)


def test_minus_infinity_becomes_just_large_enough_to_mask() -> None:
    model, graph = _attention(np.array([np.finfo(np.float32).min], np.float32))
    ranges = {"scores": Range(-3.0, 5.0), "open": Range(0.0, 1.0), "hidden": Range(0.0, 1.0), "weights": Range(0, 1)}
    found = finite_masks(model, graph, graph.masks, ranges)
    (written,) = np.frombuffer(model.buffers[model.subgraphs[0].tensors[4].buffer].data, np.float32)
    assert written == -24.0  # 16 below the smallest score, seen from the largest
    assert found.constants == {"factor"}
    assert found.ranges == {"bias": Range(-24.0, 0.0), "masked": Range(-27.0, 5.0)}


def test_plus_infinity_stays_and_so_does_what_it_meets() -> None:
    model, graph = _attention(np.array([np.inf], np.float32))
    found = finite_masks(model, graph, graph.masks, {"scores": Range(-3.0, 5.0), "hidden": Range(0.0, 1.0)})
    assert (found.constants, found.ranges) == (frozenset(), {})


def test_normalization_and_curves_get_16_bits_and_products_keep_8() -> None:
    ops = (
        Op("BATCH_MATMUL", ("q", "k"), ("scores",)),
        Op("SOFTMAX", ("scores",), ("weights",)),
        Op("EXP", ("x",), ("power",)),
        Op("SUB", ("power", "one"), ("less",)),
        Op("CONV_2D", ("less", "kernel"), ("image",)),
    )
    names = ("q", "k", "scores", "weights", "x", "power", "one", "less", "image")
    graph = Graph(ops, ("q", "k", "x"), {n: i for i, n in enumerate(names)}, {"one": np.ones(1, np.float32)})
    assert wide_by_nature(graph) == {"weights", "power", "less"}


@pytest.mark.parametrize(
    ("device", "changes", "is_integer"),
    [
        ("corstone-300", {}, True),
        ("coral-usb", {}, True),
        ("corstone-300", {"activations": "dynamic"}, False),
        ("corstone-300", {"scale": "power-of-two"}, False),
        (None, {}, False),
    ],
)
def test_which_files_are_integer_throughout(device: str | None, changes: dict[str, str], is_integer: bool) -> None:
    npu = load_device(device).npus[0] if device else None
    scheme = replace(STATIC, npu=npu, **changes)  # type: ignore[arg-type]
    assert (integer_npu(scheme) is not None) == is_integer


def _graph_of(names: list[str]) -> schema.SubGraphT:
    graph = schema.SubGraphT()
    graph.tensors = []
    for name in names:
        tensor = schema.TensorT()
        tensor.name = name.encode()
        graph.tensors.append(tensor)
    return graph


def test_converted_tensors_are_called_after_their_layer() -> None:
    names = ["conv", "conv:1", "conv_dequant", "conv:1_quantized", "head/1_quantized", ":4_dequant:1", "act_quantized"]
    model = schema.ModelT()
    model.subgraphs = [_graph_of(names), _graph_of(["conv:3"])]  # a body's names count as well
    rename_conversions(model, {"conv", "conv:1", "conv:2", "conv:3", "head/1", "act_quantized"})
    found = [tensor.name.decode() for tensor in model.subgraphs[0].tensors]
    assert found == ["conv", "conv:1", "conv:4", "conv:5", "head/1:1", ":1", "act_quantized"]


def test_tosa_tables_of_16_bits_are_rescaled() -> None:
    line = "    %1 = tosa.table %arg0, %0 : (tensor<1x4xi16>, tensor<513xi16>) -> tensor<1x4xi16> loc(#loc3)"
    other = "    %2 = tosa.table %1, %0 : (tensor<1x4xi16>, tensor<513xi16>) -> tensor<1x4xi32> loc(#loc3)"
    *_, table, rescale, untouched = with_wide_tables(f"{line}\n{other}").split("\n")
    assert table.endswith("-> tensor<1x4xi32> loc(#loc3)")
    assert rescale.startswith("    %1 = tosa.rescale %t1_wide, ")
    assert untouched == other
