"""What a person may say about a source, and what a Python factory may return beside the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.types import Array, Generation, Preprocessing, TensorSpec

if TYPE_CHECKING:
    import torch

    ExampleTensor = torch.Tensor | Array

__all__ = ["ModelSpec", "SourceOptions"]


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What the command line and edgeopt.toml say about the model; wins over what the source says itself.

    Attributes:
        weights: state dict file for a Python factory (.safetensors, .pt, .pth, .bin).
        name: names the model and its bundles.
        inputs: signature, in the order in which the model takes them; see `parse_input`.
        preprocessing, labels: replace the source's.
        task: Hugging Face task ("text-classification", ...); by default config.json's architecture decides.
        max_source_length: tokens that the encoder of a Hugging Face network that writes reads at most, or of a prompt.
        max_target_length: tokens that its decoder reads at most, a prompt included. Both are the model's own limit, or
            128 if that is more, by default.
    """

    weights: Path | None = None
    name: str | None = None
    inputs: tuple[TensorSpec, ...] = ()
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    task: str | None = None
    max_source_length: int | None = None
    max_target_length: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a factory may return instead of the bare module.

    Attributes:
        module: the model; edgeopt puts it in eval mode.
        example_inputs: one tensor or array, a sequence of them in forward's order, or a mapping from input name
            (forward's parameter names call by keyword) to tensor. Batch included.
        inputs: signature; by default static and taken from `example_inputs`. Needed for dynamic dimensions.
        outputs: names, in the order in which forward returns them.
        preprocessing: how a sample becomes the inputs.
        labels: class names by index.
        name: names the model and its bundles.
        generation: says that the network writes sequences. Its forward then takes the source and the target's tokens
            (a decoder-only one, the tokens), and returns the logits behind each; beside it are the methods of
            `edgeopt.sources.generative`. `inputs` must be given, with dynamic lengths.
    """

    module: torch.nn.Module
    example_inputs: ExampleTensor | Sequence[ExampleTensor] | Mapping[str, ExampleTensor] | None = None
    inputs: tuple[TensorSpec, ...] | None = None
    outputs: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    name: str | None = None
    generation: Generation | None = None
