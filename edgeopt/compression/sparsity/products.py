"""The parameters of a module that its input is multiplied by, found by watching it run.

Calls are watched at the level of torch functions, so it makes no difference whether a stock layer, a layer with a
`forward` of its own, a functional call or an exported graph makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.compression.layers import arguments_of, function_name
from edgeopt.layer_names import strip_wrapper

if TYPE_CHECKING:
    import torch

    from edgeopt.types import Model

#: Torch functions whose weight is their second argument.
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution", "_convolution"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
#: Their weights have shape (outputs, inputs) and stand somewhere from this argument on; before it are inputs, which
#: may be parameters too (learned queries, say).
_ROWS_ARE_OUTPUTS = {
    **dict.fromkeys(("gru", "lstm", "rnn_tanh", "rnn_relu"), 2),
    **dict.fromkeys(("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"), 2),
    "multi_head_attention_forward": 3,
}
#: Where their two factors stand.
_MATRIX_PRODUCTS = {
    "mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "__matmul__": (0, 1), "__rmatmul__": (1, 0),
    "addmm": (1, 2), "baddbmm": (1, 2),
}  # fmt: skip
_LOOKUPS = frozenset({"embedding", "embedding_bag"})


@dataclass(frozen=True, slots=True)
class Product:
    """A weight.

    Attributes:
        name: of the parameter in the model's module.
        layer: path of the module that owns it, in the user's own module.
        input_axis: dimension that is summed over; None where it is not known or not one of the parameter's own.
    """

    name: str
    layer: str
    input_axis: int | None


def products_of(model: Model) -> tuple[Product, ...]:
    """Parameters with two or more dimensions that the example input is multiplied by, in execution order, each once.

    Left out are those that an embedding looks up rows in, too, and convolutions with one input channel per group.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    if model.module is None:
        raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
    parameters = _Parameters(model.module)
    found: dict[str, Product] = {}
    lookups: set[str] = set()

    class Watcher(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., object],
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> object:
            del types
            name = function_name(func)
            if name in _LOOKUPS:
                lookups.update(seen for _, seen in parameters.among((args, kwargs)))
            for operand, axis in _weights(name, args, kwargs or {}):
                if (product := parameters.product(operand, axis)) is not None:
                    known = found.setdefault(product.name, product)
                    if known.input_axis != product.input_axis:
                        found[product.name] = replace(known, input_axis=None)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watcher():
        model.module(*arguments_of(model.inputs, model.example_inputs))
    return tuple(product for product in found.values() if product.name not in lookups)


class _Parameters:
    """Names of a module's parameters by the memory that tensors show."""

    def __init__(self, module: torch.nn.Module) -> None:
        # A tied weight goes by its first name.
        self._named = {
            parameter.untyped_storage().data_ptr(): (name, parameter)
            for name, parameter in reversed(list(module.named_parameters()))
            if parameter.is_floating_point() and parameter.dim() >= 2 and parameter.numel()
        }

    def among(self, operands: object) -> Iterator[tuple[torch.Tensor, str]]:
        """The tensors among these arguments that are parameters or views of one, and their names."""
        import torch
        from torch.utils._pytree import tree_leaves

        for leaf in tree_leaves(operands):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                known = self._named.get(leaf.untyped_storage().data_ptr())
                if known is not None:
                    yield leaf, known[0]

    def product(self, operand: object, axis: int | None) -> Product | None:
        """The parameter behind an operand, and which of its own dimensions the operand's `axis` is."""
        for tensor, name in self.among([operand]):
            _, parameter = self._named[tensor.untyped_storage().data_ptr()]
            own = None
            if axis is not None and tensor.dim() > 1:
                size, stride = tensor.shape[axis], tensor.stride(axis)
                places = zip(parameter.shape, parameter.stride(), strict=True)
                own = next((i for i, place in enumerate(places) if place == (size, stride)), None)
            return Product(name, strip_wrapper(name.rpartition(".")[0]), own)
        return None


def _weights(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Iterator[tuple[object, int | None]]:
    """The operands of a call that may be weights, each with the dimension that is summed over."""
    from torch.utils._pytree import tree_leaves

    if name == "linear":
        yield _argument(args, kwargs, 1, "weight"), -1
    elif name in _CONVOLUTIONS or name in _TRANSPOSED:
        weight = _argument(args, kwargs, 1, "weight")
        is_transposed = name in _TRANSPOSED or (len(args) > 6 and args[6] is True)
        shape: Sequence[int] = getattr(weight, "shape", ())
        if len(shape) > 1 and shape[1] > 1:
            yield weight, 0 if is_transposed else 1
    elif name in _ROWS_ARE_OUTPUTS:
        inputs = ("input", "hx", "query", "key", "value")
        named = [value for key, value in kwargs.items() if key not in inputs]
        for leaf in tree_leaves((args[_ROWS_ARE_OUTPUTS[name] :], named)):
            if getattr(leaf, "ndim", 0) == 2:
                yield leaf, 1
    elif name in _MATRIX_PRODUCTS:
        left, right = _MATRIX_PRODUCTS[name]
        yield _argument(args, kwargs, left, "input" if left == 0 else "mat1"), -1
        yield _argument(args, kwargs, right, "mat2" if left else "other"), -2
    elif name == "einsum":
        for leaf in tree_leaves((args, kwargs)):
            if getattr(leaf, "ndim", 0) >= 2:
                yield leaf, None


def _argument(args: Sequence[object], kwargs: Mapping[str, object], place: int, name: str) -> object:
    return args[place] if place < len(args) else kwargs.get(name)
