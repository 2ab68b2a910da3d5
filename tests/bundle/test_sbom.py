"""What a bundle says it consists of, and under which terms."""

from __future__ import annotations

import email
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import Distribution, version
from pathlib import Path

import pytest

from edgeopt.bundle import licences_metadata, open_bundle
from edgeopt.bundle.licences import licences
from edgeopt.bundle.licences_metadata import UNKNOWN, Licence, licence_of, licence_text
from edgeopt.bundle.manifest import FileEntry, Manifest
from edgeopt.bundle.sbom import sbom
from edgeopt.bundle.sbom_packages import building_packages, runtime_package
from edgeopt.targets import load_target
from edgeopt.types import Format, StepRecord

Make = Callable[..., Path]


@pytest.fixture
def manifest(small_bundle: Make) -> Manifest:
    return open_bundle(small_bundle("b")).manifest


def schema_problems(document: object) -> list[str]:
    """What the official JSON schema of CycloneDX 1.6 has against a document."""
    schema = pytest.importorskip("cyclonedx.schema", reason="needs cyclonedx-python-lib for its schema files")
    from jsonschema import Draft7Validator
    from referencing import Registry, Resource

    folder = Path(schema.__file__).parent / "_res"
    names = ("bom-1.6", "spdx", "jsf-0.82")
    schemas = {name: json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text()) for name in names}
    registry: Registry[object] = Registry().with_resources(
        (f"http://cyclonedx.org/schema/{name}.schema.json", Resource.from_contents(content))
        for name, content in schemas.items()
    )
    return [error.message for error in Draft7Validator(schemas["bom-1.6"], registry=registry).iter_errors(document)]


def test_the_model_its_source_and_how_it_was_quantized(manifest: Manifest) -> None:
    document = json.loads(sbom(manifest))
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    model = document["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "SHA-256", "content": manifest.files["model.onnx"].sha256}]
    assert model["pedigree"]["ancestors"][0]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert model["modelCard"]["modelParameters"]["inputs"] == [{"format": "x: int8[1,4], scale 0.5, zero point 3"}]
    properties = {entry["name"]: entry["value"] for entry in model["properties"]}
    assert properties["edgeopt:target"] == "android-onnx-int8"
    assert properties["edgeopt:quantization:precision"] == "w8a8"
    assert properties["edgeopt:quantization:weight_granularity"] == "per-channel"
    assert properties["edgeopt:step:1"] == "quantize"
    assert properties["edgeopt:step:1:samples"] == "8"
    assert properties["edgeopt:step:1:symmetric"] == "true"


def test_what_the_device_needs_and_what_made_it(manifest: Manifest) -> None:
    document = json.loads(sbom(manifest))
    runtime, code = document["components"]
    assert runtime["purl"] == "pkg:maven/com.microsoft.onnxruntime/onnxruntime-android@1.31.1"
    assert (runtime["scope"], runtime["licenses"]) == ("required", [{"expression": "MIT"}])
    assert (code["name"], code["licenses"]) == ("edgeopt", [{"expression": "Apache-2.0"}])
    assert document["dependencies"][0] == {"ref": "model", "dependsOn": ["runtime"]}
    tools = {tool["name"]: tool for tool in document["metadata"]["tools"]["components"]}
    assert list(tools) == ["edgeopt", "onnxruntime", "torch"]
    assert tools["torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"


def test_it_holds_no_time_and_its_serial_number_tells_content_apart(manifest: Manifest) -> None:
    first = sbom(manifest)
    assert first == sbom(manifest)
    assert "timestamp" not in first
    other = sbom(replace(manifest, source_sha256="cd" * 32))
    assert json.loads(first)["serialNumber"] != json.loads(other)["serialNumber"]
    assert json.loads(first)["serialNumber"].startswith("urn:uuid:")


def variants(manifest: Manifest) -> dict[str, Manifest]:
    entry = FileEntry("0" * 64, 1)

    def aimed(target: str, format_: Format) -> Manifest:
        definition = load_target(target)
        return replace(manifest, target=target, target_definition=definition, format=format_)

    package = replace(manifest.model, file="model.mlpackage")
    parts = {"model.mlpackage/Manifest.json": entry, "model.mlpackage/Data/weights.bin": entry}
    return {
        "as it is": manifest,
        "licence": replace(manifest, licence="mit"),
        "own licence": replace(manifest, licence="ours, all rights reserved"),
        "twin": replace(manifest, float_twin=manifest.model),
        "directory": replace(aimed("ios-coreml-int8", "coreml"), model=package, files=parts),
        "linux": aimed("linux-arm64-int8", "litert"),
        "ethos": aimed("ethosu55-int8", "litert"),
        "edge tpu": aimed("edgetpu-int8", "litert"),
        "qualcomm": aimed("qualcomm-int8", "onnx"),
        "vulkan": replace(aimed("android-vulkan-fp16", "executorch"), tools={"executorch": "1.5.1"}),
        "ios": replace(aimed("ios-executorch-coreml", "executorch"), tools={"executorch": "1.5.1"}),
        "openvino": replace(aimed("openvino-int8", "onnx"), tools={"openvino": "2026.4.1"}),
        "unknown tools": replace(manifest, tools={"no such package": "1"}),
    }


def test_it_is_valid_for_bundles_of_every_kind(manifest: Manifest) -> None:
    for name, variant in variants(manifest).items():
        assert schema_problems(json.loads(sbom(variant))) == [], name


def test_purls_are_canonical(manifest: Manifest) -> None:
    packageurl = pytest.importorskip("packageurl", reason="needs packageurl-python")
    for variant in variants(manifest).values():
        for package in (runtime_package(variant), *building_packages(variant)):
            if package.purl is not None:
                assert packageurl.PackageURL.from_string(package.purl).to_string() == package.purl


def test_runtimes(manifest: Manifest) -> None:
    purls = {name: runtime_package(variant).purl for name, variant in variants(manifest).items()}
    assert purls["linux"] == "pkg:pypi/ai-edge-litert"
    assert purls["openvino"] == "pkg:pypi/openvino@2026.4.1"
    assert purls["qualcomm"] == "pkg:maven/com.microsoft.onnxruntime/onnxruntime-android-qnn@1.31.1"
    # Regression: the one had no package, the other one that no iPhone can use.
    assert purls["vulkan"] == "pkg:maven/org.pytorch/executorch-android-vulkan@1.5.1"
    assert purls["ios"] == "pkg:swift/github.com/pytorch/executorch@1.5.1"
    assert purls["directory"] is purls["ethos"] is None
    ethos = replace(variants(manifest)["ethos"], tools={"ai-edge-litert": "2.3.0"})
    runtime = runtime_package(ethos)
    assert (runtime.name, runtime.version) == ("TensorFlow Lite for Microcontrollers", None)
    document = json.loads(sbom(variants(manifest)["directory"]))
    assert document["components"][0]["name"] == "Core ML"
    inner = document["metadata"]["component"]["components"]
    assert [part["name"] for part in inner] == ["model.mlpackage/Data/weights.bin", "model.mlpackage/Manifest.json"]


def test_declared_licences(manifest: Manifest) -> None:
    found = {
        name: json.loads(sbom(variant))["metadata"]["component"]["licenses"]
        for name, variant in variants(manifest).items()
    }
    assert found["as it is"] == [{"license": {"name": "unknown: not declared"}}]
    assert found["licence"] == [{"expression": "MIT"}]
    assert found["own licence"] == [{"license": {"name": "ours, all rights reserved"}}]


def test_the_list_for_people(manifest: Manifest) -> None:
    text = licences(manifest)
    assert text == licences(manifest)
    assert "| the model, `model.onnx` | | unknown: not declared |" in text
    assert "| com.microsoft.onnxruntime:onnxruntime-android | 1.31.1 | MIT |" in text
    assert "    Permission is hereby granted, free of charge" in text
    assert "`licence` in edgeopt.toml" in text
    declared = licences(replace(manifest, licence="MIT | mine\n"))
    assert "| the model, `model.onnx` | | MIT \\| mine |" in declared
    assert "edgeopt.toml" not in declared
    assert "Qualcomm's own terms" in licences(variants(manifest)["qualcomm"])
    assert "libedgetpu" in licences(variants(manifest)["edge tpu"])
    assert "code of third parties" not in licences(variants(manifest)["directory"])


def test_code_for_the_app_has_a_licence_too(manifest: Manifest) -> None:
    """Regression: it was in no list, although it goes into the app."""
    text = licences(manifest)
    assert f"| code for the app by edgeopt | {version('edgeopt')} | Apache-2.0 |" in text
    assert "## Licence text of code for the app by edgeopt" in text
    shared = licences(replace(manifest, format="litert"))
    assert shared.count("Version 2.0, January 2004") == 1
    assert "litert:litert and code for the app by edgeopt" in shared
    without = variants(manifest)["ethos"]
    assert "code for the app" not in licences(without)
    unpacked = replace(without, history=(StepRecord("sparsify", {"zeros": 0.8}),))
    assert "code for the app" in licences(unpacked)


# --- what packages say of themselves ---------------------------------------------------------------------------------

BSD = "Redistribution and use in source and binary forms, with or without modification, are permitted provided ..."


class Package(Distribution):
    def __init__(self, metadata: str, text: str) -> None:
        self._metadata, self._text = metadata, text

    def read_text(self, filename: str) -> str | None:
        return {"METADATA": f"Metadata-Version: 2.1\nName: p\nVersion: 1\n{self._metadata}", "LICENSE": self._text}.get(
            filename
        )

    def locate_file(self, path: object) -> Path:
        return Path(str(path))


@pytest.mark.parametrize(
    ("metadata", "text", "expected"),
    [
        ("License-Expression: Apache-2.0 OR MIT", "", "Apache-2.0 OR MIT"),
        ("License: MIT License", "", "MIT"),
        ("License: Apache 2.0 License", "", "Apache-2.0"),
        ("Classifier: License :: OSI Approved :: Apache Software License", "", "Apache-2.0"),
        ("License: BSD", f"Copyright\n{BSD}\nNeither the name of", "BSD-3-Clause"),
        ("License: BSD", BSD, "BSD-2-Clause"),
        ("Summary: none", f"Copyright\n\n{BSD} Neither the\nname of", "BSD-3-Clause"),
        ("Summary: none", "Apache License\n    Version 2.0, January 2004", "Apache-2.0"),
        ("License: Python Software Foundation License", f"{'x' * 900}\n{BSD}", None),
        ("License: BSD", "", None),
        ("Summary: none", "", None),
    ],
)
def test_licences_of_packages(monkeypatch: pytest.MonkeyPatch, metadata: str, text: str, expected: str | None) -> None:
    def find(name: str) -> Package:
        assert name == "p"
        return Package(metadata, text)

    monkeypatch.setattr(licences_metadata, "distribution", find)
    monkeypatch.setattr(licences_metadata, "_texts", lambda found: found.read_text("LICENSE"))
    assert email.message_from_string(metadata).keys()
    assert licence_of("p").expression == expected


def test_packages_that_are_not_here() -> None:
    assert licence_of("no such package") == UNKNOWN == Licence(None, "unknown")


def test_a_package_that_is_here() -> None:
    found = licence_of("onnxruntime")
    assert found.expression == "MIT"
    assert licence_text("onnxruntime").startswith("MIT License")
    assert licence_text("no such package") == ""
