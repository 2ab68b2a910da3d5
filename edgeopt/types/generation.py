"""Networks that write sequences, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: The files that such a network is exported to: an encoder-decoder has an encoder and a decoder, a decoder-only network
#: a prefill, which reads the prompt at once, and a decoder.
PartName = Literal["encoder", "prefill", "decoder"]
GenerationTask = Literal[
    "translation", "summarization", "text2text-generation", "speech-recognition", "text-generation"
]


@dataclass(frozen=True, slots=True)
class Generation:
    """What a loop around the network's parts must know to write with it.

    Attributes:
        kind: where the prompt goes: through an encoder, or through the decoder itself.
        vocabulary: tokens that `logits` tells apart.
        start_ids: what the decoder reads before it writes (T5's padding token, Whisper's start, language and task);
            empty for "decoder", whose prompt is that.
        end_ids: tokens that end a sequence. pad_id: fills what is behind the end.
        max_source: positions of the encoder's input, or of the longest prompt.
        max_target: rows of the cache: tokens that the decoder reads at most, `start_ids` or the prompt included.
        layers: decoder layers, each with a cache of its own.
        suppressed_ids: tokens that are never written; begin_suppressed_ids: nor as the first one.
    """

    kind: Literal["encoder-decoder", "decoder"]
    task: GenerationTask
    vocabulary: int
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    pad_id: int
    max_source: int
    max_target: int
    layers: int
    suppressed_ids: tuple[int, ...] = ()
    begin_suppressed_ids: tuple[int, ...] = ()
