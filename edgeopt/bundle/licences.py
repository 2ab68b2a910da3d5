"""LICENCES.md: under which terms a bundle's parts may be passed on."""

from __future__ import annotations

from dataclasses import replace

from edgeopt.bundle.licences_metadata import licence_text
from edgeopt.bundle.manifest import Manifest
from edgeopt.bundle.sbom_packages import Package, building_packages, generated_package, runtime_package

LICENCES = "LICENCES.md"
_CODE = "code for the app by edgeopt"


def licences(manifest: Manifest) -> str:
    """The text of LICENCES.md, the same for the same manifest and installed packages.

    What a package's licence is comes from the package's own metadata as installed where the model was made.
    """
    runtime, generated = runtime_package(manifest), generated_package(manifest)
    lines = [
        f"# Licences: {_cell(manifest.name)} for {_cell(manifest.target)}",
        "",
        "No legal advice: what the parts say of themselves. `sbom.cdx.json` has the same for programs.",
        "",
        "## In the app",
        "",
        "| part | version | licence |",
        "|---|---|---|",
        f"| the model, `{_cell(manifest.model.file)}` | | {_cell(_model_licence(manifest))} |",
        _row(runtime),
        *([_row(replace(generated, name=_CODE))] if generated is not None else []),
        "",
        *_notes(manifest),
        "## Used to make it, not part of the app",
        "",
        "| package | version | licence |",
        "|---|---|---|",
        *(_row(package) for package in building_packages(manifest)),
        "",
    ]
    for text, parts in _texts(runtime, generated).items():
        lines += [f"## Licence text of {' and '.join(parts)}", "", *_quoted(text), ""]
    return "\n".join(lines)


def _texts(runtime: Package, generated: Package | None) -> dict[str, list[str]]:
    """Licence text -> whose it is; two may share one."""
    packages = {runtime.name: runtime} | ({_CODE: generated} if generated is not None else {})
    texts: dict[str, list[str]] = {}
    for name, package in packages.items():
        text = licence_text(package.python_package) if package.python_package is not None else ""
        if text:
            texts.setdefault(text, []).append(name)
    return texts


def _notes(manifest: Manifest) -> list[str]:
    data = (
        "`golden/` holds samples of the data that the model was tested with, for tests, not for the app: whether they "
        "may be passed on is up to that data's terms."
    )
    notes = [data]
    if manifest.format != "coreml":
        notes.insert(0, "The runtime's binaries carry code of third parties, too; its distribution has their notices.")
    if manifest.licence is None:
        notes.append(
            "The model's licence is for whoever trained it to declare: `licence` in edgeopt.toml, an SPDX expression. "
            "Until then nobody else may assume any."
        )
    if manifest.target_definition.accelerator == "hexagon":
        notes.append("The QNN libraries that the runtime loads are Qualcomm's, under Qualcomm's own terms.")
    if manifest.target_definition.accelerator == "edge-tpu":
        notes.append("The device also needs the Edge TPU runtime (libedgetpu), which has a licence of its own.")
    return [line for note in notes for line in (note, "")]


def _model_licence(manifest: Manifest) -> str:
    return manifest.licence if manifest.licence is not None else "unknown: not declared"


def _row(package: Package) -> str:
    return f"| {_cell(package.name)} | {_cell(package.version or '')} | {_cell(package.licence.name)} |"


def _quoted(text: str) -> list[str]:
    """Indented, so that Markdown shows it as it is."""
    return [f"    {line}".rstrip() for line in text.splitlines()]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
