"""PyTorch -> ExecuTorch for the Core ML delegate (fp16 or fp32), which runs on Apple's devices only."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError, MissingError
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.exporter.coreml_rewrites import rewrite_for_coremltools
from edgeopt.exporter.executorch import ExecuTorchExporter
from edgeopt.exporter.executorch_coreml_check import check_package
from edgeopt.exporter.executorch_delegated import (
    capture_model,
    delegated_artifact,
    lower_delegated,
    write_emulation,
)
from edgeopt.exporter.executorch_lowering import quiet_vendor
from edgeopt.formats.executorch import read_program
from edgeopt.formats.executorch_delegated import (
    COREML,
    COREML_MANIFEST,
    COREML_METADATA,
    COREML_MODEL,
    coreml_blob,
    coreml_files,
)
from edgeopt.types import Artifact, Finding, Format, LayerRules, Model, NeuralEngine, Scheme

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner


class CoreMLDelegateExporter:
    """The .pte files of a model for Core ML; the float twin is the CPU's. See `edgeopt.exporter.base.Exporter`."""

    format: Format = "executorch"
    suffix = ".pte"

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        if scheme.precision not in ("fp16", "fp32"):
            return "the Core ML delegate is made at fp16 or fp32 here; for integer weights take an ios-coreml target"
        if rules.keep_float or rules.int16_activations:
            return "the Core ML delegate has one precision for all layers; take fp32 instead of exempting layers"
        return None

    def export_float(self, model: Model, directory: Path) -> Artifact:
        return ExecuTorchExporter().export_float(model, directory)

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        scheme = request.scheme
        if (reason := self.unsupported(scheme, request.rules)) is not None:
            raise ConversionError(reason, where="scheme", fix="see `edgeopt targets` for what each format offers")
        if not isinstance(scheme.npu, NeuralEngine):
            raise ValueError("the Core ML delegate is made for a Neural Engine")
        if find_spec("coremltools") is None:
            raise MissingError.extra("coremltools", "apple", "the Core ML delegate of ExecuTorch")
        path, emulation = directory / f"model{self.suffix}", directory / f"model_emulation{self.suffix}"
        with quiet_vendor():
            program = capture_model(model)
            rewrite_for_coremltools(program)
            names = [str(name) for name in program.graph_signature.user_inputs]
            delegates: list[bytes] = []

            def settle(blob: bytes) -> bytes:
                delegates.append(_settle(blob))
                return delegates[-1]

            lower_delegated(program, _partitioner(scheme, scheme.npu), COREML, path, settle)
            if len(delegates) == 1 and all(op.info.delegate is not None for op in read_program(path).ops):
                check_package(delegates[0], model, names, scheme.precision)
            write_emulation(model, scheme, emulation)
        return delegated_artifact(model, float_artifact, scheme, path, emulation, COREML, "coremltools")

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        return ExecuTorchExporter().store_sparse(artifact, directory)


def _partitioner(scheme: Scheme, npu: NeuralEngine) -> Partitioner:
    """For the oldest system that the device has had; Core ML chooses among CPU, GPU and Neural Engine itself."""
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    half = scheme.precision == "fp16"
    specs = CoreMLBackend.generate_compile_specs(
        compute_unit=coremltools.ComputeUnit.ALL,
        minimum_deployment_target=_deployment_target(npu.ios),
        compute_precision=coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32,
    )
    partitioner: Partitioner = CoreMLPartitioner(compile_specs=specs)
    return partitioner


def _deployment_target(ios: int) -> object:
    """The newest system that coremltools knows and that is not newer than the device's; ML programs begin at iOS 15."""
    import coremltools

    known = {int(t.name[3:]): t for t in coremltools.target if t.name.startswith("iOS")}
    return known[max((v for v in known if v <= max(ios, 15)), default=15)]


# --- the same bytes each time ----------------------------------------------------------------------------------------

#: Where coremltools notes the day of the conversion.
_DATE = "com.github.apple.coremltools.conversion_date"


def _settle(blob: bytes) -> bytes:
    """The delegate without the date, with its maps in order, and with identifiers that follow from its content.

    A device keeps compiled models by identifier, so identifiers must differ where the content does.
    """
    files = coreml_files(blob)
    files[COREML_MODEL] = _settled_model(files[COREML_MODEL])
    seed = _digest(files)
    metadata = json.loads(files[COREML_METADATA])
    metadata["identifier"] = f"executorch_{_identifier(seed, 'model')}"
    files[COREML_METADATA] = json.dumps(metadata).encode()
    files[COREML_MANIFEST] = _settled_manifest(files[COREML_MANIFEST], seed)
    return coreml_blob(files)


def _settled_model(content: bytes) -> bytes:
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString(content)
    model.description.metadata.userDefined.pop(_DATE, None)
    return bytes(model.SerializeToString(deterministic=True))


def _settled_manifest(content: bytes, seed: bytes) -> bytes:
    manifest = json.loads(content)
    entries = sorted(manifest["itemInfoEntries"].items(), key=lambda item: str(item[1]["path"]))
    names = {old: _identifier(seed, str(entry["path"])) for old, entry in entries}
    manifest["itemInfoEntries"] = {names[old]: entry for old, entry in entries}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    return json.dumps(manifest, indent=4).encode()


def _digest(files: Mapping[str, bytes]) -> bytes:
    """Of all contents but those that hold identifiers."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        if name not in (COREML_METADATA, COREML_MANIFEST):
            digest.update(name.encode() + hashlib.sha256(content).digest())
    return digest.digest()


def _identifier(seed: bytes, name: str) -> str:
    return str(uuid.UUID(bytes=hashlib.sha256(seed + name.encode()).digest()[:16], version=4))
