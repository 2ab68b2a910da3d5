"""Where in a network an operator runs, found out while the network's own Python runs.

A `SiteMode` sees every call of a torch function (and of an `aten` operator in a loaded graph) between entering and
leaving the network. Its place is the module that calls it, the how-manieth call of that module, the operator, and the
how-manieth such operator in that call; this is the same in training and in evaluation, at any batch size, and when
gradient checkpointing runs a layer a second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Spellings of one operator: the function's, the method's, Python's and (without underscores) their in-place forms.
_ALIASES = {
    "iadd": "add", "radd": "add", "isub": "sub", "rsub": "rsub", "imul": "mul", "rmul": "mul", "multiply": "mul",
    "truediv": "div", "itruediv": "div", "true_divide": "div", "divide": "div", "concat": "cat", "concatenate": "cat",
    "mm": "matmul", "bmm": "matmul", "clip": "clamp", "swapaxes": "transpose",
    "boolean_dispatch": "max_pool2d", "upsample_nearest2d": "interpolate", "alpha_dropout": "dropout",
    "feature_dropout": "dropout", "dropout2d": "dropout", "t": "transpose", "T": "transpose",
}  # fmt: skip

#: Operators that have a site; every other is computed in float between them.
TRACKED = frozenset(
    {
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "addmm",
        "matmul", "batch_norm", "relu", "relu6", "hardtanh", "clamp", "add", "sub", "mul", "div", "sigmoid",
        "hardsigmoid", "softmax", "leaky_relu", "gelu", "tanh", "avg_pool2d", "adaptive_avg_pool2d", "mean", "cat",
        "view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "max_pool2d", "chunk", "split",
        "getitem", "slice", "expand", "contiguous", "clone", "dropout", "interpolate", "pad", "constant_pad_nd",
        "pixel_shuffle", "unflatten", "hardswish", "silu", "scaled_dot_product_attention", "embedding", "layer_norm",
    }
)  # fmt: skip

Operator = Callable[..., Any]  # torch's functions have no common signature


@dataclass(frozen=True, slots=True)
class Site:
    """`layer` is a module's path, "" for the network itself; the counts start at 0."""

    layer: str
    call: int
    operator: str
    occurrence: int


def operator_name(function: Operator) -> str:
    """One name for all spellings: `x + y`, `torch.add`, `Tensor.add_` and `aten.add.Tensor` are all "add"."""
    name = getattr(function, "__name__", "").partition(".")[0].strip("_")
    return _ALIASES.get(name, name)


@dataclass(slots=True)
class _Frame:
    """One running call of a module."""

    layer: str
    call: int
    operators: Counter[str] = field(default_factory=Counter)

    def copy(self) -> _Frame:
        return _Frame(self.layer, self.call, self.operators.copy())


@dataclass(frozen=True, slots=True)
class Place:
    """A point in a run of the network: the modules that are running, and how often each has run."""

    frames: tuple[_Frame, ...]
    calls: Counter[str]


class Scopes:
    """Follows by hooks which of a network's modules is running."""

    def __init__(self, network: nn.Module) -> None:
        self._frames: list[_Frame] = []
        self._calls: Counter[str] = Counter()
        for path, module in network.named_modules():
            module.register_forward_pre_hook(self._entering(path))
            # Gradient checkpointing stops a second run with an exception, as soon as it has what it needs.
            module.register_forward_hook(self._left, always_call=True)

    def restart(self) -> None:
        """The network begins anew, or has ended."""
        self._frames.clear()
        self._calls.clear()

    def place(self) -> Place:
        """Where the network is, to come back to."""
        return Place(tuple(map(_Frame.copy, self._frames)), self._calls.copy())

    @contextmanager
    def back_at(self, place: Place) -> Iterator[None]:
        """Inside the block the network is at that place once more, and afterwards where it was."""
        frames, calls = self._frames, self._calls
        self._frames, self._calls = list(map(_Frame.copy, place.frames)), place.calls.copy()
        try:
            yield
        finally:
            self._frames, self._calls = frames, calls

    def next_site(self, operator: str) -> Site | None:
        """The site of the operator that runs now; None outside the network."""
        if not self._frames:
            return None
        frame = self._frames[-1]
        frame.operators[operator] += 1
        return Site(frame.layer, frame.call, operator, frame.operators[operator] - 1)

    def is_inside(self) -> bool:
        return bool(self._frames)

    def _entering(self, path: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def enter(_: nn.Module, __: tuple[object, ...]) -> None:
            self._frames.append(_Frame(path, self._calls[path]))
            self._calls[path] += 1

        return enter

    def _left(self, *_: object) -> None:
        self._frames.pop()


class SiteMode(TorchFunctionMode):
    """Calls `at_site` instead of every tracked operator of the network, `elsewhere` instead of every other.

    Args:
        scopes: of the network.
        composites: operators that are seen as the several ones that a file has for them.
    """

    def __init__(self, scopes: Scopes, composites: frozenset[str]) -> None:
        super().__init__()
        self.scopes = scopes
        self._composites = composites

    def at_site(self, site: Site, function: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        raise NotImplementedError

    def elsewhere(self, function: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        return function(*args, **kwargs)

    def __torch_function__(
        self,
        func: Operator,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        del types
        kwargs = kwargs or {}
        name = operator_name(func)
        if not self.scopes.is_inside():
            return func(*args, **kwargs)
        if name == "multi_head_attention_forward":
            with self:
                return _without_dispatch(func)(*args, **kwargs)
        if name in self._composites:
            return _COMPOSITES[name](self._call, *args, **kwargs)
        return self._call(func, *args, **kwargs)

    def _call(self, function: Operator, *args: Any, **kwargs: Any) -> Any:
        name = operator_name(function)
        site = self.scopes.next_site(name) if name in TRACKED else None
        return self.elsewhere(function, args, kwargs) if site is None else self.at_site(site, function, args, kwargs)


def _without_dispatch(function: Operator) -> Operator:
    """The same Python function, which does not hand itself over to the mode again but runs its body.

    Modes see `multi_head_attention_forward` as one call; its two linear layers are what a file quantizes.
    """
    assert isinstance(function, FunctionType)

    def never(*_: object) -> bool:
        return False

    names = {**function.__globals__, "has_torch_function": never}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


def _hardswish(call: Operator, values: Tensor, inplace: bool = False) -> object:
    del inplace
    return call(torch.mul, values, call(nn.functional.hardsigmoid, values))


def _silu(call: Operator, values: Tensor, inplace: bool = False) -> object:
    del inplace
    return call(torch.mul, values, call(torch.sigmoid, values))


def _attention(
    call: Operator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> object:
    """softmax(q k^T * scale + mask) v, with the root of the scale in both factors as PyTorch's decomposition has it."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key = call(torch.repeat_interleave, key, groups, dim=-3)
        value = call(torch.repeat_interleave, value, groups, dim=-3)
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    keys = call(torch.mul, call(torch.transpose, key, -2, -1), root)
    scores = call(torch.matmul, call(torch.mul, query, root), keys)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    # No int8 grid holds minus infinity: masks are applied in float, and so is the softmax behind them.
    shares = call(torch.softmax, scores, -1) if attn_mask is None else call(_masked_softmax, scores, attn_mask)
    shares = call(nn.functional.dropout, shares, dropout_p, True) if dropout_p else shares
    return call(torch.matmul, shares, value)


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    masked = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(masked, -1)


_COMPOSITES: dict[str, Operator] = {
    "hardswish": _hardswish,
    "silu": _silu,
    "scaled_dot_product_attention": _attention,
}
