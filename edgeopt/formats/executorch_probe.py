"""Inner tensors of a .pte file as extra outputs, those inside XNNPACK delegates included.

A delegate's inner value becomes one more external output of its graph, one more argument of its call and one more
output of the method. What a portable kernel makes gets memory of its own, which nothing later overwrites.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError
from edgeopt.formats.executorch import read_program
from edgeopt.formats.executorch_delegate import DelegateGraph, Node, Value, load_schema
from edgeopt.formats.executorch_kinds import MOVEMENT, PORTABLE_MOVEMENT
from edgeopt.formats.executorch_layers import KEY, Layers, decode
from edgeopt.formats.probe import Probed, ProbePoint, probe_name
from edgeopt.formats.probe_points import Found, Operator, Role, find_points
from edgeopt.types import DType, QuantParams, Signature, SignatureTensor

if TYPE_CHECKING:
    from executorch.exir import schema
    from executorch.exir._serialize._program import PTEFile

_KERNELS = {"Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected", "BatchMatrixMultiply",
            "ScaledDotProductAttention"}  # fmt: skip
#: Of those and others, the ones whose results are channel-last.
_IMAGE = {"Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "AvgPooling2d", "MaxPooling2d", "GlobalAvgPooling2d",
          "StaticResizeBilinear2D", "ArgMaxPooling2d"}  # fmt: skip
_PORTABLE_KERNELS = {"aten.convolution", "aten.addmm", "aten.mm", "aten.bmm", "aten.linear", "aten.embedding"}
_PORTABLE_ACTIVATIONS = {"aten.relu", "aten.hardtanh", "aten.clamp"}
_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
_ALIGNMENT = 16
_FLOAT, _CHAR, _HALF = 6, 1, 5  # ScalarType
_DTYPES: dict[int, DType] = {_FLOAT: "float32", _CHAR: "int8", _HALF: "float16"}
_DAMAGE = (
    struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, AssertionError, OverflowError,
    subprocess.SubprocessError,
)  # fmt: skip


def add_probes(source: Path, signature: Signature, destination: Path) -> Probed:
    """See `edgeopt.formats.probe.add_probes`. Layers are known in files that edgeopt has exported."""
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    read_program(source)  # refuses what is corrupt, in a process of its own
    try:
        file = deserialize_pte_binary(source.read_bytes())
        program = _Instrumented(file)
        found = find_points(program.operators, program.outputs)
        outputs = tuple(program.give_out(point.tensor, i) for i, point in enumerate(found))
        program.finish()
        content = bytes(serialize_pte_binary(file, extract_delegate_segments=True))
    except _DAMAGE as error:
        raise UsageError("can't be instrumented", where=str(source), fix="export it again") from error
    destination.write_bytes(content)
    points = tuple(_point(point, tensor) for point, tensor in zip(found, outputs, strict=True))
    return Probed(destination, Signature(signature.inputs, (*signature.outputs, *outputs)), points)


def _point(found: Found, tensor: SignatureTensor) -> ProbePoint:
    return ProbePoint(found.operator.layer, found.operator.type, tensor, found.inputs)


class _Instrumented:
    """One file's main method. Tensors go by their index in the program, or by "instruction/id" inside a delegate."""

    def __init__(self, file: PTEFile) -> None:
        from executorch.exir import schema

        plans = file.program.execution_plan
        self._program = file.program
        self._plan = next((plan for plan in plans if plan.name == "forward"), plans[0])
        self._layers = _layers(file)
        self._instructions = self._plan.chains[0].instructions
        self._graphs: dict[int, DelegateGraph] = {}
        self._quantization: dict[str, QuantParams] = {}
        self._image: set[str] = set()
        self._originals = {str(index) for index in self._plan.outputs}
        self._given = len(self._plan.outputs)
        self.outputs = frozenset(self._originals)
        self.operators: list[Operator] = []
        classes: _Classes | None = None
        made = set(self._plan.inputs)
        for index, instruction in enumerate(self._instructions):
            call = instruction.instr_args
            if isinstance(call, schema.KernelCall):
                self.operators.append(self._kernel(index, call, made))
            elif isinstance(call, schema.DelegateCall):
                delegate = self._plan.delegates[call.delegate_index]
                if delegate.id == "XnnpackBackend":
                    classes = classes or _Classes()
                    data = self._program.backend_delegate_data[delegate.processed.index].data
                    self._graphs[index] = graph = DelegateGraph(bytes(data), classes.schema)
                    self.operators += [self._inner(index, call.args, graph, node) for node in graph.nodes]
                made.update(call.args)

    def give_out(self, name: str, number: int) -> SignatureTensor:
        """Make a tensor an output of the method."""
        instruction, _, inner = name.partition("/")
        if inner:
            index, tensor = self._give_out_inner(int(instruction), int(inner))
        else:
            index = int(name)
            tensor = self._plan.values[index].val
            if name not in self._originals and index not in self._plan.inputs:
                tensor.allocation_info = self._allocate(_bytes(tensor))
        self._plan.outputs.append(index)
        shape = tuple(f"<={d}" if tensor.shape_dynamism and d > 1 else int(d) for d in tensor.sizes)
        return SignatureTensor(
            name=probe_name(number),
            native_name=f"output_{self._given + number}",
            shape=shape,
            dtype=_DTYPES[int(tensor.scalar_type)],
            model_dtype="float32",
            permutation=_TO_NHWC if inner and name in self._image else None,
            quantization=self._quantization.get(name),
        )

    def finish(self) -> None:
        """Write the changed delegates back."""
        for index, graph in self._graphs.items():
            delegate = self._plan.delegates[self._instructions[index].instr_args.delegate_index]
            self._program.backend_delegate_data[delegate.processed.index].data = graph.blob()

    def _give_out_inner(self, instruction: int, number: int) -> tuple[int, schema.Tensor]:
        from executorch.exir import schema

        graph = self._graphs[instruction]
        arguments = self._instructions[instruction].instr_args.args
        if graph.give_out(number) != len(arguments):
            raise ValueError("the delegate's arguments are not its graph's outer values")
        value = graph.values[number]
        template = next(v.val for v in self._plan.values if isinstance(v.val, schema.Tensor))
        dynamic = any(self._plan.values[i].val.shape_dynamism for i in self._plan.inputs if _is_tensor(self._plan, i))
        tensor = replace(
            template,
            scalar_type=type(template.scalar_type)({v: k for k, v in _DTYPES.items()}[value.dtype or "float32"]),
            storage_offset=0,
            sizes=list(value.dims),
            dim_order=list(range(len(value.dims))),
            data_buffer_idx=0,
            allocation_info=None,
            shape_dynamism=schema.TensorShapeDynamism(int(dynamic)),
            extra_tensor_info=None,
        )
        tensor.allocation_info = self._allocate(_bytes(tensor))
        self._plan.values.append(schema.EValue(val=tensor))
        arguments.append(len(self._plan.values) - 1)
        return len(self._plan.values) - 1, tensor

    def _allocate(self, size: int) -> schema.AllocationDetails:
        """Memory that only this tensor uses, at the end of the first planned buffer."""
        from executorch.exir import schema

        sizes = self._plan.non_const_buffer_sizes
        if len(sizes) < 2:
            sizes.append(0)
        start = -(-sizes[1] // _ALIGNMENT) * _ALIGNMENT
        sizes[1] = start + size
        return schema.AllocationDetails(1, start & 0xFFFFFFFF, start >> 32)

    def _kernel(self, index: int, call: schema.KernelCall, made: set[int]) -> Operator:
        operator = self._plan.operators[call.op_index]
        kind = operator.name.replace("::", ".")
        tensors = list(dict.fromkeys(i for i in call.args if _is_tensor(self._plan, i)))
        constants = [i for i in tensors if _is_constant(self._plan.values[i].val)]
        # Kernels take their results as arguments: those that nothing has made before.
        outputs = [i for i in tensors if i not in made and i not in constants]
        made.update(outputs)
        inputs = [i for i in tensors if i not in outputs and i not in constants]
        table = self._plan.values[tensors[0]].val if kind == "aten.embedding" else None
        return Operator(
            layer=self._layers.get(index, ""),
            type=f"{kind}.{operator.overload}" if operator.overload else kind,
            role=self._role(kind, outputs, table),
            inputs=tuple(map(str, inputs)),
            outputs=tuple(map(str, outputs)),
            bare=table is not None and int(table.scalar_type) == _CHAR,
        )

    def _role(self, kind: str, outputs: Sequence[int], table: schema.Tensor | None) -> Role:
        types = [int(self._plan.values[i].val.scalar_type) for i in outputs]
        if not types or types[0] not in _DTYPES or (table is not None and table.sizes[-1] == 1):
            return Role.IGNORED  # the last: the scales of a table of int8 rows
        if kind in _PORTABLE_KERNELS:
            return Role.KERNEL
        if kind in PORTABLE_MOVEMENT:
            return Role.PASSIVE
        return Role.ACTIVATION if kind in _PORTABLE_ACTIVATIONS else Role.COMPUTES

    def _inner(self, index: int, arguments: Sequence[int], graph: DelegateGraph, node: Node) -> Operator:
        def name(number: int) -> str:
            external = graph.values[number].external
            return f"{index}/{number}" if external is None else str(arguments[external])

        inputs = [i for i in node.inputs if not graph.values[i].is_constant]
        for number in node.outputs:
            value = graph.values[number]
            if value.quantization is not None:
                self._quantization[name(number)] = value.quantization
            if _is_image(node, value, any(name(i) in self._image for i in inputs)):
                self._image.add(name(number))
        return Operator(
            layer=self._layers.get((index, node.debug_handle), ""),
            type=node.type,
            role=_inner_role(node, [graph.values[i] for i in node.outputs]),
            inputs=tuple(map(name, inputs)),
            outputs=tuple(map(name, node.outputs)),
        )


class _Classes:
    """The schema's classes, made when the first delegate needs them."""

    def __init__(self) -> None:
        self.schema = load_schema()


def _inner_role(node: Node, outputs: Sequence[Value]) -> Role:
    # A dynamically quantized tensor (Convert's result) has no type of its own to give out.
    if not outputs or outputs[0].dtype is None:
        return Role.PASSIVE if node.type in MOVEMENT else Role.IGNORED
    if node.type in _KERNELS:
        return Role.KERNEL
    if node.type in MOVEMENT:
        return Role.PASSIVE
    return Role.ACTIVATION if node.type == "Clamp" else Role.COMPUTES


def _is_image(node: Node, value: Value, reads_image: bool) -> bool:
    """Whether a value is channel-last. The delegate holds images so, between two transpositions."""
    if len(value.dims) != 4:
        return False
    if node.type == "StaticTranspose":
        return node.permutation == _TO_NHWC if not reads_image else node.permutation != _TO_NCHW
    return node.type in _IMAGE or (reads_image and node.type != "StaticReshape")


def _layers(file: PTEFile) -> Layers:
    entry = file.named_data.pte_data.get(KEY) if file.named_data is not None else None
    return decode(bytes(file.named_data.buffers[entry.buffer_index])) if entry is not None else {}


def _is_tensor(plan: schema.ExecutionPlan, index: int) -> bool:
    return hasattr(plan.values[index].val, "scalar_type")


def _is_constant(tensor: schema.Tensor) -> bool:
    return bool(tensor.data_buffer_idx) and tensor.allocation_info is None


def _bytes(tensor: schema.Tensor) -> int:
    size = {_FLOAT: 4, _HALF: 2, _CHAR: 1}[int(tensor.scalar_type)]
    for dim in tensor.sizes:
        size *= int(dim)
    return size
