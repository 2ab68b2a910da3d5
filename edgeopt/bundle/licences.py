"""LICENCES.md: under which terms a bundle's parts may be passed on."""

from __future__ import annotations

from edgeopt.bundle.licences_metadata import licence_text
from edgeopt.bundle.manifest import Manifest
from edgeopt.bundle.sbom_packages import Package, building_packages, runtime_package

LICENCES = "LICENCES.md"


def licences(manifest: Manifest) -> str:
    """The text of LICENCES.md, the same for the same manifest and installed packages.

    What a package's licence is comes from the package's own metadata as installed where the model was made.
    """
    runtime = runtime_package(manifest)
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
        "",
        *_notes(manifest),
        "## Used to make it, not part of the app",
        "",
        "| package | version | licence |",
        "|---|---|---|",
        *(_row(package) for package in building_packages(manifest)),
        "",
    ]
    text = licence_text(runtime.python_package) if runtime.python_package is not None else ""
    if text:
        lines += [f"## Licence text of {runtime.name}", "", *_quoted(text), ""]
    return "\n".join(lines)


def _notes(manifest: Manifest) -> list[str]:
    data = (
        "`golden/` holds samples of the data that the model was tested with, for tests, not for the app: whether they "
        "may be passed on is up to that data's terms."
    )
    notes = ["The runtime's binaries carry code of third parties, too; its distribution has their notices.", data]
    if manifest.licence is None:
        notes.append(
            "The model's licence is for whoever trained it to declare: `licence` in edgeopt.toml, an SPDX expression. "
            "Until then nobody else may assume any."
        )
    if manifest.target_definition.accelerator == "hexagon":
        notes.append("The QNN libraries that the runtime loads are Qualcomm's, under Qualcomm's own terms.")
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
