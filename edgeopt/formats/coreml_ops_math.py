"""MIL operators that work on one element or along one axis.

Definitions: apple.github.io/coremltools, "MIL Ops"; names of the parameters are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from edgeopt.formats.coreml_values import INTEGER_BOUNDS, TORCH_TYPES, Arguments, Operator


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Operator:
    return lambda a: function(a.tensor())


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Operator:
    return lambda a: function(a.tensor("x"), a.tensor("y"))


def _axes(a: Arguments) -> list[int]:
    return a.ints("axes", range(a.tensor().ndim))


def _reduce(function: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> Operator:
    return lambda a: function(a.tensor(), _axes(a), a.flag("keep_dims", default=False))


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _arg(function: Callable[..., torch.Tensor]) -> Operator:
    def apply(a: Arguments) -> torch.Tensor:
        index = function(a.tensor(), dim=a.integer("axis", -1), keepdim=a.flag("keep_dims", default=False))
        return index.to(a.output_type())

    return apply


def _floor_divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.div(x, y, rounding_mode="floor")


def _real_divide(a: Arguments) -> torch.Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    if x.is_floating_point() or y.is_floating_point():
        return x / y
    return torch.div(x, y, rounding_mode="trunc")


def _per_channel(a: Arguments, name: str) -> torch.Tensor:
    """A value per channel so that it broadcasts along the second dimension."""
    return a.tensor(name).reshape(-1, *[1] * (a.tensor().ndim - 2))


def _gelu(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    match a.text("mode", "EXACT"):
        case "TANH_APPROXIMATION":
            return functional.gelu(x, approximate="tanh")
        case "SIGMOID_APPROXIMATION":
            return x * torch.sigmoid(1.702 * x)
        case _:
            return functional.gelu(x)


def _prelu(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    return torch.where(x > 0, x, x * _per_channel(a, "alpha"))


def _softplus_parametric(a: Arguments) -> torch.Tensor:
    return _per_channel(a, "alpha") * functional.softplus(_per_channel(a, "beta") * a.tensor())


def _clamped_relu(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    return torch.where(x > 0, x, a.number("alpha") * x).clamp(max=a.number("beta"))


def _thresholded_relu(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    return torch.where(x >= a.number("alpha"), x, torch.zeros_like(x))


def _clip(a: Arguments) -> torch.Tensor:
    return a.tensor().clamp(a.number("alpha", -math.inf), a.number("beta", math.inf))


def _cast(a: Arguments) -> torch.Tensor:
    x, kind = a.tensor(), a.text("dtype")
    if kind == "bool":
        return x != 0
    target = TORCH_TYPES[kind]
    if not x.is_floating_point() or target.is_floating_point:
        return x.to(target)
    low, high = INTEGER_BOUNDS[kind]
    # float32 can't hold the highest int32.
    return x.to(torch.float64).trunc().nan_to_num().clamp(low, high).to(target)


def _cumsum(a: Arguments) -> torch.Tensor:
    x, axis = a.tensor(), a.integer("axis", 0)
    reverse = a.flag("reverse", default=False)
    if reverse:
        x = x.flip(axis)
    total = x.cumsum(axis)
    if a.flag("exclusive", default=False):
        total = total - x
    return (total.flip(axis) if reverse else total).to(x.dtype)


def _top_k(a: Arguments) -> tuple[torch.Tensor, ...]:
    x, k, axis = a.tensor(), a.integer("k", 1), a.integer("axis", -1)
    order = x.argsort(dim=axis, descending=not a.flag("ascending", default=False), stable=True)
    indices = order.narrow(axis, 0, x.shape[axis] if k == -1 else k)
    values = x.gather(axis, indices)
    return (values, indices.to(torch.int32)) if a.flag("return_indices", default=True) else (values,)


def _argsort(a: Arguments) -> torch.Tensor:
    descending = not a.flag("ascending", default=False)
    return a.tensor().argsort(dim=a.integer("axis", -1), descending=descending, stable=True).to(torch.int32)


def _band_part(a: Arguments) -> torch.Tensor:
    x, lower, upper = a.tensor(), a.integer("lower", -1), a.integer("upper", -1)
    x = x if lower < 0 else x.triu(-lower)
    return x if upper < 0 else x.tril(upper)


MATH: dict[str, Operator] = {
    "abs": _unary(torch.abs),
    "acos": _unary(torch.acos),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "atanh": _unary(torch.atanh),
    "ceil": _unary(torch.ceil),
    "cos": _unary(torch.cos),
    "cosh": _unary(torch.cosh),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "identity": _unary(torch.clone),
    "inverse": lambda a: (a.tensor() + a.number("epsilon", 1e-4)).reciprocal(),
    "log": lambda a: (a.tensor() + a.number("epsilon", 1e-45)).log(),
    "round": _unary(torch.round),
    "rsqrt": lambda a: (a.tensor() + a.number("epsilon", 1e-12)).rsqrt(),
    "sign": _unary(torch.sign),
    "sin": _unary(torch.sin),
    "sinh": _unary(torch.sinh),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tan": _unary(torch.tan),
    "tanh": _unary(torch.tanh),
    "threshold": lambda a: a.tensor().clamp(min=a.number("alpha")),
    "logical_not": _unary(torch.logical_not),
    "cast": _cast,
    "clip": _clip,
    # Activations.
    "clamped_relu": _clamped_relu,
    "elu": lambda a: functional.elu(a.tensor(), a.number("alpha")),
    "gelu": _gelu,
    "leaky_relu": lambda a: functional.leaky_relu(a.tensor(), a.number("alpha")),
    "linear_activation": lambda a: a.number("alpha") * a.tensor() + a.number("beta"),
    "prelu": _prelu,
    "relu": _unary(torch.relu),
    "relu6": lambda a: a.tensor().clamp(0, 6),
    "scaled_tanh": lambda a: a.number("alpha") * torch.tanh(a.number("beta") * a.tensor()),
    "sigmoid": _unary(torch.sigmoid),
    "sigmoid_hard": lambda a: (a.number("alpha") * a.tensor() + a.number("beta")).clamp(0, 1),
    "silu": _unary(functional.silu),
    "softmax": lambda a: torch.softmax(a.tensor(), a.integer("axis", -1)),
    "softplus": _unary(functional.softplus),
    "softplus_parametric": _softplus_parametric,
    "softsign": _unary(functional.softsign),
    "thresholded_relu": _thresholded_relu,
    # Two operands.
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _real_divide,
    "floor_div": _binary(_floor_divide),
    "mod": _binary(torch.remainder),
    "pow": _binary(torch.pow),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "equal": _binary(torch.eq),
    "not_equal": _binary(torch.ne),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    # Along axes.
    "argsort": _argsort,
    "band_part": _band_part,
    "cumsum": _cumsum,
    "topk": _top_k,
    "reduce_argmax": _arg(torch.argmax),
    "reduce_argmin": _arg(torch.argmin),
    "reduce_l1_norm": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_log_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "reduce_log_sum_exp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "reduce_max": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_mean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "reduce_min": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_prod": _reduce(_product),
    "reduce_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype)),
    "reduce_sum_square": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
}
