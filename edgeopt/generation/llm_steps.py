"""Runs the network of a language-model layout: a prompt, then a token at a time, with the cache that came out.

Each function gives the logits (1, T - prompt + 1, V) behind the prompt's last token and behind every later one, for
tokens (1, T). What comes first of a text takes the path of a prompt, the rest that of writing, so that a cache that is
read or written wrongly shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeopt.generation.llm_executorch import longest_chunk
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Generation


def prompt_length(tokens: int, generation: Generation) -> int:
    """Half of a text, as far as the network reads so many at once."""
    return max(1, min(tokens // 2, longest_chunk(generation)))


def genai_logits(session: Session, ids: Array, prompt: int) -> Array:
    """Of a file of `genai_model`: the cache grows from nothing, and is the caller's."""
    caches = {}
    for tensor in session.signature.inputs:
        if tensor.name.startswith("past_key_values."):
            _, heads, _, size = tensor.shape
            caches[tensor.name] = np.zeros((1, int(heads), 0, int(size)), np.float32)
    found = []
    for first, last in _pieces(ids, prompt):
        results = session.run(
            {
                "input_ids": ids[:, first:last],
                "attention_mask": np.ones((1, last), np.int64),
                "position_ids": np.arange(first, last)[None],
                **caches,
            }
        )
        caches = {name: results[name.replace("past_key_values", "present")] for name in caches}
        found.append(results["logits"][:, -1:])
    return np.concatenate(found, axis=1)


def executorch_logits(session: Session, ids: Array, prompt: int) -> Array:
    """Of a file of `executorch_model`: the cache is the network's own."""
    pieces = _pieces(ids, prompt)
    runs = ({"input_ids": ids[:, first:last], "cache_position": np.arange(first, last)} for first, last in pieces)
    return np.concatenate([session.run(inputs)["logits"] for inputs in runs], axis=1)


class LiteRtSteps:
    """A .tflite file of `convert_litert_lm` in LiteRT's interpreter, called as LiteRT-LM's executor calls it: a prompt
    without its last token, filled up with zeros, and that token as the first step."""

    def __init__(self, network: Path, generation: Generation) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(str(network))
        self._length = generation.max_source

    def logits(self, ids: Array, prompt: int) -> Array:
        step = self._interpreter.get_signature_runner("decode")
        shapes = {name: detail["shape"] for name, detail in step.get_input_details().items()}
        caches = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name.startswith("kv_cache")}
        read = prompt - 1
        if read:
            tokens, positions = np.zeros((1, self._length), np.int32), np.zeros(self._length, np.int32)
            tokens[0, :read], positions[:read] = ids[0, :read], np.arange(read)
            runner = self._interpreter.get_signature_runner(f"prefill_{self._length}")
            caches = runner(tokens=tokens, input_pos=positions, **caches)
        found = []
        for at in range(read, ids.shape[1]):
            token, position = ids[:, at : at + 1].astype(np.int32), np.array([at], np.int32)
            caches = step(tokens=token, input_pos=position, **caches)
            found.append(caches.pop("logits"))
        return np.concatenate(found, axis=1)


def _pieces(ids: Array, prompt: int) -> list[tuple[int, int]]:
    """First and one past the last token of each run."""
    return [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]
