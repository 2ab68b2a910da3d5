"""PyTorch -> a Core ML model in memory: coremltools' two ways in, and which source layer each operator comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError
from edgeopt.exporter.coreml_rewrites import rewrite_for_coremltools
from edgeopt.exporter.coreml_scheme import BLOCKWISE
from edgeopt.exporter.executorch_graph import dynamic_shapes, example_inputs, layer_of, operator_name
from edgeopt.exporter.executorch_lowering import capture, first_line
from edgeopt.formats.coreml_program import quiet_coremltools
from edgeopt.layer_names import layer_is_exempt, strip_wrapper
from edgeopt.types import Dim, Model, TensorSpec

if TYPE_CHECKING:
    import torch
    from coremltools.converters.mil.mil import Operation
    from coremltools.models import MLModel
    from torch.export import ExportedProgram
    from torch.fx import Node

#: What coremltools raises for what it can't convert; an AssertionError now and then among them.
_REFUSALS = (NotImplementedError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, AssertionError,
             IndexError)  # fmt: skip
_NODE = re.compile(r"fx node (\w+)")
_OPERATOR = re.compile(r"op '([\w.]+)'")
_WITH_WEIGHTS = ("aten.conv", "aten.linear")


@dataclass(frozen=True, slots=True)
class Converted:
    """A Core ML model, still in memory, and the source layers of its operators (by name of their first output)."""

    mlmodel: MLModel
    layers: dict[str, str]


def convert(model: Model, *, half: bool, ios: int, keep_float: Sequence[str] = ()) -> Converted:
    """Convert for the oldest system from `ios` on that coremltools has every operator for.

    By way of torch.export where coremltools knows all operators; else by a trace, for which it knows the most
    (recurrent layers); else by torch.export with every operator taken apart that torch can take apart.

    Args:
        model: a model with a torch module.
        half: whether it computes in fp16; layers that match `keep_float` then stay float32.
        ios: the oldest system to start from.

    Raises:
        ConversionError: neither way works; names operator and layer.
    """
    if model.module is None:
        raise ConversionError(
            "a Core ML package is made from a PyTorch module, and this model has none",
            where=model.name,
            fix="give the PyTorch model, or choose a LiteRT or ONNX target",
        )
    program = capture(model.module, example_inputs(model), dynamic_shapes(model.inputs))
    source = _Source(model, program, keep_float if half else ())
    refusal = ""
    with quiet_coremltools():
        for version in range(ios, BLOCKWISE + 1):
            for way in (source.exported, source.traced, source.decomposed):
                try:
                    return way(version, half)
                except _REFUSALS as error:
                    # Its text only: its frames would keep coremltools' temporary files.
                    refusal = refusal or first_line(error)
    raise _refused(source.program, refusal)


class _Source:
    """One captured model, convertible to any version."""

    def __init__(self, model: Model, program: ExportedProgram, keep_float: Sequence[str]) -> None:
        self._model = model
        self._keep_float = keep_float
        self.program = program

    def exported(self, ios: int, half: bool) -> Converted:
        return self._from_program(self.program.run_decompositions({}), ios, half)

    def decomposed(self, ios: int, half: bool) -> Converted:
        return self._from_program(self.program.run_decompositions(), ios, half)

    def _from_program(self, program: ExportedProgram, ios: int, half: bool) -> Converted:
        from coremltools.converters.mil.mil.scope import ScopeSource

        rewrite_for_coremltools(program)
        layers = _number_nodes(program)

        def layer_of_op(op: Operation) -> str:
            handles = op.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE) or [None]
            return layers.get(handles[0], "")

        return self._convert(program, ios, half, layer_of_op)

    def traced(self, ios: int, half: bool) -> Converted:
        import torch

        module = self._model.module
        if module is None or any(spec.is_dynamic for spec in self._model.inputs):
            raise ValueError("a trace has no dynamic sizes")
        trace: Callable[..., object] = torch.jit.trace  # torch gives it no types
        with torch.no_grad():
            graph = trace(_flat_module(module), example_inputs(self._model), check_trace=False)
        return self._convert(graph, ios, half, _layer_of_scope)

    def _convert(self, source: object, ios: int, half: bool, layer_of_op: Callable[[Operation], str]) -> Converted:
        import coremltools as ct

        precision = ct.precision.FLOAT32
        if half:
            precision = ct.precision.FLOAT16
        if half and self._keep_float:
            kept = self._keep_float
            precision = ct.transform.FP16ComputePrecision(
                op_selector=lambda op: not layer_is_exempt(layer_of_op(op), kept)
            )
        mlmodel = ct.convert(
            source,
            convert_to="mlprogram",
            compute_precision=precision,
            minimum_deployment_target=getattr(ct.target, f"iOS{ios}"),
            inputs=[_tensor_type(spec, shaped=True) for spec in self._model.inputs],
            outputs=[_tensor_type(spec, shaped=False) for spec in self._model.outputs],
            skip_model_load=True,
        )
        operations = mlmodel._mil_program.functions["main"].operations
        named = ((op.outputs[0].name, layer_of_op(op)) for op in operations if op.op_type != "const" and op.outputs)
        return Converted(mlmodel, {name: layer for name, layer in named if layer})


def native_name(name: str) -> str:
    """The name as Core ML takes it: letters, digits and underscores."""
    plain = re.sub(r"[^0-9A-Za-z_]", "_", name)
    return f"_{plain}" if plain[:1].isdigit() else plain


def _numpy_type(dtype: str) -> type:
    """Apps pass float32 and int32; Core ML casts inside."""
    return np.float32 if dtype.startswith("float") else np.int32


def _tensor_type(spec: TensorSpec, *, shaped: bool) -> object:
    import coremltools as ct

    name, dtype = native_name(spec.name), _numpy_type(spec.dtype)
    if not shaped:  # outputs get theirs from the program
        return ct.TensorType(name=name, dtype=dtype)
    shape = [
        ct.RangeDim(lower_bound=size.min, upper_bound=size.max, default=max(size.min, 1))
        if isinstance(size, Dim)
        else size
        for size in spec.shape
    ]
    return ct.TensorType(name=name, shape=shape, dtype=dtype)


def _layer_of_scope(op: Operation) -> str:
    """A trace keeps the path of attributes, with the operator's own name last."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    path = op.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_NAME) or []
    return strip_wrapper(".".join(path[1:-1])) if len(path) > 2 else ""  # the first is the wrapper of `_flat_module`


def _number_nodes(program: ExportedProgram) -> dict[int, str]:
    """Give every operator a number that coremltools carries along; returns number -> source layer.

    A batch norm that coremltools will fold gets its convolution's, whose weights the operator has.
    """
    layers: dict[int, str] = {}
    for number, node in enumerate(program.graph.nodes):
        if node.op == "call_function":
            node.meta["debug_handle"] = number
            layers[number] = layer_of(_folded_into(node))
    return layers


def _folded_into(node: Node) -> Node:
    if "batch_norm" in operator_name(node) and node.all_input_nodes:
        producer = node.all_input_nodes[0]
        if operator_name(producer).startswith(_WITH_WEIGHTS) and len(producer.users) == 1:
            return producer
    return node


def _refused(program: ExportedProgram, text: str) -> ConversionError:
    match = _NODE.search(text)
    node = next((n for n in program.graph.nodes if match and n.name == match[1]), None)
    if node is None and (kind := _OPERATOR.search(text)):
        node = next((n for n in program.graph.nodes if kind[1] in operator_name(n)), None)
    operator = f" the operator {operator_name(node)}" if node is not None else ""
    layer = layer_of(node) if node is not None else ""
    return ConversionError(
        f"coremltools can't convert{operator or ' the model'} ({text})",
        where=f"layer {layer!r}" if layer else "the model",
        fix="replace that operator, or choose another format",
    )


def _flat_module(module: torch.nn.Module) -> torch.nn.Module:
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return _flat(self.module(*inputs))

    return Flat().eval()


def _flat(outputs: object) -> tuple[torch.Tensor, ...]:
    """Tensors of a nested output, in order; a trace takes no other structure."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return tuple(tensor for part in outputs for tensor in _flat(part))
    raise TypeError(f"an output of type {type(outputs).__name__}")
