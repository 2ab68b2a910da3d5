"""Names in a .tflite file that a person and a program can use: layers' paths, the model's own inputs and outputs.

litert-torch names every tensor after the classes and attributes on the call stack, joins the names of everything
that was fused or shared, and calls inputs "args_0". Here the stack of every traced node is replaced by one short mark
before the conversion; afterwards the marks in the file are read back and become plain paths.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt.layer_names import strip_wrapper

if TYPE_CHECKING:
    import torch.fx
    from ai_edge_litert import schema_py_generated as schema

#: litert-torch keeps only what follows the last dot of a path.
_DOT = "|"
#: Kinds of mark: layers that own the kernel an operator is named after, and all others.
_KERNEL, _OTHER = "kernel", "other"
KERNEL_OPERATORS = (
    "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "CONV_3D_TRANSPOSE", "FULLY_CONNECTED", "BATCH_MATMUL",
    "EMBEDDING_LOOKUP",
)  # fmt: skip
#: What ai-edge-quantizer appends to the names of tensors that it converts.
_CONVERTED = re.compile(r"(?:_quantized|_dequant)+(?=:|$)")
_KERNEL_TARGETS = ("conv", "linear", "matmul", "embedding", "addmm", "bmm", "aten.mm")


def mark_layers(graph: torch.fx.Graph, wrapper: str) -> tuple[str, ...]:
    """Replace the module stack of every node by a mark, and tell which layer made each output.

    Args:
        graph: of an exported program's module.
        wrapper: attribute under which our own input/output adapter holds the model.

    Returns:
        The path of the layer behind each output, "" for the outermost module.
    """
    layers = {node: _layer(node, wrapper) for node in graph.nodes}
    for node, layer in layers.items():
        kind = _KERNEL if any(t in str(node.target) for t in _KERNEL_TARGETS) else _OTHER
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = {"edgeopt": (layer.replace(".", _DOT) or _DOT, kind)}
    (output,) = [node for node in graph.nodes if node.op == "output"]
    return tuple(_origin(node, layers) for node in output.all_input_nodes)


def _layer(node: torch.fx.Node, wrapper: str) -> str:
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return strip_wrapper(path.removeprefix(wrapper).removeprefix("."))


def _origin(node: torch.fx.Node, layers: dict[torch.fx.Node, str]) -> str:
    """The layer of a node, or of what it only rearranges for the model as a whole."""
    while not layers[node] and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return layers[node]


def layers_in(text: str) -> list[str]:
    """Paths of the marks in a message or a tensor name, in order."""
    return [path for _, path in _marks(text)]


def _marks(text: str) -> list[tuple[str, str]]:
    """(kind, path) of every mark in a text."""
    matches = re.finditer(rf'(?:^|[;"])({_KERNEL}|{_OTHER})_([^;"]+)', text)
    return [(kind, path.replace(_DOT, ".").strip(".")) for kind, path in (match.groups() for match in matches)]


def rename(
    model: schema.ModelT, inputs: Sequence[str], outputs: Sequence[str], output_layers: Sequence[str] = ()
) -> None:
    """Give tensors, inputs and outputs their final names, in place.

    A tensor that an operator computes is called after the layer: "stem", then "stem:1" and so on where the layer has
    several; a constant after the operator that reads it first: "stem/1" is its input number 1. ai-edge-quantizer
    needs names to be unique in the file.

    Args:
        model: as litert-torch made it from a marked graph.
        inputs, outputs: names for the signature entries "args_<i>" and "output_<i>".
        output_layers: path of the layer behind each output; the converter renames those tensors itself.
    """
    (signature,) = model.signatureDefs
    for entries, prefix, names in ((signature.inputs, "args_", inputs), (signature.outputs, "output_", outputs)):
        for entry in entries or []:
            entry.name = names[int(entry.name.decode().removeprefix(prefix))].encode()
    main = model.subgraphs[signature.subgraphIndex]
    fallback = {
        entry.tensorIndex: output_layers[list(outputs).index(entry.name.decode())] for entry in signature.outputs
    }
    taken: set[str] = set()
    for entry in signature.inputs or []:
        main.tensors[entry.tensorIndex].name = _unique(entry.name.decode(), taken).encode()
    for graph in model.subgraphs:
        _rename_graph(model, graph, fallback if graph is main else {}, taken)


def _rename_graph(model: schema.ModelT, graph: schema.SubGraphT, fallback: dict[int, str], taken: set[str]) -> None:
    # A layer's plain name goes to the operator with its kernel, not to the padding in front.
    operators = sorted(graph.operators, key=lambda operator: not _is_kernel(model, operator))
    constants = {i for i, tensor in enumerate(graph.tensors) if _is_constant(model, tensor)}
    named = {*graph.inputs}
    claims: Counter[str] = Counter()
    for operator in filter(lambda operator: _is_kernel(model, operator), operators):
        claims.update(set(_kernel_paths(graph, operator.outputs)))
    for operator in operators:
        readings = [i for i in operator.inputs if i in constants]
        for index in operator.outputs:
            if _is_kernel(model, operator):
                layer = _kernel_layer(graph, index, readings, claims)
            else:  # the first of those that were fused into it
                layer = next(iter(layers_in(_name(graph, index))), None)
            name = fallback.get(index, "") if layer is None else layer
            graph.tensors[index].name = _unique(name, taken).encode()
    for operator in operators:
        first = graph.tensors[operator.outputs[0]].name.decode() if len(operator.outputs) else ""
        for position, index in enumerate(operator.inputs):
            if index in constants and index not in named:
                graph.tensors[index].name = _unique(f"{first}/{position}", taken).encode()
                named.add(index)


def _is_kernel(model: schema.ModelT, operator: schema.OperatorT) -> bool:
    from ai_edge_litert import schema_py_generated as schema

    code = model.operatorCodes[operator.opcodeIndex].builtinCode
    return code in {getattr(schema.BuiltinOperator, name) for name in KERNEL_OPERATORS}


def _kernel_layer(
    graph: schema.SubGraphT, output: int, constants: Sequence[int], claims: Mapping[str, int]
) -> str | None:
    """The layer whose kernel the operator runs; None when nothing tells.

    A constant that several layers share puts the marks of all of them in front of each one's own. The own mark is on
    the weight too, and on the fewest operators.

    Args:
        constants: that the operator reads.
        claims: on the outputs of how many kernels each path is marked.
    """
    marks = _marks(_name(graph, output)) or [mark for index in constants for mark in _marks(_name(graph, index))]
    paths = [path for kind, path in marks if kind == _KERNEL]
    if not paths:
        return marks[0][1] if marks else None
    weights = [index for index in constants if len(graph.tensors[index].shape) > 1]
    own = set(_kernel_paths(graph, weights))
    candidates = [path for path in paths if path in own] or paths
    return min(reversed(candidates), key=lambda path: claims.get(path, 0))


def _kernel_paths(graph: schema.SubGraphT, tensors: Iterable[int]) -> list[str]:
    return [path for index in tensors for kind, path in _marks(_name(graph, index)) if kind == _KERNEL]


def _name(graph: schema.SubGraphT, index: int) -> str:
    return str(graph.tensors[index].name.decode())


def _is_constant(model: schema.ModelT, tensor: schema.TensorT) -> bool:
    buffer = model.buffers[tensor.buffer]
    return buffer.data is not None or bool(buffer.offset)


def _unique(name: str, taken: set[str]) -> str:
    unique, number = name, 0
    while unique in taken or not unique:
        number += 1
        unique = f"{name}:{number}"
    taken.add(unique)
    return unique


def rename_conversions(model: schema.ModelT, known: Collection[str]) -> None:
    """Give tensors that ai-edge-quantizer made of others ("conv:1_quantized") names after their layer, in place.

    Args:
        known: names of the file's tensors before it was quantized, which stay.
    """
    tensors = [tensor for graph in model.subgraphs for tensor in graph.tensors]
    taken = {tensor.name.decode() for tensor in tensors} | set(known)
    for tensor in tensors:
        name = tensor.name.decode()
        stem = _CONVERTED.sub("", name)
        if stem != name and name not in known:
            tensor.name = _unique(stem if "/" in stem else stem.partition(":")[0], taken).encode()
