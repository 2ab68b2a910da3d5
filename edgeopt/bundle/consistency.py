"""Does a manifest make sense in itself? Hashes tell that nothing changed, not that what was written can be used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from edgeopt.bundle.manifest import Manifest, StoredArray
from edgeopt.errors import TamperedError
from edgeopt.types import SignatureTensor


def check_consistency(manifest: Manifest, where: str) -> None:
    """Raises TamperedError with the first contradiction."""
    for problem in _contradictions(manifest):
        raise TamperedError(problem, where=where)


def _contradictions(manifest: Manifest) -> Iterator[str]:
    target = manifest.target_definition
    if (manifest.target, manifest.format) != (target.name, target.format):
        yield f"is for {manifest.target!r} ({manifest.format}), its target_definition for {target.name!r}"
    if not target.runtimes:
        yield "names no runtime"
    if not 0 <= manifest.golden_tolerance <= 1:
        yield f"has the golden_tolerance {manifest.golden_tolerance!r}"
    for model in (manifest.model, manifest.float_twin):
        if model is not None:
            if not model.signature.outputs:
                yield f"gives {model.file!r} no outputs"
            for tensor in (*model.signature.inputs, *model.signature.outputs):
                yield from _tensor_problems(tensor)
    yield from _golden_problems(manifest)


def _tensor_problems(tensor: SignatureTensor) -> Iterator[str]:
    if tensor.permutation is not None and sorted(tensor.permutation) != list(range(len(tensor.shape))):
        yield f"transposes the tensor {tensor.name!r} by {tensor.permutation}"
    params = tensor.quantization
    if params is not None and (
        not params.scale
        or len(params.scale) != len(params.zero_point)
        or not all(math.isfinite(scale) and scale > 0 for scale in params.scale)
    ):
        yield f"quantizes the tensor {tensor.name!r} by {params.scale} and {params.zero_point}"


def _golden_problems(manifest: Manifest) -> Iterator[str]:
    if not manifest.golden:
        yield "has no golden vectors"
    signature = manifest.model.signature
    inputs = {tensor.name: tensor.dtype for tensor in signature.inputs}
    outputs = {tensor.name: tensor.dtype for tensor in signature.outputs}
    for number, vector in enumerate(manifest.golden):
        for kind, stored, wanted in (("inputs", vector.inputs, inputs), ("outputs", vector.outputs, outputs)):
            if _types(stored) != wanted:
                yield f"has {kind} in golden vector {number} that are not those of the signature"
        if vector.reference.keys() != outputs.keys():
            yield f"has a reference in golden vector {number} whose outputs are not those of the signature"


def _types(stored: Mapping[str, StoredArray]) -> dict[str, str]:
    return {name: array.dtype for name, array in stored.items()}
