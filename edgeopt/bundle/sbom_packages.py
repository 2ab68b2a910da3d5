"""Which packages a bundle needs on the device, and which made it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from urllib.parse import quote

from edgeopt.bundle.apps import apps_for
from edgeopt.bundle.apps.android import ACCELERATED
from edgeopt.bundle.guide import GRADLE, PYTHON_PACKAGE, RUNTIME_TITLE
from edgeopt.bundle.licences_metadata import Licence, licence_of
from edgeopt.bundle.manifest import Manifest
from edgeopt.bundle.sparse_storage import is_sparse

#: Accelerators whose runtime is built from source for the board, so that no registry has it.
_BUILT = frozenset({"ethos-u55", "ethos-u65", "ethos-u85", "vgf"})
_MICROCONTROLLERS = "TensorFlow Lite for Microcontrollers"
#: Swift packages are named by where they are.
_SWIFT = {"executorch": "github.com/pytorch/executorch"}
_SYSTEM_LICENCE = Licence(None, "part of the operating system")


@dataclass(frozen=True, slots=True)
class Package:
    """Attributes:
    version: that the model was proven with; None when that was another one, or none.
    purl: package URL (https://github.com/package-url/purl-spec); None for what no registry has.
    python_package: whose metadata tells the licence; None where none does.
    """

    name: str
    version: str | None
    purl: str | None
    licence: Licence
    python_package: str | None


def runtime_package(manifest: Manifest) -> Package:
    """What opens the model file on the device.

    Its licence is read from the Python package of the same project, in the version that the model was proven with.
    """
    format_, accelerator = manifest.format, manifest.target_definition.accelerator
    if format_ == "coreml":
        return Package(RUNTIME_TITLE[format_], None, None, _SYSTEM_LICENCE, None)
    package = "openvino" if accelerator == "openvino" else PYTHON_PACKAGE[format_]
    proven = manifest.tools.get(package)
    licence = licence_of(package)
    if accelerator is not None and accelerator in _BUILT:
        if format_ == "litert":  # proven in LiteRT, whose versions are others and whose licence is the same
            return Package(_MICROCONTROLLERS, None, None, licence, package)
        return Package(RUNTIME_TITLE[format_], proven, None, licence, package)
    if manifest.target_definition.platform in ("android", "qualcomm"):
        gradle = GRADLE[format_] if accelerator is None else ACCELERATED.get((format_, accelerator))
        if gradle is None:
            return Package(RUNTIME_TITLE[format_], proven, None, licence, package)
        group, _, name = gradle.partition(":")
        return Package(f"{group}:{name}", proven, _purl("maven", f"{group}/{name}", proven), licence, package)
    if manifest.target_definition.platform == "ios" and format_ in _SWIFT:
        return Package(_SWIFT[format_], proven, _purl("swift", _SWIFT[format_], proven), licence, package)
    return Package(package, proven, _pypi(package, proven), licence, package)


def generated_package(manifest: Manifest) -> Package | None:
    """The code for the app that edgeopt wrote into the bundle; None where there is none."""
    if not (apps_for(manifest) or is_sparse(manifest.history)):  # a sparse model comes with what unpacks it
        return None
    return Package(
        "edgeopt", version("edgeopt"), _pypi("edgeopt", version("edgeopt")), licence_of("edgeopt"), "edgeopt"
    )


def building_packages(manifest: Manifest) -> tuple[Package, ...]:
    """What made the model file, edgeopt first; none of it is needed on the device."""
    tools = {name: tool for name, tool in sorted(manifest.tools.items()) if name != "edgeopt"}
    return tuple(
        Package(name, tool, _pypi(name, tool), licence_of(name), name)
        for name, tool in {"edgeopt": version("edgeopt"), **tools}.items()
    )


def _pypi(name: str, version_: str | None) -> str:
    return _purl("pypi", name.lower().replace("_", "-"), version_)


def _purl(kind: str, name: str, version_: str | None) -> str:
    tail = f"@{quote(version_, safe='')}" if version_ is not None else ""
    return f"pkg:{kind}/{quote(name)}{tail}"
