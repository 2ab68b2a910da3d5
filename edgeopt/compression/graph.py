"""The ATen graph of a module, and the operators in it whose weights a pass may edit."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeGuard

import numpy as np

from edgeopt.errors import ConversionError
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Array, Model

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

Kind = Literal["convolution", "linear", "affine"]


def aten(names: str) -> frozenset[str]:
    """Names of ATen operators, separated by spaces, as `name_of` gives them."""
    return frozenset(f"aten.{name}" for name in names.split())


_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")
_TRANSPOSED = ("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
_NORMS = ("aten.batch_norm", "aten.group_norm", "aten.instance_norm", "aten.layer_norm", "aten.rms_norm")
#: Operators that only move elements about, or repeat them.
MOVES = aten(
    "channel_shuffle chunk expand flatten flip narrow numpy_T permute pixel_shuffle pixel_unshuffle repeat reshape "
    "roll select slice split split_with_sizes squeeze swapaxes t transpose unbind unflatten unsqueeze view "
    "_unsafe_view"
)

_LAST_AXES_NORMS = ("aten.layer_norm", "aten.rms_norm")


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator with weights of its own: no other operator reads them, and they are tied to nothing.

    Attributes:
        node: in the exported graph.
        kind: "affine" multiplies each channel by a factor: the second half of a normalization, or a bare `x * weight`.
        layer: path of the innermost source module.
        value: the activation that it reads.
        weight, bias: names of the parameters in the module; `bias` is None when there is none.
        has_foreign_bias: adds a bias that can't be edited (shared, or computed).
        out_index, in_index: the output and the input channel that each weight belongs to, broadcastable to the
            weight's shape; `in_index` is None for "affine".
        out_channels, in_channels: how many there are.
        channel_axis: of the activations, from the right for linear operators: -1; 1 (or 0 unbatched) for convolutions.
        is_padded: a convolution that sees zeros around its input, or a transposed one, whose border sees fewer taps.
    """

    node: Node
    kind: Kind
    layer: str
    value: Node
    weight: str
    bias: str | None
    has_foreign_bias: bool
    out_index: Array
    in_index: Array | None
    out_channels: int
    in_channels: int
    channel_axis: int
    is_padded: bool = False


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured module.

    Attributes:
        program: the exported program.
        owned: placeholders of parameters and buffers that one operator alone reads -> their names in the module.
        operators: in execution order, by node.
    """

    program: ExportedProgram
    owned: dict[Node, str]
    operators: dict[Node, Operator]

    @property
    def nodes(self) -> list[Node]:
        return list(self.program.graph.nodes)


def capture(model: Model) -> Graph:
    """Export the model's module for the shapes of its example inputs.

    Raises:
        ConversionError: torch.export can't follow the module.
    """
    import torch

    if model.module is None:
        raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
    arrays = [np.ascontiguousarray(model.example_inputs[spec.name], dtype=spec.dtype) for spec in model.inputs]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch's recurrent layers set their list of weights while they are traced; nobody reads it afterwards.
            warnings.filterwarnings("ignore", message="(?s).*_flat_weights")
            program = torch.export.export(model.module, tuple(torch.tensor(array) for array in arrays))
    except Exception as error:  # tracing runs the user's own forward, which may raise anything
        # torch.export documents no errors; it raises many kinds.
        reason = str(error).strip().splitlines()
        raise ConversionError(
            f"torch.export can't follow the model: {reason[0] if reason else type(error).__name__}", where=model.name
        ) from error
    owned = _owned(program)
    found = (_operator(node, owned) for node in program.graph.nodes)
    return Graph(program, owned, {operator.node: operator for operator in found if operator is not None})


def name_of(node: Node) -> str:
    """ "aten.conv2d", overload left out, in-place forms like the others; empty when it is no ATen operator."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return ""
    return str(node.target).rpartition(".")[0].removesuffix("_")


def is_in_place(node: Node) -> bool:
    """Whether it overwrites its first argument."""
    return str(node.target).rpartition(".")[0].endswith("_")


def arguments(node: Node) -> dict[str, object]:
    """All arguments of an ATen operator by their schema's names, defaults filled in."""
    schema = getattr(node.target, "_schema").arguments  # noqa: B009 -- typed as a plain callable
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    return {argument.name: argument.default_value for argument in schema} | given | dict(node.kwargs)


def layer_of(node: Node) -> str:
    """Path of the innermost source module that this operator comes from; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    # torch.export marks the second call of a shared module with "@1".
    paths = [str(path).split("@")[0] for path, _ in stack.values()]
    innermost = next((path for path in reversed(paths) if path), "")
    return strip_wrapper(innermost)


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Shape of a node's value; None when it isn't one tensor of a static shape."""
    import torch

    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(value.shape)


def _owned(program: ExportedProgram) -> dict[Node, str]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    mutated = set(signature.buffers_to_mutate.values())
    tensors = {name: program.state_dict.get(name, program.constants.get(name)) for name in names.values()}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    used = [node for node in placeholders if node.users]
    storages = Counter(_storage(tensors[names[node.name]]) for node in used)
    return {
        node: names[node.name]
        for node in used
        if len(node.users) == 1
        and storages[_storage(tensors[names[node.name]])] == 1
        and names[node.name] not in mutated
        and node.meta["val"].dtype.is_floating_point
    }


def _storage(tensor: object) -> int:
    import torch

    return tensor.untyped_storage().data_ptr() if isinstance(tensor, torch.Tensor) else 0


def _operator(node: Node, owned: dict[Node, str]) -> Operator | None:
    name = name_of(node)
    if name in (*_CONVOLUTIONS, *_TRANSPOSED, "aten.convolution"):
        return _convolution(node, owned, name)
    if name in ("aten.linear", "aten.matmul", "aten.mm", "aten.addmm"):
        return _linear(node, owned, name)
    if name in _NORMS:
        return _norm(node, owned, name)
    return _factor(node, owned) if name == "aten.mul" else None


def _convolution(node: Node, owned: dict[Node, str], name: str) -> Operator | None:
    given = arguments(node)
    value, weight, groups = given["input"], _weight(given["weight"], owned), given["groups"]
    rank = shape_of(node)
    if weight is None or rank is None or not is_node(value) or not isinstance(groups, int):
        return None
    placeholder, dims = weight
    shape = tuple(placeholder.meta["val"].shape)
    if dims != list(range(len(shape))):
        return None
    is_transposed = name in _TRANSPOSED or given.get("transposed") is True
    first, second = np.arange(shape[0]), np.arange(shape[1] * groups).reshape(groups, shape[1])
    # Of each group's block of the first axis, all rows meet the same slice of the other side's channels.
    grouped = np.repeat(second, shape[0] // groups, axis=0)
    spatial = (1,) * (len(shape) - 2)
    along_first, along_second = first.reshape(-1, 1, *spatial), grouped.reshape(*grouped.shape, *spatial)
    bias, is_foreign = _bias(given["bias"], owned)
    return Operator(
        node=node,
        kind="convolution",
        layer=layer_of(node),
        value=value,
        weight=owned[placeholder],
        bias=bias,
        has_foreign_bias=is_foreign,
        out_index=along_second if is_transposed else along_first,
        in_index=along_first if is_transposed else along_second,
        out_channels=shape[1] * groups if is_transposed else shape[0],
        in_channels=shape[0] if is_transposed else shape[1] * groups,
        channel_axis=len(rank) - len(shape) + 1,
        is_padded=is_transposed or _pads(given["padding"]),
    )


def _pads(padding: object) -> bool:
    if isinstance(padding, list | tuple):
        return any(amount != 0 for amount in padding)
    return padding not in (0, "valid")


def _linear(node: Node, owned: dict[Node, str], name: str) -> Operator | None:
    given = arguments(node)
    value = given.get("input", given.get("mat1", given.get("self")))
    weight = _weight(given.get("weight", given.get("mat2", given.get("other"))), owned)
    if weight is None or not is_node(value) or given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        return None
    placeholder, dims = weight
    if len(dims) != 2 or shape_of(node) is None:
        return None
    out_dim, in_dim = dims if name == "aten.linear" else dims[::-1]
    shape = tuple(placeholder.meta["val"].shape)
    index = [np.arange(size).reshape([-1 if axis == own else 1 for axis in (0, 1)]) for own, size in enumerate(shape)]
    bias, is_foreign = _bias(given["bias"] if name == "aten.linear" else given["self"], owned)
    if name in ("aten.matmul", "aten.mm"):
        bias, is_foreign = None, False
    return Operator(
        node=node,
        kind="linear",
        layer=layer_of(node),
        value=value,
        weight=owned[placeholder],
        bias=bias,
        has_foreign_bias=is_foreign,
        out_index=index[out_dim],
        in_index=index[in_dim],
        out_channels=shape[out_dim],
        in_channels=shape[in_dim],
        channel_axis=-1,
    )


def _norm(node: Node, owned: dict[Node, str], name: str) -> Operator | None:
    given = arguments(node)
    bias, is_foreign = _bias(given.get("bias"), owned)
    return _affine(
        node, given["input"], given["weight"], owned, bias, is_foreign, -1 if name in _LAST_AXES_NORMS else 1
    )


def _factor(node: Node, owned: dict[Node, str]) -> Operator | None:
    """`x * weight`, the way out of a normalization that is written out by hand."""
    left, right = (node.args[0], node.args[1])
    for value, weight in ((left, right), (right, left)):
        if not (is_node(weight) and weight in owned and is_node(value)):
            continue
        shape = shape_of(weight)
        # A single factor scales all channels alike: nothing to gain. A wider weight broadcasts the value.
        if shape and max(shape) > 1 and shape_of(value) == shape_of(node):
            return _affine(node, value, weight, owned, None, False, -1)
    return None


def _affine(
    node: Node, value: object, weight: object, owned: dict[Node, str], bias: str | None, is_foreign: bool, axis: int
) -> Operator | None:
    if not (is_node(weight) and weight in owned and is_node(value)) or shape_of(node) is None:
        return None
    shape = tuple(weight.meta["val"].shape)
    count = int(np.prod(shape))
    return Operator(
        node=node,
        kind="affine",
        layer=layer_of(node),
        value=value,
        weight=owned[weight],
        bias=bias,
        has_foreign_bias=is_foreign,
        out_index=np.arange(count).reshape(shape),
        in_index=None,
        out_channels=count,
        in_channels=count,
        channel_axis=axis,
    )


def _weight(argument: object, owned: dict[Node, str]) -> tuple[Node, list[int]] | None:
    """The parameter behind a weight argument, and which of its axes each axis of the argument is."""
    chain = []
    node = argument
    while is_node(node) and name_of(node) in ("aten.t", "aten.transpose", "aten.permute", "aten.numpy_T"):
        if len(node.users) != 1:
            return None
        chain.append(node)
        node = node.args[0]
    if not (is_node(node) and node in owned):
        return None
    dims = list(range(node.meta["val"].dim()))
    for step in reversed(chain):
        dims = _moved(step, dims)
    return node, dims


def _moved(node: Node, dims: list[int]) -> list[int]:
    """Axes after a permutation: performed on a tensor whose sizes tell its axes apart."""
    import torch

    probe = torch.empty([axis + 1 for axis in dims], device="meta")
    operator = node.target
    assert callable(operator)
    moved: torch.Tensor = operator(probe, *node.args[1:], **node.kwargs)
    return [size - 1 for size in moved.shape]


def _bias(argument: object, owned: dict[Node, str]) -> tuple[str | None, bool]:
    if argument is None:
        return None, False
    name = owned.get(argument) if is_node(argument) else None
    return name, name is None


def is_node(value: object) -> TypeGuard[Node]:
    from torch.fx import Node

    return isinstance(value, Node)
