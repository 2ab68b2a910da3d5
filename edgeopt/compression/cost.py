"""What a network costs to run and to keep, counted in torch and estimated for a network that is yet to be cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.layers import Kind, arguments_of
from edgeopt.compression.pruning.groups import Plan, Prunable
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Array, Dim, Model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One operator with weights, as the example input meets it. Equal shapes cost the same on any device.

    Attributes:
        type: what it computes, whatever class of module holds the weight.
        in_channels, out_channels: features of a linear layer.
        kernel, stride, padding, dilation: one entry per spatial dimension; empty for linear layers.
        groups: of a convolution.
        input_size: spatial size of the input; for linear layers (rows,), the vectors that one inference multiplies.
        has_bias: whether the operator adds one.
        macs: multiply-accumulates of one inference, over all calls.
        calls: how often one inference uses the layer; `input_size` is that of the first call.
    """

    type: Kind
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    input_size: tuple[int, ...]
    has_bias: bool
    macs: int
    calls: int = 1


def macs_of(model: Model) -> int:
    """Multiply-accumulates of the matrix products, convolutions, attention and recurrences of one inference.

    The batch is 1 where the signature leaves it free, and what it fixes elsewhere. Elementwise work isn't counted.
    """
    return macs_by_module(model)[""]


def macs_by_module(model: Model) -> dict[str, int]:
    """`macs_of` for every module that runs, by its path in `Model.module`: of itself and all within it. "" is all."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    # What torch counts nowhere, by the shapes of the operands; one multiply-accumulate is two operations.
    more: dict[object, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
            2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
        ),
        # One layer and direction: input (steps, batch, features), weights of the input and of the hidden state.
        aten.mkldnn_rnn_layer: lambda x, of_input, of_state, *_, **__: (
            2 * x[0] * x[1] * (prod(of_input) + prod(of_state))
        ),
        aten.mv: lambda matrix, *_, **__: 2 * prod(matrix),
        aten.addmv: lambda _, matrix, *__, **___: 2 * prod(matrix),
        aten.dot: lambda vector, *_, **__: 2 * prod(vector),
        # Bilinear layers: (batch, in1), (out, in1, in2), (batch, in2). The second product is small.
        aten._trilinear: lambda x, weight, *_, **__: 2 * x[0] * prod(weight),
    }
    counter = FlopCounterMode(display=False, custom_mapping=more)
    module = _module(model)
    with torch.no_grad(), no_fused_layers(), counter:
        module(*arguments_of(model.inputs, single_example(model)))
    # torch calls the root by its class.
    root = f"{type(module).__name__}."
    counts = {name: int(sum(operations.values())) // 2 for name, operations in counter.get_flop_counts().items()}
    inner = {name.removeprefix(root): count for name, count in counts.items() if name.startswith(root)}
    return {"": int(counter.get_total_flops()) // 2, **inner}


def parameters_of(model: Model) -> int:
    """Numbers that training learned; those that several layers share count once."""
    return sum(parameter.numel() for parameter in _module(model).parameters())


def single_example(model: Model) -> dict[str, Array]:
    """The example input cut to one sample, where all inputs share a free first dimension that may be 1."""
    arrays = dict(model.example_inputs)
    first = {spec.shape[0] if spec.shape else None for spec in model.inputs}
    batch = next(iter(first)) if len(first) == 1 else None
    if not isinstance(batch, Dim) or batch.min > 1:
        return arrays
    return {name: array[:1] for name, array in arrays.items()}


def layer_shapes(model: Model) -> dict[str, LayerShape]:
    """Path (in the user's own module) of every module that owns one weight of a convolution or linear operator -> what
    it computes, in the order of execution.

    It is seen at the operators that read the weights, so stock layers, layers with a `forward` of their own and
    functional calls are alike. Modules with several such weights (recurrent ones, say) are left out; their work is
    in `macs_of` only.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    module = _module(model)
    owners = _owners(module)
    found: dict[str, LayerShape] = {}

    def dispatch(
        _: object, func: Callable[..., object], __: object, args: Sequence[object], kwargs: Mapping[str, object] | None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        described = _described(str(func).rpartition(".")[0], args, result, owners)
        if described is not None:
            path, shape = described
            before = found.get(path)
            found[path] = (
                shape if before is None else replace(before, macs=before.macs + shape.macs, calls=before.calls + 1)
            )
        return result

    # Made at run time: torch's base class has no types to inherit from.
    watch = type("Watch", (TorchDispatchMode,), {"__torch_dispatch__": dispatch})
    with torch.no_grad(), no_fused_layers(), watch():
        module(*arguments_of(model.inputs, single_example(model)))
    return found


def estimate_macs(shapes: Mapping[str, LayerShape], prunable: Prunable, plan: Plan) -> int:
    """Multiply-accumulates of these layers once the plan's units are gone, without making that network.

    For whole networks, attention and recurrent layers included, see `pruning.planned_cost`.
    """
    return sum(shape.macs for shape in planned_shapes(shapes, prunable, plan).values())


def estimate_parameters(shapes: Mapping[str, LayerShape], prunable: Prunable, plan: Plan) -> int:
    """Weights and biases of these layers once the plan's units are gone; see `estimate_macs`."""
    return sum(_weights(shape) for shape in planned_shapes(shapes, prunable, plan).values())


def planned_shapes(shapes: Mapping[str, LayerShape], prunable: Prunable, plan: Plan) -> dict[str, LayerShape]:
    """The layers' shapes once the plan's units are gone; layers of removed blocks are missing."""
    blocks = [strip_wrapper(group.name) for group in prunable.groups if group.kind == "blocks" and plan.get(group.name)]
    lost: dict[str, dict[str, list[Array]]] = defaultdict(lambda: {"in": [], "out": []})
    for group in prunable.groups:
        units = list(plan.get(group.name, ()))
        for part in group.slices if units else ():
            if not part.parameter:
                lost[strip_wrapper(part.layer)][part.side].append(part.indices[units].ravel())
    return {
        path: _narrowed(shape, _distinct(lost[path]["in"]), _distinct(lost[path]["out"])) if path in lost else shape
        for path, shape in shapes.items()
        if not any(is_inside(path, block) for block in blocks)
    }


def is_inside(layer: str, block: str) -> bool:
    """Whether a layer belongs to the module at this path."""
    return layer == block or layer.startswith(f"{block}.")


@contextmanager
def no_fused_layers() -> Iterator[None]:
    """torch's fused transformer layers hide their products."""
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _distinct(parts: Sequence[Array]) -> Array:
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def _narrowed(shape: LayerShape, lost_inputs: Array, lost_outputs: Array) -> LayerShape:
    """The shape without these input and output channels. A grouped convolution loses whole groups, inputs and all."""
    # The first call of a packed weight (of attention to another sequence) may make the first of its outputs alone.
    lost_outputs = lost_outputs[lost_outputs < shape.out_channels]
    per_group = shape.in_channels // shape.groups
    before = per_group * shape.out_channels
    out_channels = shape.out_channels - len(lost_outputs)
    groups = shape.groups
    if groups > 1:
        groups = out_channels * groups // shape.out_channels
    else:
        per_group -= len(lost_inputs)
    return replace(
        shape,
        in_channels=per_group * groups,
        out_channels=out_channels,
        groups=groups,
        macs=shape.macs // before * per_group * out_channels,
    )


def _weights(shape: LayerShape) -> int:
    per_output = prod(shape.kernel) * (shape.in_channels // max(shape.groups, 1))
    return shape.out_channels * (per_output + shape.has_bias)


@dataclass(frozen=True, slots=True)
class _Owner:
    path: str
    has_bias: bool


def _owners(module: torch.nn.Module) -> dict[int, _Owner]:
    """Memory of a weight -> the module that owns it, for modules with one weight of two or more dimensions."""
    import torch

    owners: dict[int, _Owner] = {}
    for path, part in module.named_modules():
        own = [parameter for parameter in part._parameters.values() if parameter is not None]
        weights = [parameter for parameter in own if parameter.dim() > 1]
        # An embedding's table may be tied to the output layer, which is the one that multiplies.
        if len(weights) == 1 and not isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag):
            owner = _Owner(strip_wrapper(path), has_bias=len(own) > len(weights))
            owners.setdefault(weights[0].untyped_storage().data_ptr(), owner)
    return owners


#: Matrix products -> position of the left factor.
_PRODUCTS = {"aten.mm": 0, "aten.bmm": 0, "aten.addmm": 1, "aten.baddbmm": 1}


def _described(
    operator: str, args: Sequence[object], result: object, owners: Mapping[int, _Owner]
) -> tuple[str, LayerShape] | None:
    """The layer whose weight an operator below autograd reads, and what this call of it computes."""
    import torch

    if operator != "aten.convolution" and operator not in _PRODUCTS:
        return None
    first = _PRODUCTS.get(operator, 0)
    for position, other in ((first + 1, first), (first, first + 1)):
        weight, value = args[position], args[other]
        assert isinstance(weight, torch.Tensor)
        assert isinstance(value, torch.Tensor)
        owner = owners.get(weight.untyped_storage().data_ptr())
        if owner is None:
            continue
        if operator == "aten.convolution":
            assert isinstance(result, torch.Tensor)
            return owner.path, _convolution(value, weight, result, args[3:], owner.has_bias)
        inputs, outputs = weight.shape[-2:] if position > other else weight.shape[-2:][::-1]
        return owner.path, _linear(inputs, outputs, value.numel() // inputs, owner.has_bias)
    return None


def _linear(inputs: int, outputs: int, rows: int, has_bias: bool) -> LayerShape:
    return LayerShape(
        type="linear",
        in_channels=inputs,
        out_channels=outputs,
        kernel=(),
        stride=(),
        padding=(),
        dilation=(),
        groups=1,
        input_size=(rows,),
        has_bias=has_bias,
        macs=rows * inputs * outputs,
    )


def _convolution(
    value: torch.Tensor, weight: torch.Tensor, result: torch.Tensor, rest: Sequence[object], has_bias: bool
) -> LayerShape:
    """`rest`: stride, padding, dilation, whether it is transposed, output padding, groups."""
    stride, padding, dilation, transposed, _, groups = rest
    assert isinstance(groups, int)
    in_channels, out_channels, kernel = value.shape[1], result.shape[1], tuple(weight.shape[2:])
    # Every value of the one is multiplied with every weight of its channel.
    moved, fan = (value, out_channels // groups) if transposed else (result, in_channels // groups)
    return LayerShape(
        type="transposed convolution" if transposed else "convolution",
        in_channels=in_channels,
        out_channels=out_channels,
        kernel=kernel,
        stride=_per_dimension(stride, kernel),
        padding=_per_dimension(padding, kernel),
        dilation=_per_dimension(dilation, kernel),
        groups=groups,
        input_size=tuple(value.shape[2:]),
        has_bias=has_bias,
        macs=moved.numel() * fan * prod(kernel),
    )


def _per_dimension(value: object, kernel: tuple[int, ...]) -> tuple[int, ...]:
    assert isinstance(value, Sequence)
    return tuple(value) * (len(kernel) if len(value) == 1 else 1)


def _module(model: Model) -> torch.nn.Module:
    if model.module is None:
        raise ValueError("costs are counted on a torch module; see sources.as_torch")
    return model.module
