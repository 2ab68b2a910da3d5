"""ONNX operators on tensors, one element or one axis at a time."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from edgeopt.sources.onnx_values import TORCH_TYPES, Args, Node, Operator, Value, argument, operand, sizes, tensor


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Operator:
    def apply(node: Node, args: Args) -> Value:
        return function(tensor(args[0], node))

    return apply


def _binary(function: Callable[..., torch.Tensor]) -> Operator:
    """For Python's operators: with a number on the left they call what exporters know (torch.mul(2, x) they don't)."""

    def apply(node: Node, args: Args) -> Value:
        left, right = operand(args[0], args[1], node), operand(args[1], args[0], node)
        return function(left, right)

    return apply


def _variadic(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Operator:
    def apply(node: Node, args: Args) -> Value:
        result = tensor(args[0], node)
        for other in args[1:]:
            result = function(result, tensor(other, node))
        return result

    return apply


def _divide(left: torch.Tensor | float, right: torch.Tensor | float) -> torch.Tensor:
    of_integers = not any(
        value.is_floating_point() if isinstance(value, torch.Tensor) else isinstance(value, float)
        for value in (left, right)
    )
    if not of_integers:
        quotient: torch.Tensor = operator.truediv(left, right)
        return quotient
    numerator = left if isinstance(left, torch.Tensor) else torch.full_like(torch.as_tensor(right), left)
    return torch.div(numerator, right, rounding_mode="trunc")


def _modulo(node: Node, args: Args) -> Value:
    function = torch.fmod if node.integer("fmod", 0) else torch.remainder
    result: torch.Tensor = function(tensor(args[0], node), tensor(args[1], node))
    return result


def _mean(node: Node, args: Args) -> Value:
    total = tensor(args[0], node)
    for other in args[1:]:
        total = total + tensor(other, node)
    return total / len(args)


def _clip(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    low = _bound(node, args, 1, "min")
    high = _bound(node, args, 2, "max")
    if low == 0 and high == 6:
        # The pattern that quantizers fuse into the operator before it.
        return functional.relu6(data)
    if low == 0 and high is None:
        return functional.relu(data)
    return data if low is None and high is None else torch.clamp(data, low, high)


def _bound(node: Node, args: Args, position: int, key: str) -> float | None:
    if position < len(args) and args[position] is not None:
        value = args[position]
        if isinstance(value, torch.Tensor):
            raise node.error(f"its {key} depends on the input's values")
        return None if value is None else value.reshape(-1)[0].item()
    return node.number(key, 0.0) if key in node.attributes else None


def _gelu(node: Node, args: Args) -> Value:
    return functional.gelu(tensor(args[0], node), approximate=node.text("approximate", "none"))


def _hard_sigmoid(node: Node, args: Args) -> Value:
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    data = tensor(args[0], node)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return functional.hardsigmoid(data)
    return torch.clamp(data * alpha + beta, 0, 1)


def _prelu(node: Node, args: Args) -> Value:
    data, slope = tensor(args[0], node), tensor(args[1], node)
    return torch.where(data >= 0, data, data * slope)


def _softmax(function: Callable[[torch.Tensor, int], torch.Tensor]) -> Operator:
    def apply(node: Node, args: Args) -> Value:
        data = tensor(args[0], node)
        if node.opset >= 13:
            return function(data, node.integer("axis", -1))
        axis = node.integer("axis", 1) % max(data.ndim, 1)
        if axis == data.ndim - 1:
            return function(data, axis)
        # Before opset 13 it ran over all the axes from `axis` on, taken as one.
        return function(data.flatten(axis), axis).reshape(data.shape)

    return apply


def _cast(node: Node, args: Args) -> Value:
    dtype = TORCH_TYPES.get(node.integer("to", 0))
    if dtype is None:
        raise node.error(f"unknown element type {node.integer('to', 0)}")
    return tensor(args[0], node).to(dtype)


def _cast_like(node: Node, args: Args) -> Value:
    return tensor(args[0], node).to(tensor(args[1], node).dtype)


def _where(node: Node, args: Args) -> Value:
    return torch.where(tensor(args[0], node).bool(), tensor(args[1], node), tensor(args[2], node))


def _reduce(function: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> Operator:
    def apply(node: Node, args: Args) -> Value:
        data = tensor(args[0], node)
        axes = argument(node, args, 1, "axes", "axes")
        if not axes:
            if node.integer("noop_with_empty_axes", 0):
                return data
            axes = list(range(data.ndim))
        return function(data, axes, bool(node.integer("keepdims", 1)))

    return apply


def _product(data: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((axis % data.ndim for axis in axes), reverse=True):
        data = data.prod(axis, keepdim=keep)
    return data


def _arg(function: Callable[..., torch.Tensor]) -> Operator:
    def apply(node: Node, args: Args) -> Value:
        if node.integer("select_last_index", 0):
            raise node.error("select_last_index is not supported")
        keep = bool(node.integer("keepdims", 1))
        return function(tensor(args[0], node), dim=node.integer("axis", 0), keepdim=keep)

    return apply


def _cumulative_sum(node: Node, args: Args) -> Value:
    if node.integer("exclusive", 0) or node.integer("reverse", 0):
        raise node.error("exclusive and reverse sums are not supported")
    return torch.cumsum(tensor(args[0], node), sizes(args[1], node, "axis")[0])


def _top_k(node: Node, args: Args) -> tuple[Value, ...]:
    count = argument(node, args, 1, "k", "count") or [node.integer("k", 1)]
    values, indices = torch.topk(
        tensor(args[0], node), count[0], node.integer("axis", -1), bool(node.integer("largest", 1)), sorted=True
    )
    return values, indices


def _matmul(node: Node, args: Args) -> Value:
    return torch.matmul(tensor(args[0], node), tensor(args[1], node))


def _gemm(node: Node, args: Args) -> Value:
    left, right = tensor(args[0], node), tensor(args[1], node)
    left = left.T if node.integer("transA", 0) else left
    right = right.T if node.integer("transB", 0) else right
    result = left @ right * node.number("alpha", 1.0)
    if len(args) > 2 and args[2] is not None:
        result = result + tensor(args[2], node) * node.number("beta", 1.0)
    return result


def _einsum(node: Node, args: Args) -> Value:
    return torch.einsum(node.text("equation", ""), *(tensor(arg, node) for arg in args))


def _leaky_relu(node: Node, args: Args) -> Value:
    return functional.leaky_relu(tensor(args[0], node), node.number("alpha", 0.01))


def _elu(node: Node, args: Args) -> Value:
    return functional.elu(tensor(args[0], node), node.number("alpha", 1.0))


def _celu(node: Node, args: Args) -> Value:
    return functional.celu(tensor(args[0], node), node.number("alpha", 1.0))


def _first(node: Node, args: Args) -> Value:
    """Dropout in inference, and Identity."""
    return tensor(args[0], node)


def _trilu(node: Node, args: Args) -> Value:
    diagonal = sizes(args[1], node, "diagonal")[0] if len(args) > 1 and args[1] is not None else 0
    function = torch.triu if node.integer("upper", 1) else torch.tril
    return function(tensor(args[0], node), diagonal)


def _l2(data: torch.Tensor, axes: Sequence[int], keep: bool) -> torch.Tensor:
    return data.square().sum(list(axes), keepdim=keep).sqrt()


MATH_OPERATORS: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(operator.add),
    "And": _variadic(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Atan": _unary(torch.atan),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _unary(torch.ceil),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": _unary(torch.cos),
    "CumSum": _cumulative_sum,
    "Div": _binary(_divide),
    "Dropout": _first,
    "Einsum": _einsum,
    "Elu": _elu,
    "Equal": _variadic(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _variadic(torch.gt),
    "GreaterOrEqual": _variadic(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(functional.hardswish),
    "Identity": _first,
    "IsNaN": _unary(torch.isnan),
    "LeakyRelu": _leaky_relu,
    "Less": _variadic(torch.lt),
    "LessOrEqual": _variadic(torch.le),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax(functional.log_softmax),
    "MatMul": _matmul,
    "Max": _variadic(torch.maximum),
    "Mean": _mean,
    "Min": _variadic(torch.minimum),
    "Mish": _unary(functional.mish),
    "Mod": _modulo,
    "Mul": _binary(operator.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _variadic(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _binary(operator.pow),
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL1": _reduce(lambda data, axes, keep: data.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduce(_l2),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(lambda data, axes, keep: data.square().sum(axes, keepdim=keep)),
    "Relu": _unary(functional.relu),
    "Round": _unary(torch.round),
    "Selu": _unary(functional.selu),
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Softmax": _softmax(functional.softmax),
    "Softplus": _unary(functional.softplus),
    "Softsign": _unary(functional.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(operator.sub),
    "Sum": _variadic(torch.add),
    "Swish": _unary(functional.silu),
    "Tan": _unary(torch.tan),
    "Tanh": _unary(torch.tanh),
    "TopK": _top_k,
    "Trilu": _trilu,
    "Where": _where,
    "Xor": _variadic(torch.logical_xor),
}
