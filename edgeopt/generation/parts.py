"""A network that writes, taken apart into ordinary models with static shapes: what is exported of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edgeopt.errors import UsageError
from edgeopt.sources.adapter import sign
from edgeopt.sources.generative import cache_shapes, decodes, encodes, is_mask, prefills, writer_of
from edgeopt.types import Array, Dim, Generation, Model, PartName, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Result = TypeVar("Result")

#: The decoder's inputs of one name each; keys and values have names of their own.
TOKEN, POSITION, SOURCE_MASK = "token", "position", "source_mask"


def split(model: Model, beams: int = 1) -> dict[PartName, Model]:
    """The parts of a network that writes, in the order in which they run.

    An encoder-decoder has an "encoder" (source -> keys and values of the cross-attentions) and a "decoder", a
    decoder-only network a "prefill" (prompt -> logits and rows of the cache) and a "decoder". The decoder takes one
    token for each of `beams` sequences, its position, the source's mask and memory, and the cache; it returns logits
    and only the cache's new row. Parts share the model's weights, and have the paths of its layers.

    Raises UsageError for a model that doesn't write, or methods of the user's that return other than they promise.
    """
    generation = model.generation
    if generation is None or model.module is None:
        raise UsageError("doesn't write sequences", where=model.name, fix="give ModelSpec.generation or an hf: task")
    if beams < 1:
        raise UsageError(f"{beams} sequences can't be written at once", where="beams", fix="give 1 or more")
    writer = writer_of(model.module, generation)
    if generation.kind == "encoder-decoder":
        return _encoder_decoder(model, writer, generation, beams)
    return _decoder_only(model, writer, generation, beams)


def _encoder_decoder(
    model: Model, writer: torch.nn.Module, generation: Generation, beams: int
) -> dict[PartName, Model]:
    source = tuple(_static(spec) for spec in model.inputs[:-1])
    examples = {spec.name: _padded(model.example_inputs[spec.name], spec) for spec in model.inputs[:-1]}
    mask_name = next((spec.name for spec in source if is_mask(spec.name)), None)
    mask = None if mask_name is None else _tensor(examples[mask_name])
    memory = _run(model.name, lambda: encodes(writer).encode(*(_tensor(examples[spec.name]) for spec in source)))
    memory_specs = _row_specs("memory", memory)
    encoder = _part(
        model, "encoder", writer, source, examples, memory_specs,
        lambda part, *tensors: encodes(part).encode(*tensors),
    )  # fmt: skip
    shapes = cache_shapes(writer, generation, memory, mask)
    decoder = _decoder(model, writer, generation, beams, shapes, mask, memory)
    return {"encoder": replace(encoder, preprocessing=model.preprocessing), "decoder": decoder}


def _decoder_only(model: Model, writer: torch.nn.Module, generation: Generation, beams: int) -> dict[PartName, Model]:
    prompt = TensorSpec("input_ids", (1, generation.max_source), "int64", padding=generation.pad_id)
    example = model.example_inputs[model.inputs[0].name][:1, : generation.max_source]
    length = np.array([example.shape[1]])
    examples = {"input_ids": _padded(example, prompt), "length": length}
    _, rows = _run(model.name, lambda: prefills(writer).prefill(_tensor(examples["input_ids"]), _tensor(length)))
    prefill = _part(
        model, "prefill", writer, (prompt, TensorSpec("length", (1,), "int64")), examples,
        (_logits(1, generation), *_row_specs("present", rows)),
        lambda part, ids, length: _flat(prefills(part).prefill(ids, length)),
    )  # fmt: skip
    shapes = tuple((row.shape[1], row.shape[3]) for row in rows)
    return {"prefill": prefill, "decoder": _decoder(model, writer, generation, beams, shapes, None, ())}


def _decoder(
    model: Model,
    writer: torch.nn.Module,
    generation: Generation,
    beams: int,
    shapes: Sequence[tuple[int, int]],
    mask: Tensor | None,
    memory: tuple[Tensor, ...],
) -> Model:
    """`shapes`: heads and width of each key and value of the cache."""
    specs = [TensorSpec(TOKEN, (beams, 1), "int64"), TensorSpec(POSITION, (1,), "int64")]
    examples = {TOKEN: np.full((beams, 1), _example_token(model)), POSITION: np.array([0])}
    if mask is not None:
        specs.append(TensorSpec(SOURCE_MASK, tuple(mask.shape), "int64", padding=0))
        examples[SOURCE_MASK] = mask.numpy()
    for name, tensor in zip(_names("memory", len(memory)), memory, strict=True):
        specs.append(TensorSpec(name, (beams, *tensor.shape[1:]), "float32"))
        examples[name] = np.repeat(tensor.numpy(), beams, axis=0)
    past = _names("past", len(shapes))
    for name, (heads, width) in zip(past, shapes, strict=True):
        shape = (beams, heads, generation.max_target, width)
        specs.append(TensorSpec(name, shape, "float32"))
        examples[name] = np.zeros(shape, dtype=np.float32)
    has_mask, remembered = mask is not None, len(memory)

    def step(part: torch.nn.Module, token: Tensor, position: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        source_mask = rest[0] if has_mask else None
        rows = rest[1:] if has_mask else rest
        return _flat(decodes(part).decode(token, position, source_mask, rows[:remembered], rows[remembered:]))

    present = tuple(
        TensorSpec(name, (beams, heads, 1, width), "float32")
        for name, (heads, width) in zip(_names("present", len(shapes)), shapes, strict=True)
    )
    return _part(model, "decoder", writer, tuple(specs), examples, (_logits(beams, generation), *present), step)


def _part(
    model: Model,
    name: PartName,
    writer: torch.nn.Module,
    inputs: tuple[TensorSpec, ...],
    examples: Mapping[str, Array],
    outputs: tuple[TensorSpec, ...],
    call: Callable[..., tuple[Tensor, ...]],
) -> Model:
    """The network with `call` for its forward, as a model of its own.

    Raises UsageError where what it returns is not `outputs`.
    """
    module = _with_forward(writer, call, [spec.name for spec in inputs])
    returned = _run(model.name, lambda: tuple(module(*(_tensor(examples[spec.name]) for spec in inputs))))
    got = [(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in returned]
    wanted = [(spec.shape, spec.dtype) for spec in outputs]
    if got != wanted:
        at = next((i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), len(wanted) - 1)
        raise UsageError(
            f"returns {got[at] if at < len(got) else 'nothing'} for {outputs[at].name}, where {wanted[at]} is needed",
            where=f"the {name} of {model.name}",
            fix="give the network rows(), which tells the cache's shapes, or correct its methods",
        )
    return replace(
        model,
        name=f"{model.name}-{name}",
        module=module,
        inputs=inputs,
        outputs=outputs,
        example_inputs=dict(examples),
        preprocessing=None,
        labels=(),
        generation=None,
    )


def _with_forward(
    writer: torch.nn.Module, call: Callable[..., tuple[Tensor, ...]], names: Sequence[str]
) -> torch.nn.Module:
    """The same network, layers and all, whose forward is `call(network, *tensors)`.

    A copy of the outermost module only, of a class of its own: layers keep their paths and are not copied.
    """

    def forward(self: torch.nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call(self, *tensors)

    sign(forward, names)
    kind = type(writer)
    part = copy.copy(writer)
    part.__dict__.update({key: copy.copy(value) for key, value in vars(part).items() if isinstance(value, dict)})
    part.__class__ = type(f"{kind.__name__}Part", (kind,), {"forward": forward})
    return part


def _run(name: str, call: Callable[[], Result]) -> Result:
    import torch

    try:
        with torch.no_grad():
            return call()
    # The network's own code may raise anything.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UsageError(
            f"can't be taken apart: {reason[0] if reason else type(error).__name__}", where=name
        ) from error


def _static(spec: TensorSpec) -> TensorSpec:
    return replace(spec, shape=tuple(d.max if isinstance(d, Dim) else d for d in spec.shape))


def _padded(array: Array, spec: TensorSpec) -> Array:
    """The example at the largest size, the end filled up."""
    shape = [d.max if isinstance(d, Dim) else d for d in spec.shape]
    widths = [(0, size - have) for size, have in zip(shape, array.shape, strict=True)]
    return np.pad(array, widths, constant_values=spec.padding or 0)


def _tensor(array: Array) -> Tensor:
    import torch

    return torch.from_numpy(np.array(array))


def _flat(result: tuple[Tensor, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    logits, rows = result
    return (logits, *rows)


def _names(prefix: str, count: int) -> list[str]:
    """memory_key_0, memory_value_0, memory_key_1, ..."""
    return [f"{prefix}_{('key', 'value')[i % 2]}_{i // 2}" for i in range(count)]


def _row_specs(prefix: str, rows: Sequence[Tensor]) -> tuple[TensorSpec, ...]:
    names = _names(prefix, len(rows))
    return tuple(TensorSpec(name, tuple(row.shape), "float32") for name, row in zip(names, rows, strict=True))


def _logits(batch: int, generation: Generation) -> TensorSpec:
    return TensorSpec("logits", (batch, generation.vocabulary), "float32")


def _example_token(model: Model) -> int:
    """The target's first."""
    return int(model.example_inputs[model.inputs[-1].name].flat[0])
