"""The operators with weights of a module, as they are called: found, watched and replaced while the module runs.

Calls are intercepted at the level of torch functions, so it makes no difference whether a stock layer, a layer with a
`forward` of its own, a functional call or an exported graph makes them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeopt.compression.surgery import add_bias, has_place_for_bias
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Array, Model, TensorSpec

if TYPE_CHECKING:
    import torch

Kind = Literal["linear", "convolution", "transposed convolution"]

#: Torch functions with weights; exported graphs call overloads of them ("conv2d.default").
_KINDS: dict[str, Kind] = {
    "linear": "linear",
    **{f"conv{n}d": "convolution" for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": "transposed convolution" for n in (1, 2, 3)},
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator with weights.

    Attributes:
        path: of the module that owns the weight, in the user's own module.
        weight: name of its weight in the model's module.
        bias: name of its bias, None where there is none or where it is no parameter.
        kind: what it computes.
        shape: of the weight.
        stride, padding, dilation: of a convolution, one entry per spatial dimension; padding "same" is kept as such.
        groups: of a convolution.
        feeds_norm: its output goes straight into a batch norm, which an exporter folds into the weights.
    """

    path: str
    weight: str
    bias: str | None
    kind: Kind
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | Literal["same"] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    feeds_norm: bool = False

    @property
    def axis(self) -> int:
        """Dimension of the weight that holds the output channels."""
        return 1 if self.kind == "transposed convolution" else 0

    @property
    def output_channels(self) -> int:
        return self.shape[1] * self.groups if self.kind == "transposed convolution" else self.shape[0]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer's operator, which can be made again with other operands."""

    layer: Layer
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    function: Callable[..., torch.Tensor]
    rest: Mapping[str, object]

    def result(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The operator's output for this input, with its own weight and bias where none are given."""
        weight = self.weight if weight is None else weight
        return self.function(input_, weight, self.bias if bias is None else bias, **self.rest)


def intercept(layers: Mapping[int, Layer], handle: Callable[[Call], torch.Tensor]) -> AbstractContextManager[object]:
    """A context in whose thread every call of a layer's operator is answered by `handle`.

    `layers` goes by the `id` of the weight's parameter.
    """
    from torch.overrides import TorchFunctionMode

    class Intercepted(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., torch.Tensor],
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> torch.Tensor:
            del types
            call = _as_call(func, args, kwargs or {}, layers)
            return func(*args, **(kwargs or {})) if call is None else handle(call)

    return Intercepted()


def by_identity(module: torch.nn.Module, layers: Iterable[Layer]) -> dict[int, Layer]:
    """Layers by the identity of their weights, as `intercept` takes them."""
    return {id(module.get_parameter(layer.weight)): layer for layer in layers}


def find_layers(model: Model, module: torch.nn.Module) -> tuple[Layer, ...]:
    """The layers that the example input passes through, in that order.

    Weights that anything else reads or owns too (an embedding tied to the output layer), that are used more than once,
    or that are computed from other parameters, are not among them.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: list[Layer] = []
    outputs: list[torch.Tensor] = []
    normed: set[int] = set()
    reads = _Reads(module)

    class Finder(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., torch.Tensor],
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> torch.Tensor:
            del types
            arguments = kwargs or {}
            result = func(*args, **arguments)
            reads.count((args, arguments), result)
            name = function_name(func)
            if name in _KINDS and (layer := _described(name, _operands(name, args, arguments), names)) is not None:
                found.append(layer)
                outputs.append(result)
            elif "batch_norm" in name:
                read = args[0] if args else arguments.get("input")
                normed.update(i for i, output in enumerate(outputs) if output is read)
            return result

    arguments = arguments_of(model.inputs, model.example_inputs)
    with torch.no_grad(), Finder():
        module(*arguments)
    marked = [replace(layer, feeds_norm=i in normed) for i, layer in enumerate(found)]
    return tuple(layer for layer in marked if reads.is_only(module.get_parameter(layer.weight)))


class _Reads:
    """How many owners and readers the memory of each parameter has, whatever tensors show it to them."""

    def __init__(self, module: torch.nn.Module) -> None:
        owned = [own for part in module.modules() for own in part._parameters.values() if own is not None]
        self._owners = Counter(parameter.data_ptr() for parameter in owned)
        self._readers: Counter[int] = Counter()
        ends = {own.data_ptr(): own.data_ptr() + own.numel() * own.element_size() for own in owned}
        self._starts = sorted(ends)
        self._ends = [ends[start] for start in self._starts]

    def count(self, operands: object, result: object) -> None:
        """A call that makes new tensors from a parameter. Views of it are not reads; what is done with them is."""
        import torch
        from torch.utils._pytree import tree_leaves

        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if made:
            read = {self._parameter(leaf) for leaf in tree_leaves(operands) if isinstance(leaf, torch.Tensor)}
            read -= {self._parameter(tensor) for tensor in made}
            self._readers.update(start for start in read if start is not None)

    def is_only(self, parameter: torch.Tensor) -> bool:
        """One module owns it and one call read it."""
        start = parameter.data_ptr()
        return self._owners[start] == 1 and self._readers[start] == 1

    def _parameter(self, tensor: torch.Tensor) -> int | None:
        """Where the parameter starts that the tensor is, or shows a part of."""
        import torch

        if tensor.layout != torch.strided:
            return None
        address = tensor.data_ptr()
        index = bisect_right(self._starts, address) - 1
        return self._starts[index] if index >= 0 and address < self._ends[index] else None


def give_biases(model: Model, module: torch.nn.Module) -> tuple[Layer, ...]:
    """`find_layers`, after each layer with an empty place for a bias was given one of zero, in place, where it counts.

    A layer that a batch norm follows has its bias there.
    """
    import torch

    before = find_layers(model, module)
    given = {
        layer.weight: add_bias(module, layer.weight, torch.zeros(layer.output_channels))
        for layer in before
        if layer.bias is None and not layer.feeds_norm and has_place_for_bias(module, layer.weight)
    }
    if not given:
        return before
    after = find_layers(model, module)
    arrived = {layer.weight for layer in after if layer.bias is not None}
    for weight, bias in given.items():
        if weight not in arrived:
            module.get_submodule(bias.rpartition(".")[0]).register_parameter("bias", None)
    return after


def arguments_of(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> tuple[torch.Tensor, ...]:
    """The positional arguments of a model's module for one sample's inputs."""
    import torch

    return tuple(torch.tensor(np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)) for spec in specs)


def function_name(func: Callable[..., object]) -> str:
    """Of a torch function or of an operator's overload, without the latter's name."""
    return getattr(func, "__name__", "").partition(".")[0]


def _operands(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Arguments by their names."""
    match _KINDS[name]:
        case "linear":
            order: tuple[str, ...] = ("input", "weight", "bias")
        case "convolution":
            order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        case "transposed convolution":
            order = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    return {**dict(zip(order, args, strict=False)), **kwargs}


def _described(name: str, operands: Mapping[str, object], names: Mapping[int, str]) -> Layer | None:
    """The layer behind a call, None where its weight is no parameter of the module."""
    import torch

    weight, bias = operands.get("weight"), operands.get("bias")
    if id(weight) not in names or not isinstance(weight, torch.Tensor) or weight.dtype != torch.float32:
        return None
    path, kind = names[id(weight)], _KINDS[name]
    spatial = weight.ndim - 2 if kind != "linear" else 0
    groups = operands.get("groups", 1)
    assert isinstance(groups, int)
    padding = operands.get("padding", 0)
    return Layer(
        path=strip_wrapper(path.rpartition(".")[0]),
        weight=path,
        bias=names.get(id(bias)) if bias is not None else None,
        kind=kind,
        shape=tuple(weight.shape),
        stride=_per_dimension(operands.get("stride", 1), spatial),
        padding="same" if padding == "same" else _per_dimension(0 if padding == "valid" else padding, spatial),
        dilation=_per_dimension(operands.get("dilation", 1), spatial),
        groups=groups,
    )


def _per_dimension(value: object, dimensions: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * dimensions if len(values) == 1 else values


def _as_call(
    func: Callable[..., torch.Tensor],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    layers: Mapping[int, Layer],
) -> Call | None:
    import torch

    name = function_name(func)
    if name not in _KINDS:
        return None
    operands = _operands(name, args, kwargs)
    layer = layers.get(id(operands.get("weight")))
    if layer is None:
        return None
    input_, weight, bias = (operands.pop(key, None) for key in ("input", "weight", "bias"))
    assert isinstance(input_, torch.Tensor)
    assert isinstance(weight, torch.Tensor)
    assert bias is None or isinstance(bias, torch.Tensor)
    return Call(layer, input_, weight, bias, func, operands)
