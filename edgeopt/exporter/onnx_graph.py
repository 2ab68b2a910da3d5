"""A float ONNX graph from a model: converted by torch or read from a file, simplified, named by layer, and clean."""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError, MissingError
from edgeopt.exporter.onnx_aside import put_back, set_aside
from edgeopt.formats.onnx import load, source_layer
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Array, Dim, Model, TensorSpec

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 18
#: The first whose Cast knows 4-bit integers, and whose QuantizeLinear knows 16-bit ones.
WIDE_OPSET = 21
#: The first version of the file format with 4-bit integers.
MIN_IR = 10
#: protobuf can't serialize more; weights beside the file would make it two files that must not be parted.
MAX_BYTES = 2**31 - 1
#: Operators into which a following batch-norm may have been folded.
FOLDABLE = ("Conv", "ConvTranspose", "Gemm")
#: What onnxsim shall not merge: products of several layers, of which keep-float could name none, into one product or
#: into ONNX Runtime's own attention operators, which have no int8 form and hide the types of what follows; and a
#: product of rank 3 and its bias into a Gemm between two reshapes, which belongs to no layer and is no faster in int8.
SKIPPED_OPTIMIZERS = ("fuse_qkv", "fuse_attention", "fuse_gqa", "fuse_matmul_add_bias_into_gemm_batched")


def float_graph(model: Model) -> onnx.ModelProto:
    """The model as one simplified float graph whose inputs and outputs have the model's names.

    Nodes are named "<layer>/<operator>", without what would differ between machines (stack traces, paths).
    Raises ConversionError naming operator and layer, or the size when the graph doesn't fit one file of 2 GiB.
    """
    if model.native is not None and model.native.kind == "onnx":
        proto = at_opset(load(model.native.path), OPSET, model.name)
    elif model.module is not None:
        _check_size(sum(v.nbytes for v in model.module.state_dict().values() if hasattr(v, "nbytes")))
        proto = _from_torch(model, model.module)
    else:
        kind = model.native.kind if model.native is not None else "this"
        raise ConversionError(
            f"a {kind} model can't be converted to ONNX", where=model.name, fix="export it to a LiteRT target"
        )
    _check_size(sum(weight_bytes(i) for i in proto.graph.initializer))
    from_file = model.native is not None
    _name_by_layer(proto, from_file)
    proto = _simplified(proto)
    _name_by_layer(proto, from_file)
    clean(proto)
    return proto


def at_opset(proto: onnx.ModelProto, opset: int, name: str) -> onnx.ModelProto:
    """The graph in at least that opset; `name` is the model's, for the error.

    Raises ConversionError where an operator of an older one has no equivalent.
    """
    import onnx

    given = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=opset)
    if given >= opset:
        return proto
    try:
        raised = onnx.version_converter.convert_version(proto, opset)
    # The C++ converter raises RuntimeError and its own classes for operators that it has no rule for.
    except Exception as error:
        raise ConversionError(
            f"its opset {given} can't be raised to {opset}: {_first_line(error)}",
            where=name,
            fix=f"export the ONNX file again with opset {opset}, or choose a scheme that needs none",
        ) from error
    raised.ir_version = max(raised.ir_version, MIN_IR)
    return raised


def _from_torch(model: Model, module: torch.nn.Module) -> onnx.ModelProto:
    import torch

    if find_spec("onnxscript") is None:
        raise MissingError("conversion from torch to ONNX needs the package 'onnxscript'", fix="pip install onnxscript")
    args = tuple(torch.from_numpy(np.array(a)) for a in _example(model))
    shapes = _dynamic_shapes(module, model.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own deprecations here, a dozen times
        try:
            traced = torch.export.export(module, args, dynamic_shapes=shapes)
        # Tracing runs the user's own forward, which may raise anything.
        except Exception as error:
            raise ConversionError(
                f"torch.export can't trace it: {_first_line(error)}",
                where=model.name,
                fix="declare no dimension dynamic that the model fixes, and let no control flow depend on data",
            ) from error
        try:
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=[t.name for t in model.inputs],
                output_names=[t.name for t in model.outputs],
                dynamic_shapes=shapes,
                verbose=False,
            )
        # The converter raises whatever its decompositions and translations raise.
        except Exception as error:
            raise _explain(error, traced, model) from error
    if program is None:
        raise ConversionError("torch.onnx returned nothing", where=model.name)
    return program.model_proto


def _example(model: Model) -> list[Array]:
    """Example inputs with two entries along dynamic dimensions: torch takes a size of one as fixed."""
    arrays = []
    for spec in model.inputs:
        array = model.example_inputs[spec.name]
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, Dim) and array.shape[axis] == 1 and dim.max > 1:
                array = np.repeat(array, 2, axis=axis)
        arrays.append(array)
    return arrays


def _dynamic_shapes(
    module: torch.nn.Module, inputs: tuple[TensorSpec, ...]
) -> tuple[dict[int, object] | tuple[dict[int, object], ...], ...] | None:
    """Per argument of `forward`: axis -> torch dimension; arguments caught by *args are nested one level deeper."""
    import torch

    if not any(t.is_dynamic for t in inputs):
        return None
    dims = {
        d.name: torch.export.Dim(d.name, min=d.min, max=d.max) for t in inputs for d in t.shape if isinstance(d, Dim)
    }
    shapes: list[dict[int, object]] = [
        {axis: dims[d.name] for axis, d in enumerate(t.shape) if isinstance(d, Dim)} for t in inputs
    ]
    for position, parameter in enumerate(inspect.signature(module.forward).parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*shapes[:position], tuple(shapes[position:]))
    return tuple(shapes)


def _explain(error: Exception, traced: torch.export.ExportedProgram, model: Model) -> ConversionError:
    """torch's error, which comes with a page of report, as one line that names the operator and its layer."""
    failed = next((m for e in _chain(error) if (m := re.search(r"translating node %(\w+) ", str(e)))), None)
    missing = next((m for e in _chain(error) if (m := re.search(r"OpOverload\(op='([\w.:]+)'", str(e)))), None)
    nodes = {node.name: node for node in traced.graph.nodes}
    node = nodes.get(failed.group(1)) if failed is not None else None
    if node is None and missing is not None:
        node = next((n for n in traced.graph.nodes if str(n.target).startswith(f"{missing.group(1)}.")), None)
    operator = missing.group(1) if missing is not None else str(node.target) if node is not None else None
    if operator is None:
        return ConversionError(f"torch.onnx failed: {_first_line(list(_chain(error))[-1])}", where=model.name)
    scopes = list(node.meta.get("nn_module_stack", {}).values()) if node is not None else []
    layer = strip_wrapper(str(scopes[-1][0])) if scopes else ""
    return ConversionError(
        f"the operator {operator} can't be converted to ONNX",
        where=f"layer {layer!r}" if layer else model.name,
        fix="replace it by standard operators, or keep that part out of the exported model",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _name_by_layer(proto: onnx.ModelProto, keep_own: bool) -> None:
    """Node names become "<layer>/<operator>", unique, in graph order; names survive every tool, metadata does not.

    With `keep_own`, nodes outside any layer keep the names that a file gave them, by which its users know them.
    """
    parameters = {i.name for i in proto.graph.initializer}
    readers = Counter(name for node in proto.graph.node for name in set(node.input))
    used: Counter[str] = Counter()
    taken: set[str] = set()
    for node in proto.graph.node:
        layer = source_layer(node)
        if node.op_type in FOLDABLE and len(node.input) > 1 and node.metadata_props:
            # A convolution that swallowed a batch-norm carries the batch-norm's scope; its weight tells the truth.
            weight = node.input[1]
            if weight in parameters and readers[weight] == 1 and weight.endswith(".weight"):
                layer = weight.removesuffix(".weight")
        layer = strip_wrapper(layer)
        name = f"{layer}/{node.op_type}" if layer else (keep_own and node.name.strip("/")) or node.op_type
        unique, count = name, used[name]
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        used[name] = count
        taken.add(unique)
        node.name = unique


def _simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Folded and fused by onnxsim; the graph as it was where onnxsim fails or changes what the graph takes or gives."""
    import onnxsim

    light, weights = set_aside(proto)
    try:
        simplified, verified = onnxsim.simplify(light, skipped_optimizers=list(SKIPPED_OPTIMIZERS))
    # A C++ tool that is only an improvement: whatever it raises, the unsimplified graph is still right.
    except Exception:
        return proto
    if verified and _interface(simplified) == _interface(light):
        put_back(simplified, weights)
        _name_biased_products(proto, simplified)
        proto = simplified
    return proto


def _name_biased_products(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Where onnxsim made a Gemm of a MatMul and an Add, which leaves it without a name, call it as the MatMul was."""
    makers = {output: node for node in before.graph.node for output in node.output}
    for node in after.graph.node:
        added = makers.get(node.output[0])
        if node.op_type == "Gemm" and added is not None and added.op_type == "Add":
            parts = (makers[name] for name in added.input if name in makers)
            products = (part for part in parts if part.op_type == "MatMul" and part.input[1] == node.input[1])
            node.name = next(products, added).name


def _interface(proto: onnx.ModelProto) -> list[tuple[str, int, tuple[int | str, ...]]]:
    return [
        (v.name, v.type.tensor_type.elem_type, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
        for v in (*proto.graph.input, *proto.graph.output)
    ]


def clean(proto: onnx.ModelProto) -> None:
    """Drop notes that differ between machines and runs, and the value infos that later rewriting would invalidate."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    graph = proto.graph
    graph.name = "main_graph"
    graph.doc_string = ""
    del graph.value_info[:]
    for item in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *proto.functions):
        del item.metadata_props[:]
        item.doc_string = ""


def weight_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a constant as stored, in bytes."""
    return len(tensor.raw_data) if tensor.HasField("raw_data") else tensor.ByteSize()


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ConversionError(
            f"its weights take {size / 2**30:.1f} GiB, one ONNX file holds less than 2 GiB",
            fix="choose a smaller model or the LiteRT format",
        )


def write(proto: onnx.ModelProto, path: Path) -> None:
    """Write one file and read it back: there, not empty, and valid. Raises ConversionError otherwise."""
    import onnx

    _check_size(proto.ByteSize())
    path.write_bytes(proto.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ConversionError(f"the file written is not valid ONNX: {_first_line(error)}", where=path.name) from error
