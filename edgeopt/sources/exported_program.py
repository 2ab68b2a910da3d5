"""`.pt2` files: programs written by torch.export.save."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError
from edgeopt.sources import adapter
from edgeopt.sources.base import SourceOptions
from edgeopt.sources.build import build, freeze, override
from edgeopt.sources.digest import sha256_of
from edgeopt.sources.observe import run
from edgeopt.sources.pt2_archive import check_archive
from edgeopt.sources.signature import dtype_of, fits, synthesize
from edgeopt.types import Array, Dim, Model, StepRecord, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

#: Upper bound of a dynamic dimension for which the program gives none.
UNBOUNDED = 512


def load(source: str, options: SourceOptions) -> Model:
    """Load an exported program. Raises UsageError when it is corrupt, or holds more than ATen operators and tensors."""
    path = Path(source)
    if not path.is_file():
        raise UsageError("no such file", where=source)
    check_archive(path)
    program = _open(path)
    _check_eval_mode(program, source)
    names = _input_names(program, source)
    values = _input_values(program, names)
    found = tuple(_spec(program, name, value) for name, value in zip(names, values, strict=True))
    inputs = override(found, options.inputs, source)
    examples = _examples(program, inputs) or synthesize(inputs)
    module, outputs = _flat(program, inputs, examples, path.stem)
    freeze(module)
    return build(
        module,
        options,
        name=path.stem,
        inputs=inputs,
        examples=examples,
        output_names=outputs,
        preprocessing=None,
        labels=(),
        record=StepRecord("load", {"source": "exported-program"}),
        sha256=sha256_of([path]),
        is_convolutional=_has_conv2d(program),
    )


def _open(path: Path) -> ExportedProgram:
    import torch

    try:
        return torch.export.load(path)
    except Exception as error:
        # torch documents no errors here, and raises many kinds.
        reason = str(error).strip().splitlines()
        raise UsageError(
            f"can't be loaded by torch {torch.__version__}: {reason[0] if reason else type(error).__name__}",
            where=str(path),
            fix="write it again with this version of torch",
        ) from error


def _check_eval_mode(program: ExportedProgram, source: str) -> None:
    """A program can't be switched to eval mode any more."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        arguments = (
            {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)} | node.kwargs
            if hasattr(node.target, "_schema")
            else {}
        )
        is_norm_or_dropout = any(part in str(node.target) for part in ("batch_norm", "dropout"))
        if is_norm_or_dropout and (arguments.get("training") is True or arguments.get("train") is True):
            raise UsageError(
                f"was exported in training mode (operator {node.target}, node {node.name})",
                where=source,
                fix="call model.eval() before torch.export.export",
            )


def _flat(
    program: ExportedProgram, inputs: tuple[TensorSpec, ...], examples: Mapping[str, Array], name: str
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The program as a module that takes its inputs by position and returns a tuple of tensors; the outputs' names.

    It keeps its layers also inside another module: exporters put their own around it.

    Raises UsageError when the program doesn't run on the examples or returns what is no tensor.
    """
    import torch
    from torch.fx.graph import CodeGen
    from torch.utils import _pytree as pytree

    from edgeopt.sources.layered import LayeredGraph

    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)

    def call(*tensors: torch.Tensor) -> object:
        arguments, keywords = pytree.tree_unflatten(tensors, program.call_spec.in_spec)
        return module(*arguments, **keywords)

    # Only the program's own module checks sizes against those that it was exported for.
    result = run(call, inputs, examples, name)
    leaves = {id(leaf): position for position, leaf in enumerate(pytree.tree_leaves(result))}
    outputs = adapter.flatten(result)
    flat = LayeredGraph(module, module.graph)
    (output,) = [node for node in flat.graph.nodes if node.op == "output"]
    output.args = (tuple(output.args[0][leaves[id(tensor)]] for _, tensor in outputs),)
    flat.graph.set_codegen(CodeGen())
    flat.recompile()
    return flat, tuple(name for name, _ in outputs)


def _input_names(program: ExportedProgram, source: str) -> list[str]:
    names = list(program.graph_signature.user_inputs)
    constants = [name for name in names if not isinstance(name, str)]
    if constants:
        raise UsageError(
            f"was exported with a constant argument ({constants[0]!r})",
            where=source,
            fix="export a module whose forward takes tensors only",
        )
    return [str(name) for name in names]


def _input_values(program: ExportedProgram, names: list[str]) -> list[torch.Tensor]:
    by_name = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [by_name[name] for name in names]


def _spec(program: ExportedProgram, name: str, value: torch.Tensor) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else _dim(program, str(size)) for size in value.shape)
    return TensorSpec(name, shape, dtype_of(str(value.dtype).removeprefix("torch."), f"input {name!r}"))


def _dim(program: ExportedProgram, expression: str) -> Dim:
    """A symbolic size with the bounds that the program was exported with."""
    name = re.sub(r"\W", "_", expression)
    for symbol, bounds in program.range_constraints.items():
        if str(symbol) == expression:
            low, high = str(bounds.lower), str(bounds.upper)
            return Dim(
                name,
                max(1, int(low)) if low.isdecimal() else 1,
                # sympy writes an open end as int_oo.
                min(int(high), 1 << 31) if high.isdecimal() else UNBOUNDED,
            )
    return Dim(name, 1, UNBOUNDED)


def _examples(program: ExportedProgram, inputs: tuple[TensorSpec, ...]) -> dict[str, Array] | None:
    """The inputs that the program was exported with, where they are stored and fit."""
    import torch
    from torch.utils._pytree import tree_leaves

    if program.example_inputs is None:
        return None
    values = [value for value in tree_leaves(program.example_inputs) if isinstance(value, torch.Tensor)]
    if len(values) != len(inputs):
        return None
    examples = {spec.name: value.detach().numpy() for spec, value in zip(inputs, values, strict=True)}
    return examples if all(fits(spec, examples[spec.name]) for spec in inputs) else None


def _has_conv2d(program: ExportedProgram) -> bool:
    """A program has no layers any more; a convolution with 4-D weights tells."""
    convolutions = [node for node in program.graph.nodes if node.op == "call_function" and "conv" in str(node.target)]
    weights = [argument for node in convolutions for argument in node.args[1:2] if hasattr(argument, "meta")]
    return any(weight.meta["val"].ndim == 4 for weight in weights)
