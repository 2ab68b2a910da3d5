"""The files that ExecuTorch's text runner loads: a .pte that tells about itself, and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.generation.llm_executorch import longest_chunk
from edgeopt.generation.llm_network import LanguageModel, language_model
from edgeopt.generation.llm_tokenizer import copy_tokenizer
from edgeopt.types import Artifact, Model

if TYPE_CHECKING:
    from executorch.exir.schema import ExecutionPlan

MODEL_FILE = "model.pte"


def write_executorch_llm(model: Model, artifact: Artifact, directory: Path) -> tuple[Path, ...]:
    """Write the runner's files into a directory and return them, sorted.

    Args:
        model: the language model as loaded, with its tokenizer; not its ExecuTorch form.
        artifact: what the ExecuTorch exporter made of `executorch_model(model)`, in float or quantized.

    `executorch.extension.llm.runner.TextLLMRunner(model, tokenizer)`, and the same class in C++, Java and Swift, then
    writes with them.
    """
    path = directory / MODEL_FILE
    path.write_bytes(with_metadata(artifact.path.read_bytes(), metadata(language_model(model))))
    return tuple(sorted([path, *copy_tokenizer(model, directory)]))


def metadata(found: LanguageModel) -> dict[str, int | bool | tuple[int, ...]]:
    """Name of a method -> what it returns; the runner calls them to learn what it runs."""
    generation = found.generation
    return {
        "get_vocab_size": generation.vocabulary,
        "get_bos_id": found.begin_id,
        "get_eos_ids": generation.end_ids,
        # What it may give at once, and what the cache holds.
        "get_max_seq_len": longest_chunk(generation),
        "get_max_context_len": generation.max_target,
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
    }


def with_metadata(program: bytes, values: dict[str, int | bool | tuple[int, ...]]) -> bytes:
    """A .pte file with one more method for each name, which returns those constants; all data stays as it is."""
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    file = deserialize_pte_binary(program)
    file.program.execution_plan.extend(_constant_method(name, value) for name, value in values.items())
    return bytes(serialize_pte_binary(file, extract_delegate_segments=True))


def _constant_method(name: str, value: int | bool | tuple[int, ...]) -> ExecutionPlan:
    from executorch.exir.schema import Bool, Chain, ContainerMetadata, EValue, ExecutionPlan, Int
    from executorch.extension.pytree import tree_flatten

    results, structure = tree_flatten(list(value) if isinstance(value, tuple) else value)
    return ExecutionPlan(
        name=name,
        container_meta_type=ContainerMetadata("", structure.to_str()),
        values=[EValue(Bool(result) if isinstance(result, bool) else Int(result)) for result in results],
        inputs=[],
        outputs=list(range(len(results))),
        chains=[Chain(inputs=[], outputs=[], instructions=[], stacktrace=None)],
        operators=[],
        delegates=[],
        non_const_buffer_sizes=[0],
    )
