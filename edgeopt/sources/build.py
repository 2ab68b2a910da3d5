"""From a loaded module to a `Model`: prepared for inference, run, and its signature completed from what it did."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from edgeopt.errors import UsageError
from edgeopt.sources import adapter
from edgeopt.sources.base import SourceOptions
from edgeopt.sources.observe import Call, array_of, observe_outputs, run
from edgeopt.sources.signature import check_example, check_specs, describe, synthesize, with_layout
from edgeopt.types import Array, Generation, Model, NativeGraph, Preprocessing, StepRecord, TensorSpec

if TYPE_CHECKING:
    import torch


def slug(text: str) -> str:
    """A name that can be a directory: lower case, digits, dots, dashes and underscores."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "model"


def build(
    module: torch.nn.Module,
    options: SourceOptions,
    *,
    name: str,
    inputs: tuple[TensorSpec, ...],
    examples: Mapping[str, Array] | None,
    output_names: tuple[str, ...] | None,
    preprocessing: Preprocessing | None,
    labels: tuple[str, ...],
    record: StepRecord,
    sha256: str,
    is_convolutional: bool | None = None,
    generation: Generation | None = None,
) -> Model:
    """Find out a module's signature by running it.

    Args:
        module: frozen already, see `freeze`.
        options: what the user said wins over the other arguments; `options.inputs` must be in `inputs` already.
        examples: synthesised where None.
        is_convolutional: whether 4-D inputs are pictures in NCHW; by default if the module holds a 2-D convolution.

    Raises UsageError naming inputs and shapes when the module does not run on the examples, returns what no runtime
    can return, or gives different results for the same input.
    """
    if is_convolutional is None:
        is_convolutional = _has_conv2d(module)
    if is_convolutional:
        inputs = with_layout(inputs, "NCHW")
    check_specs(inputs)
    examples = synthesize(inputs) if examples is None else examples
    for spec in inputs:
        check_example(spec, examples[spec.name])
    module, names = _adapted(module, inputs, examples, output_names)

    def call(arrays: Mapping[str, Array]) -> dict[str, Array]:
        tensors = [tensor for _, tensor in adapter.flatten(run(module, inputs, arrays, type(module).__name__))]
        if len(tensors) != len(names):
            raise UsageError("returns another number of outputs at another input size", where=name)
        return {key: array_of(tensor, key) for key, tensor in zip(names, tensors, strict=True)}

    outputs = observe_outputs(call, inputs, examples)
    if any(spec.layout == "NCHW" for spec in inputs):
        outputs = with_layout(outputs, "NCHW")
    return Model(
        name=slug(options.name or name),
        module=module,
        native=None,
        inputs=inputs,
        outputs=outputs,
        example_inputs=dict(examples),
        preprocessing=options.preprocessing or preprocessing,
        labels=options.labels or labels,
        history=(record,),
        source_sha256=sha256,
        generation=generation,
    )


def build_native(
    call: Call,
    options: SourceOptions,
    *,
    name: str,
    native: NativeGraph,
    inputs: tuple[TensorSpec, ...],
    layout: Literal["NCHW", "NHWC"] | None,
    record: StepRecord,
    sha256: str,
) -> Model:
    """The same for a graph file that `call` runs as it is; `layout` is that of its pictures, None if it takes none."""
    inputs = inputs if layout is None else with_layout(inputs, layout)
    check_specs(inputs)
    examples = synthesize(inputs)
    outputs = observe_outputs(call, inputs, examples)
    if layout is not None and any(spec.layout == layout for spec in inputs):
        outputs = with_layout(outputs, layout)
    return Model(
        name=slug(options.name or name),
        module=None,
        native=native,
        inputs=inputs,
        outputs=outputs,
        example_inputs=examples,
        preprocessing=options.preprocessing,
        labels=options.labels,
        history=(record,),
        source_sha256=sha256,
    )


def override(found: tuple[TensorSpec, ...], declared: tuple[TensorSpec, ...], where: str) -> tuple[TensorSpec, ...]:
    """The user's declarations over the signature that a file holds. Raises UsageError for names it doesn't have."""
    if not declared:
        return found
    known = {spec.name: spec for spec in found}
    for spec in declared:
        if spec.name not in known:
            raise UsageError(f"has no input {spec.name!r}", where=where, fix=f"its inputs are {describe(found)}")
        if spec.dtype != known[spec.name].dtype or len(spec.shape) != len(known[spec.name].shape):
            raise UsageError(
                f"the declared input {describe((spec,))} doesn't fit",
                where=where,
                fix=f"its inputs are {describe(found)}",
            )
    replacements = {spec.name: spec for spec in declared}
    return tuple(replacements.get(spec.name, spec) for spec in found)


def freeze(module: torch.nn.Module) -> None:
    """Eval mode, no gradients, on the CPU. Raises UsageError where weights are absent or not float32."""
    import torch

    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise UsageError("has no data (it is on the meta device)", where=f"weight {name!r}")
        if tensor.dtype in (torch.float16, torch.bfloat16, torch.float64):
            raise UsageError(
                f"is {str(tensor.dtype).removeprefix('torch.')}",
                where=f"weight {name!r}",
                fix="return model.float() from the factory; targets choose the precision of the file",
            )
    module.cpu().requires_grad_(False).eval()


def _adapted(
    module: torch.nn.Module,
    inputs: tuple[TensorSpec, ...],
    examples: Mapping[str, Array],
    output_names: tuple[str, ...] | None,
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The module itself where it meets `Model.module`'s promise, else an adapter around it; and its outputs' names."""
    names = [spec.name for spec in inputs]
    where = type(module).__name__
    keywords = adapter.call_keywords(module, names)
    result = run(partial(adapter.invoke, module, keywords), inputs, examples, where)
    found = [name for name, _ in adapter.flatten(result)]
    is_bare = keywords is None and not adapter.takes_any_number(module) and adapter.is_plain(result)
    return module if is_bare else adapter.adapt(module, names, keywords), _name_outputs(found, output_names, where)


def _name_outputs(found: list[str], given: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    if not found:
        raise UsageError("returns no tensor", where=where)
    if given is not None and len(given) != len(found):
        raise UsageError(f"returns {len(found)} outputs, but {len(given)} names are given", where=where)
    names = tuple(given or found)
    if len(set(names)) < len(names):
        raise UsageError(f"has two outputs of one name ({', '.join(names)})", where=where)
    return names


def _has_conv2d(module: torch.nn.Module) -> bool:
    import torch

    return any(isinstance(part, torch.nn.Conv2d | torch.nn.ConvTranspose2d) for part in module.modules())
