"""What goes into the bundle of a network that writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.bundle.contents import BundleContents
from edgeopt.types import Array, Generation, Model, PartName, Report

if TYPE_CHECKING:
    from edgeopt.device_profiles.schema import DeviceProfile
    from edgeopt.targets.schema import Target


@dataclass(frozen=True, slots=True)
class WrittenExample:
    """What the network makes of one prompt, for people.

    Attributes:
        source: the prompt, or the name of what was heard.
        reference: what somebody wrote; None where nobody did.
        float_text, text: what the float files wrote, and the shipped ones.
    """

    source: str
    reference: str | None
    float_text: str
    text: str


@dataclass(frozen=True, slots=True)
class GoldenSequence:
    """A prompt with exactly what the shipped files write.

    Attributes:
        prompt: the text, without the preprocessing's prefix; None where `inputs` are the prompt.
        inputs: the first part's inputs by name ("input_features"), in the model's terms; empty where there is a text.
        ids: the tokens written, without `Generation.start_ids` or the prompt, the end token included if it came.
        text: what they say; None without a tokenizer.
        beams, max_new_tokens: how the tokens were searched for.
    """

    prompt: str | None
    inputs: Mapping[str, Array]
    ids: tuple[int, ...]
    text: str | None
    beams: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationContents:
    """Everything that `write_generation_bundle` needs.

    Attributes:
        target: as used, with the run's own gates in place of the target's.
        model: the whole network, for its name, preprocessing and where it came from.
        parts: what goes into the ordinary bundle of each part.
        report: on the whole: the texts, not the parts' tensors.
        golden: a handful of prompts. examples: the same or others, for people.
        beams: rows of the decoder, and what the report's texts were searched with.
        length_penalty: a hypothesis of n tokens is worth its log probability divided by n to this power.
        metric, metric_signature: what judged the texts ("bleu", and how sacrebleu counted).
        licence: of the model, as an SPDX expression; None where nobody declared it.
        tokenizer: a tokenizer.json, or the directory that holds one, where the prompt is no text and the preprocessing
            names none; None otherwise.
    """

    target: Target
    device: DeviceProfile
    model: Model
    generation: Generation
    parts: Mapping[PartName, BundleContents]
    report: Report
    golden: tuple[GoldenSequence, ...]
    examples: tuple[WrittenExample, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0
    metric: str | None = None
    metric_signature: str | None = None
    licence: str | None = None
    tokenizer: Path | None = None
