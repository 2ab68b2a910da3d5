"""What a network that writes can do beside `forward`, and the proof that it does it right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from edgeopt.errors import ConversionError, EdgeoptError, UsageError
from edgeopt.types import WRAPPED_ATTRIBUTE, Array, Generation, Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Tokens that are written in the proof. The second sees the first through the cache.
PROVEN_TOKENS = 4
#: How far the logits of the two ways of running a network may be apart, as a share of the largest one.
TOLERANCE = 1e-3


@runtime_checkable
class Decodes(Protocol):
    """A network that writes token by token. Sizes: batch B, heads H, cache rows C, width D, vocabulary V.

    Keys and values travel as key_0, value_0, key_1, value_1, ... over the decoder's layers, each (B, H, rows, D);
    heads and widths may differ by layer.
    """

    def decode(
        self,
        token: Tensor,
        position: Tensor,
        source_mask: Tensor | None,
        memory: tuple[Tensor, ...],
        past: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step.

        Args:
            token: int64 (B, 1).
            position: int64 (1,), how many tokens came before.
            source_mask: (1, source), 0 where the source is padding; None where the encoder takes no mask.
            memory: what `encode` returned, for each of the B; () without an encoder.
            past: C rows, of which those before `position` are set.

        Returns: the logits (B, V) of the next token, and the new row's keys and values (B, H, 1, D).
        """
        ...


@runtime_checkable
class Encodes(Decodes, Protocol):
    """An encoder-decoder."""

    def encode(self, *source: Tensor) -> tuple[Tensor, ...]:
        """The source's keys and values for the cross-attentions, from the encoder's inputs."""
        ...


@runtime_checkable
class Prefills(Decodes, Protocol):
    """A decoder-only network."""

    def prefill(self, input_ids: Tensor, length: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Read a prompt at once.

        Args:
            input_ids: int64 (1, P), padded at the end.
            length: int64 (1,), tokens that are no padding.

        Returns: the logits (1, V) behind the last of them, and keys and values (1, H, P, D) of all P.
        """
        ...


@runtime_checkable
class GivesRows(Protocol):
    """A network that also gives the keys and values of a whole target in one run."""

    def rows(self, target_ids: Tensor, source_mask: Tensor | None, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keys and values (B, H, T, D) that a cache holds after the tokens `target_ids`, int64 (B, T)."""
        ...


def writer_of(module: torch.nn.Module | None, generation: Generation) -> torch.nn.Module:
    """The module that has the methods: the model's own, or the one that an adapter wraps.

    Raises UsageError where neither has them.
    """
    import torch

    first = "encode" if generation.kind == "encoder-decoder" else "prefill"
    wrapped = getattr(module, WRAPPED_ATTRIBUTE, None)
    for candidate in (module, wrapped):
        has_both = all(callable(getattr(candidate, name, None)) for name in (first, "decode"))
        if isinstance(candidate, torch.nn.Module) and has_both:
            return candidate
    raise UsageError(
        f"has no methods {first}() and decode(), by which it could write token by token",
        where=type(wrapped if wrapped is not None else module).__name__,
        fix="add them (docs/sources-writing.md shows how), or leave out ModelSpec.generation",
    )


def encodes(module: torch.nn.Module) -> Encodes:
    """The module as what it is. Raises TypeError where it is no such thing, which `writer_of` has ruled out."""
    if not isinstance(module, Encodes):
        raise TypeError(f"{type(module).__name__} has no encode()")
    return module


def prefills(module: torch.nn.Module) -> Prefills:
    """The same for a decoder-only network."""
    if not isinstance(module, Prefills):
        raise TypeError(f"{type(module).__name__} has no prefill()")
    return module


def decodes(module: torch.nn.Module) -> Decodes:
    """The same for what both kinds have."""
    if not isinstance(module, Decodes):
        raise TypeError(f"{type(module).__name__} has no decode()")
    return module


def cache_shapes(
    writer: torch.nn.Module, generation: Generation, memory: tuple[Tensor, ...], source_mask: Tensor | None
) -> tuple[tuple[int, int], ...]:
    """(heads, width) of every key and value in the decoder's cache, in order.

    From a run; for an encoder-decoder without `rows` they are taken to be those of the cross-attentions.
    """
    import torch

    ids = torch.full((1, 2), generation.pad_id)
    with torch.no_grad():
        if generation.kind == "decoder":
            rows = prefills(writer).prefill(ids, torch.tensor([2]))[1]
        elif isinstance(writer, GivesRows):
            rows = writer.rows(ids, source_mask, memory)
        else:
            rows = memory
    return tuple((row.shape[1], row.shape[3]) for row in rows)


def observe_writer(model: Model) -> Model:
    """The model with the vocabulary and the number of layers that a run shows.

    Raises UsageError as `check_writer` does.
    """
    import torch

    generation = _generation_of(model)
    writer = writer_of(model.module, generation)
    vocabulary = model.outputs[0].shape[-1]
    if len(model.outputs) != 1 or len(model.outputs[0].shape) != 3 or not isinstance(vocabulary, int):
        raise UsageError("must return one tensor, logits (1, target, vocabulary)", where=f"forward of {model.name}")
    with _running(model.name), torch.no_grad():
        tensors = _source(model)
        memory = encodes(writer).encode(*tensors) if generation.kind == "encoder-decoder" else ()
        shapes = cache_shapes(writer, generation, memory, source_mask_of(model, tensors))
    found = replace(generation, vocabulary=vocabulary, layers=len(shapes) // 2)
    return replace(model, generation=found)


def check_writer(model: Model) -> None:
    """Write the first tokens of the example token by token, and compare with `forward`, which sees them all.

    Raises:
        UsageError: methods are missing, or they fail, or a token that the loop needs is none of the vocabulary.
        ConversionError: the logits differ.
    """
    generation = _generation_of(model)
    _check_tokens(generation, model.name)
    with _running(model.name):
        expected, got = _both_ways(model, generation)
    widest = float(np.abs(expected).max())
    if expected.shape != got.shape or not np.allclose(expected, got, rtol=0, atol=TOLERANCE * max(widest, 1e-6)):
        raise ConversionError(
            "gives other logits token by token than for the whole target",
            where=model.name,
            fix="its attention needs more than keys, values and a position; write the methods by hand",
        )


def _check_tokens(generation: Generation, where: str) -> None:
    """Configurations of small networks keep the large ones' special tokens."""
    named = {"start": generation.start_ids, "end": generation.end_ids, "padding": (generation.pad_id,)}
    for role, tokens in named.items():
        if max(tokens, default=0) >= generation.vocabulary:
            raise UsageError(
                f"names {max(tokens)} as its {role} token, and its vocabulary has {generation.vocabulary}",
                where=where,
                fix="correct generation_config.json, or the Generation that you give",
            )


def _generation_of(model: Model) -> Generation:
    if model.generation is None:
        raise ValueError(f"{model.name} is no network that writes")
    return model.generation


@contextmanager
def _running(name: str) -> Iterator[None]:
    """Errors of the network's own code, which may raise anything, as one line."""
    try:
        yield
    except EdgeoptError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UsageError(
            f"can't be run token by token: {reason[0] if reason else type(error).__name__}", where=name
        ) from error


def _source(model: Model) -> list[Tensor]:
    """The encoder's inputs of the example; none without an encoder."""
    import torch

    return [torch.from_numpy(np.array(model.example_inputs[spec.name])) for spec in model.inputs[:-1]]


def _both_ways(model: Model, generation: Generation) -> tuple[Array, Array]:
    """Logits (tokens, V) by `forward`, and by the methods."""
    import torch

    module, writer = model.module, writer_of(model.module, generation)
    if module is None:
        raise ValueError(f"{model.name} has no torch module")
    source = _source(model)
    target = torch.from_numpy(np.array(model.example_inputs[model.inputs[-1].name]))[:1]
    count = min(PROVEN_TOKENS, target.shape[1])
    steps = []
    with torch.no_grad():
        expected = module(*source, target)[0, :count]
        if generation.kind == "encoder-decoder":
            memory = encodes(writer).encode(*source)
            mask = source_mask_of(model, source)
            first = 0
        else:
            memory, mask, first = (), None, max(1, count // 2)
        shapes = cache_shapes(writer, generation, memory, mask)
        # What is behind the position is none of the network's business.
        past = [torch.ones((1, heads, generation.max_target, width)) for heads, width in shapes]
        if first:
            logits, rows = prefills(writer).prefill(target, torch.tensor([first]))
            steps.append(logits)
            for cache, row in zip(past, rows, strict=True):
                cache[:, :, :first] = row[:, :, :first]
            expected = expected[first - 1 :]
        for position in range(first, count):
            token = target[:, position : position + 1]
            logits, rows = decodes(writer).decode(token, torch.tensor([position]), mask, memory, tuple(past))
            steps.append(logits)
            for cache, row in zip(past, rows, strict=True):
                cache[:, :, position : position + 1] = row
    return expected.numpy(), torch.cat(steps).numpy()


def source_mask_of(model: Model, source: Sequence[Tensor]) -> Tensor | None:
    """The encoder's mask among its inputs: the integer one called a mask."""
    for spec, tensor in zip(model.inputs, source, strict=False):
        if is_mask(spec.name):
            return tensor
    return None


def is_mask(name: str) -> bool:
    """Whether an encoder's input of this name tells tokens from padding."""
    return name.endswith("mask")
