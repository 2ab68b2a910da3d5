"""Which parts of a .tflite graph XNNPACK computes with sparse kernels.

The rules are those of XNNPACK's `xnn_subgraph_rewrite_for_nchw`, in the terms of the file: a 3x3 stride-2 convolution
of three channels leads into such a part, global average pooling leads out, everything between has a kernel for the NCHW
layout, and over two thirds of all 1x1 weights there are zero. One operator that does not fit takes the whole part out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.formats.litert import layer_of, readable
from edgeopt.types import Array

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

_ELEMENTWISE = ("RELU", "RELU6", "HARD_SWISH", "LOGISTIC", "LEAKY_RELU", "ELU", "ABS", "NEG", "SQUARE", "TANH")
_NO_KERNEL = "XNNPACK has no NCHW kernel for it"

_ROLES = ("into", "inside", "out of")


class Network:
    """The main graph with who makes and who reads each tensor. Operators are known by position."""

    def __init__(self, model: schema.ModelT) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.model, self.graph = model, model.subgraphs[0]
        names = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
        self.codes: list[str] = [names.get(code.builtinCode, "CUSTOM") for code in model.operatorCodes]
        self.maker = {int(t): p for p, op in enumerate(self.graph.operators) for t in op.outputs}
        self.readers: dict[int, list[int]] = defaultdict(list)
        for position, op in enumerate(self.graph.operators):
            for tensor in op.inputs:
                self.readers[int(tensor)].append(position)
        self.outputs = {int(t) for t in self.graph.outputs}
        self._buffer_users = Counter(t.buffer for each in model.subgraphs for t in each.tensors)

    def kind(self, position: int) -> str:
        """The operator's name in the schema."""
        return self.codes[int(self.graph.operators[position].opcodeIndex)]

    def layer(self, position: int) -> str:
        """Path of the source layer."""
        return layer_of(readable(self.graph.tensors[self.output(position)].name.decode()))

    def input(self, position: int, number: int = 0) -> int:
        return int(self.graph.operators[position].inputs[number])

    def output(self, position: int) -> int:
        return int(self.graph.operators[position].outputs[0])

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Sizes, -1 for dynamic ones."""
        found = self.graph.tensors[tensor]
        sizes = found.shape if found.shapeSignature is None else found.shapeSignature
        return () if sizes is None else tuple(int(n) for n in sizes)

    def constant(self, tensor: int) -> bool:
        return self.model.buffers[self.graph.tensors[tensor].buffer].data is not None

    def data(self, tensor: int, dtype: type[np.generic]) -> Array:
        """Values of a constant, flat."""
        return np.frombuffer(bytes(self.model.buffers[self.graph.tensors[tensor].buffer].data), dtype)

    def stored(self, position: int) -> int | None:
        """The constant float tensor that a convolution's weights come from: itself or, in float16 files, what a
        DEQUANTIZE turns into float32. None where they are of another kind."""
        from ai_edge_litert import schema_py_generated as schema

        tensor = self.input(position, 1)
        if tensor in self.maker and self.kind(self.maker[tensor]) == "DEQUANTIZE":
            tensor = self.input(self.maker[tensor])
        kinds = (schema.TensorType.FLOAT32, schema.TensorType.FLOAT16)
        return tensor if self.constant(tensor) and self.graph.tensors[tensor].type in kinds else None

    def weights(self, position: int) -> Array:
        """Of a float convolution, (outputs, height, width, inputs)."""
        from ai_edge_litert import schema_py_generated as schema

        tensor = self.stored(position)
        if tensor is None:
            raise ValueError(f"operator {position} has no constant float weights")
        half = self.graph.tensors[tensor].type == schema.TensorType.FLOAT16
        return self.data(tensor, np.float16 if half else np.float32).reshape(self.shape(tensor))

    def shared(self, tensor: int) -> bool:
        return len(self.readers[tensor]) > 1 or self._buffer_users[self.graph.tensors[tensor].buffer] > 1

    def pointwise(self) -> list[int]:
        """Positions of the float 1x1 convolutions with constant weights."""
        return [
            p
            for p in range(len(self.graph.operators))
            if self.kind(p) == "CONV_2D" and self.shape(self.input(p, 1))[1:3] == (1, 1) and self.stored(p) is not None
        ]

    def uncountable(self) -> str | None:
        """The first matrix product whose weights are no float constants, if any.

        Once a file asks for sparse kernels, XNNPACK counts the zeros of all of them, wherever they stand, and reads
        memory that is not there for others.
        """
        for position in range(len(self.graph.operators)):
            kind = self.kind(position)
            counted = kind == "FULLY_CONNECTED" or (
                kind == "CONV_2D" and self.shape(self.input(position, 1))[1:3] == (1, 1)
            )
            if counted and self.stored(position) is None:
                return f"{kind} in {self.layer(position)!r} has weights that are not float constants"
        return None

    def source(self, position: int, number: int = 0) -> int:
        """An operator's input, past a PAD that XNNPACK merges into the convolution."""
        tensor = self.input(position, number)
        return self.input(self.maker[tensor]) if self.merged(self.maker.get(tensor)) else tensor

    def merged(self, position: int | None) -> bool:
        """Whether an operator is a zero PAD of height and width for one convolution without padding of its own."""
        from ai_edge_litert import schema_py_generated as schema

        if position is None or self.kind(position) != "PAD" or not self.constant(self.input(position, 1)):
            return False
        readers = self.readers[self.output(position)]
        if len(readers) != 1 or self.kind(readers[0]) not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            return False
        amounts = self._amounts(position)
        spatial_only = amounts.shape == (4, 2) and not amounts[[0, 3]].any()
        return spatial_only and self.graph.operators[readers[0]].builtinOptions.padding == schema.Padding.VALID

    def effective_readers(self, tensor: int) -> list[int]:
        """Who reads a tensor, where a merged PAD counts as the convolution behind it."""
        direct = self.readers[tensor]
        return [p for r in direct for p in (self.readers[self.output(r)] if self.merged(r) else [r])]

    def padding(self, position: int) -> tuple[int, ...] | None:
        """Rows and columns of zeros before and after, of a convolution; None where XNNPACK leaves it to run time."""
        from ai_edge_litert import schema_py_generated as schema

        maker = self.maker.get(self.input(position))
        if maker is not None and self.merged(maker):
            return tuple(int(n) for n in self._amounts(maker)[1:3].ravel())
        options = self.graph.operators[position].builtinOptions
        if options.padding == schema.Padding.VALID:
            return (0, 0, 0, 0)
        if (options.strideH, options.strideW) != (1, 1):
            return None
        height, width = (size - 1 for size in self.shape(self.input(position, 1))[1:3])
        return (height // 2, height - height // 2, width // 2, width - width // 2)

    def _amounts(self, pad: int) -> Array:
        from ai_edge_litert import schema_py_generated as schema

        tensor = self.input(pad, 1)
        wide = self.graph.tensors[tensor].type == schema.TensorType.INT64
        return self.data(tensor, np.int64 if wide else np.int32).reshape(-1, 2)


class Parts:
    """Connected operators that could be computed in NCHW, and what is wrong with each part as a whole."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        self.wrong: dict[int, str] = {}
        self.out_of: dict[int, set[int]] = defaultdict(set)
        self.misfits: dict[int, str] = {}

    def refusal(self, position: int) -> str | None:
        if position in self.misfits:
            return self.misfits[position]
        return self.wrong.get(self.of[position])

    def ends(self, position: int) -> set[int]:
        """The pooling operators that lead out of an operator's part."""
        return self.out_of[self.of[position]]


def find_parts(network: Network) -> Parts:
    parts = Parts()
    roles: dict[int, str] = {}
    for position in range(len(network.graph.operators)):
        role = _role(network, position)
        if role in _ROLES:
            roles[position] = role
        else:
            parts.misfits[position] = f"{network.kind(position)} in {network.layer(position)!r}: {role}"
    leader = {position: position for position in roles}

    def find(position: int) -> int:
        while leader[position] != position:
            position = leader[position]
        return position

    links = [(p, t) for p, role in roles.items() if role != "into" for t in _activations(network, p)]
    for position, tensor in links:
        maker = network.maker.get(tensor)
        if maker in roles and maker is not None:
            leader[find(maker)] = find(position)
    parts.of = {position: find(position) for position in roles}
    for position, tensor in links:
        maker = network.maker.get(tensor)
        if maker is None:
            wrong: str | None = f"no 3x3 stride-2 convolution comes before {network.layer(position)!r}"
        else:
            wrong = parts.misfits.get(maker)
        if wrong:
            parts.wrong.setdefault(parts.of[position], wrong)
    for position, role in roles.items():
        wrong = _wrong_exit(network, position, role, roles, parts.misfits)
        if wrong:
            parts.wrong.setdefault(parts.of[position], wrong)
        if role == "out of":
            parts.out_of[parts.of[position]].add(position)
    _judge_zeros(network, parts)
    return parts


def _activations(network: Network, position: int) -> Iterator[int]:
    yield network.source(position)
    if network.kind(position) in ("ADD", "MUL"):
        yield network.input(position, 1)


def _wrong_exit(
    network: Network, position: int, role: str, roles: dict[int, str], misfits: dict[int, str]
) -> str | None:
    """What is wrong with where an operator's result goes."""
    output = network.output(position)
    readers = network.effective_readers(output)
    strangers = [r for r in readers if roles.get(r, "into") == "into"]
    if role == "out of" and len(strangers) == len(readers):
        return None
    if output in network.outputs:
        return f"the result of {network.layer(position)!r} is an output of the model"
    if strangers:
        return misfits.get(strangers[0], f"{network.layer(strangers[0])!r} reads it as another part")
    return None if readers else f"nothing reads {network.layer(position)!r}"


def _judge_zeros(network: Network, parts: Parts) -> None:
    zeros: Counter[int] = Counter()
    elements: Counter[int] = Counter()
    for position in network.pointwise():
        if position in parts.of:
            weights = network.weights(position)
            zeros[parts.of[position]] += int(np.count_nonzero(weights == 0))
            elements[parts.of[position]] += weights.size
    for part, count in elements.items():
        if not parts.out_of[part]:
            parts.wrong.setdefault(part, "no global average pooling comes after it")
        if zeros[part] * 3 <= count * 2:
            share = zeros[part] / count
            parts.wrong.setdefault(part, f"{share:.0%} of all 1x1 weights around it are zero; XNNPACK wants over 67 %")


def _role(network: Network, position: int) -> str:
    """Which of `_ROLES` an operator has, or why XNNPACK has no NCHW kernel for it."""
    kind, op = network.kind(position), network.graph.operators[position]
    if network.merged(position):
        return "merged into the convolution that reads it"
    if not len(op.inputs) or not len(op.outputs):
        return _NO_KERNEL
    sizes = [network.shape(tensor) for tensor in (network.source(position), network.output(position))]
    if len(sizes[0]) != 4 or (kind != "MEAN" and len(sizes[1]) != 4):
        return "its tensors are not images"
    if any(n < 0 for size in sizes for n in size):
        return "its sizes are dynamic"
    if kind == "CONV_2D":
        return _convolution_role(network, position)
    if kind == "DEPTHWISE_CONV_2D":
        return _depthwise_role(network, position)
    if kind == "MEAN":
        axes = network.input(position, 1)
        reduced = sorted(int(a) % 4 for a in network.data(axes, np.int32)) if network.constant(axes) else None
        return "out of" if reduced == [1, 2] else "pools over other than height and width"
    if kind in ("ADD", "MUL"):
        others = [network.input(position, number) for number in (0, 1)]
        images = all(len(network.shape(t)) == 4 and not network.constant(t) for t in others)
        return "inside" if images else "one operand is a constant or no image"
    return "inside" if kind in _ELEMENTWISE else _NO_KERNEL


def _convolution_role(network: Network, position: int) -> str:
    options = network.graph.operators[position].builtinOptions
    kernel = network.shape(network.input(position, 1))
    strides, padding = (options.strideH, options.strideW), network.padding(position)
    channels = network.shape(network.source(position))[3]
    if network.stored(position) is None:
        return "its weights are not float constants"
    if (options.dilationHFactor, options.dilationWFactor) != (1, 1) or kernel[3] != channels:
        return "is dilated or grouped"
    if kernel[1:3] == (1, 1):
        return "inside" if strides == (1, 1) and padding == (0, 0, 0, 0) else "a 1x1 kernel with stride or padding"
    if kernel[1:3] == (3, 3) and strides == (2, 2) and channels == 3:
        return "into" if padding == (1, 1, 1, 1) else _PADDED.format(1)
    return "a full convolution that is not 3x3 with stride 2 on three channels"


_PADDED = "needs {0} zeros on every side; TensorFlow's SAME padding with a stride has other ones"


def _depthwise_role(network: Network, position: int) -> str:
    options = network.graph.operators[position].builtinOptions
    kernel, channels = network.shape(network.input(position, 1)), network.shape(network.source(position))[3]
    if network.stored(position) is None:
        return "its weights are not float constants"
    if (options.dilationHFactor, options.dilationWFactor) != (1, 1) or kernel[3] != channels:
        return "is dilated or multiplies channels"
    if kernel[1:3] not in ((3, 3), (5, 5)) or (options.strideH, options.strideW) not in ((1, 1), (2, 2)):
        return "kernels are for 3x3 and 5x5 with stride 1 or 2"
    margin = kernel[1] // 2
    return "inside" if network.padding(position) == (margin,) * 4 else _PADDED.format(margin)
