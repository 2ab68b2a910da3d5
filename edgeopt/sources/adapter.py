"""Making any module callable as `module(*tensors)` with plain tensors back, and the names of what comes back."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError
from edgeopt.types import WRAPPED_ATTRIBUTE

if TYPE_CHECKING:
    import torch


def forward_parameters(module: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Names of forward's parameters that can be given by keyword, and those among them that must be given."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named], [p.name for p in named if p.default is p.empty]


def call_keywords(module: torch.nn.Module, names: Sequence[str]) -> tuple[str, ...] | None:
    """How to hand inputs of these names over: keywords, or None where their order alone is right.

    Inputs go by keyword when all are names of forward's parameters but are not just its first ones in order.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    allowed, required = forward_parameters(module)
    if list(names) == positional[: len(names)]:
        return None
    if set(names) <= set(allowed):
        forgotten = [name for name in required if name not in names]
        if forgotten:
            raise UsageError(
                f"forward also needs {forgotten[0]!r}",
                where=type(module).__name__,
                fix=f"declare it: --input {forgotten[0]}=DTYPE[...], or return it in the factory's example_inputs",
            )
        return tuple(names)
    return None


def takes_any_number(module: torch.nn.Module) -> bool:
    """Whether forward has `*args`, where tracers need one named parameter per input."""
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())


def invoke(module: torch.nn.Module, keywords: tuple[str, ...] | None, *tensors: torch.Tensor) -> object:
    """Call the module with the tensors by position, or by these keywords."""
    if keywords is None:
        return module(*tensors)
    return module(**dict(zip(keywords, tensors, strict=True)))


def is_plain(value: object) -> bool:
    """Whether a result is a tensor or a (nested) list or tuple of tensors, as `Model.module` promises."""
    import torch

    if isinstance(value, torch.Tensor):
        return True
    return type(value) in (list, tuple) and isinstance(value, Sequence) and all(is_plain(item) for item in value)


def flatten(value: object, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """The tensors of a result in order, each with a name made of the keys or positions that lead to it.

    Mappings, data classes (Hugging Face's ModelOutput too) and named tuples give their keys; None is left out.
    Raises UsageError for anything else that is not a tensor.
    """
    import torch

    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return [(name or "output", value)]
    items = _items(value)
    if items is None:
        raise UsageError(
            f"returns a {type(value).__name__}, which no runtime can",
            where=f"output {name!r}" if name else "the model",
            fix="return tensors: alone, or in a tuple, list or dict",
        )
    if name == "" and len(items) == 1 and items[0][0].isdecimal():
        return flatten(items[0][1])
    return [
        leaf
        for key, item in items
        for leaf in flatten(item, f"{name}_{key}" if name else (f"output_{key}" if key.isdecimal() else key))
    ]


def _items(value: object) -> list[tuple[str, object]] | None:
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple | list):
        fields = getattr(value, "_fields", None)
        keys = fields if isinstance(fields, tuple) else range(len(value))
        return [(str(key), item) for key, item in zip(keys, value, strict=True)]
    return None


def adapt(module: torch.nn.Module, names: Sequence[str], keywords: tuple[str, ...] | None) -> torch.nn.Module:
    """A module that takes one tensor per name, calls `module` with them, and returns a tensor or a tuple of tensors.

    The user's module is its attribute WRAPPED_ATTRIBUTE. Tracers read parameter names off forward, so each adapter
    has its own forward with a signature of `names`.
    """
    import torch

    class Adapter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(WRAPPED_ATTRIBUTE, module)

        def call(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
            result = invoke(self.get_submodule(WRAPPED_ATTRIBUTE), keywords, *tensors)
            leaves = tuple(tensor for _, tensor in flatten(result))
            return leaves[0] if len(leaves) == 1 else leaves

    def forward(self: Adapter, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.call(tensors)

    sign(forward, names)
    named = type("Adapter", (Adapter,), {"forward": forward})
    adapter: torch.nn.Module = named()
    return adapter.eval()


def sign(function: Callable[..., object], names: Sequence[str]) -> None:
    """Let a forward with `*tensors` say that it takes one parameter per name, which tracers read."""
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for name in names:
        parameter = re.sub(r"\W", "_", name)
        parameters.append(inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD))
    # inspect.signature reads this attribute; mypy's function type lacks it.
    function.__dict__["__signature__"] = inspect.Signature(parameters)
