"""sbom.cdx.json: what a bundle consists of and what made it, as CycloneDX 1.6 JSON (https://cyclonedx.org)."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import fields

from edgeopt.bundle.licences_metadata import Licence, spdx
from edgeopt.bundle.manifest import Manifest, ModelFile
from edgeopt.bundle.sbom_packages import Package, building_packages, generated_package, runtime_package
from edgeopt.json_data import Plain, dumps
from edgeopt.types import SignatureTensor

SBOM = "sbom.cdx.json"
_SERIAL = uuid.UUID("5a4b2d0e-6a1c-5e0f-9d3a-0e8d3b5f7c11")
_MODEL, _RUNTIME, _CODE, _TWIN = "model", "runtime", "app-code", "float-twin"
#: What our properties begin with.
_PREFIX = "edgeopt:"


def sbom(manifest: Manifest) -> str:
    """The text of sbom.cdx.json, the same for the same manifest and installed packages: it holds no time, and its
    serial number comes from its content.

    `manifest.files` must list the model's files, for their hashes; it need not be complete.
    """
    components = [_package(runtime_package(manifest), "required", _RUNTIME)]
    generated = generated_package(manifest)
    if generated is not None:
        description = "Code for the app that edgeopt wrote, to be built in or not."
        components.append(_package(generated, "optional", _CODE) | {"description": description})
    if manifest.float_twin is not None:
        components.append(_model(manifest, manifest.float_twin, _TWIN, "for comparison only") | {"scope": "excluded"})
    document: dict[str, Plain] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": _shipped_model(manifest),
            "tools": {"components": [_package(package) for package in building_packages(manifest)]},
        },
        "components": list(components),
        "dependencies": [{"ref": _MODEL, "dependsOn": [_RUNTIME]}, {"ref": _RUNTIME}],
    }
    digest = hashlib.sha256(dumps(document).encode()).hexdigest()
    return dumps({**document, "serialNumber": f"urn:uuid:{uuid.uuid5(_SERIAL, digest)}"})


def _shipped_model(manifest: Manifest) -> dict[str, Plain]:
    licence = _declared(manifest.licence)
    ancestor: dict[str, Plain] = {
        "type": "machine-learning-model",
        "name": manifest.name,
        "description": "The trained model: the code and weights that were loaded.",
        "hashes": [{"alg": "SHA-256", "content": manifest.source_sha256}],
        "licenses": licence,
    }
    return {
        **_model(manifest, manifest.model, _MODEL, f"{manifest.precision} for {manifest.target}"),
        "licenses": licence,
        "pedigree": {"ancestors": [ancestor]},
        "properties": [{"name": name, "value": value} for name, value in _properties(manifest)],
    }


def _model(manifest: Manifest, model: ModelFile, reference: str, description: str) -> dict[str, Plain]:
    """A model as a component: hashed as a whole where it is one file, file by file where it is a directory."""
    signature = model.signature
    component: dict[str, Plain] = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": f"{manifest.name}/{model.file}",
        "description": description,
        "modelCard": {
            "modelParameters": {
                "inputs": [{"format": _tensor(tensor)} for tensor in signature.inputs],
                "outputs": [{"format": _tensor(tensor)} for tensor in signature.outputs],
            }
        },
    }
    entry = manifest.files.get(model.file)
    if entry is not None:
        return {**component, "hashes": [{"alg": "SHA-256", "content": entry.sha256}]}
    inner = {name: entry for name, entry in sorted(manifest.files.items()) if name.startswith(f"{model.file}/")}
    return {
        **component,
        "components": [
            {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": entry.sha256}]}
            for name, entry in inner.items()
        ],
    }


def _tensor(tensor: SignatureTensor) -> str:
    """ "image: float32[1,3,224,224]"; with the scale and zero point where it is quantized."""
    text = f"{tensor.native_name}: {tensor.dtype}[{','.join(str(size) for size in tensor.shape)}]"
    if tensor.quantization is not None:
        scale, zero = tensor.quantization.scale[0], tensor.quantization.zero_point[0]
        text += f", scale {scale!r}, zero point {zero}"
    return text


def _properties(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """How it was quantized, and every step that led there."""
    yield f"{_PREFIX}target", manifest.target
    yield f"{_PREFIX}device", manifest.device
    yield f"{_PREFIX}status", manifest.status
    yield f"{_PREFIX}format", manifest.format
    scheme = manifest.target_definition.scheme
    for field in fields(scheme):
        value = getattr(scheme, field.name)
        if isinstance(value, str | bool | int):
            yield f"{_PREFIX}quantization:{field.name}", _text(value)
    for number, step in enumerate(manifest.history, start=1):
        yield f"{_PREFIX}step:{number}", step.step
        for name, setting in sorted(step.config.items()):
            yield f"{_PREFIX}step:{number}:{name}", _text(setting)


def _text(value: str | int | float | bool | None) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
    return str(value)


def _package(package: Package, scope: str | None = None, reference: str | None = None) -> dict[str, Plain]:
    component: dict[str, Plain] = {"type": "library", "name": package.name, "licenses": _licences(package.licence)}
    optional = {"version": package.version, "purl": package.purl, "scope": scope, "bom-ref": reference}
    return component | {key: value for key, value in optional.items() if value is not None}


def _declared(licence: str | None) -> list[Plain]:
    if licence is None:
        return _licences(Licence(None, "unknown: not declared"))
    return _licences(Licence(spdx(licence), licence))


def _licences(licence: Licence) -> list[Plain]:
    if licence.expression is not None:
        return [{"expression": licence.expression}]
    return [{"license": {"name": licence.name}}]
