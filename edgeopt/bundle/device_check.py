"""The bundle's `device/`: checks the model on a phone or board, without edgeopt. Documented in docs/device-check.md."""

from __future__ import annotations

import shutil
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

from edgeopt.bundle.manifest import Manifest
from edgeopt.native import IMPLEMENTATIONS, PROGRAM, RUNNER

FOLDER = "device"
_APP = "cpp"
#: Sources of the runner that every format needs, besides the program's own.
_HEADERS = ("checks.hpp", "edgeopt_model.hpp", "mark.hpp", "program.hpp")
_BUILD = "build.sh"
#: Where a runtime's headers come from; LiteRT's API is declared in a header of ours.
_INCLUDE = {
    "litert": "none are needed",
    "onnx": "onnxruntime_c_api.h",
    "executorch": "those of ExecuTorch, with --define C10_USING_CUSTOM_GENERATED_MACROS",
}


def is_checkable(manifest: Manifest) -> bool:
    """Whether the model runs on a device's CPU with a runtime that we have a runner for."""
    return (
        manifest.format in IMPLEMENTATIONS
        and manifest.model.emulation is None
        and manifest.target_definition.accelerator is None
    )


def write_device_check(manifest: Manifest, directory: Path) -> None:
    """Write `device/` into a bundle's directory: the check, and the runner's sources with a script that builds them.

    What the bundle's C++ app holds already is taken from there, so this comes after `write_apps`. Writes nothing for
    models that run on an accelerator or on Core ML. The same manifest gives the same bytes.
    """
    if not is_checkable(manifest):
        return
    folder = directory / FOLDER
    _copy(_templates() / "devicecheck", folder / "devicecheck")
    (folder / "check").write_bytes((_templates() / "check").read_bytes())
    (folder / "check").chmod(0o755)
    _write_runner(manifest, folder / "runner", directory / _APP)


def _templates() -> Traversable:
    return resources.files("edgeopt.bundle").joinpath("templates", "device")


def _copy(source: Traversable, folder: Path) -> None:
    """The files of a package, without what Python caches beside them."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())


def _write_runner(manifest: Manifest, folder: Path, app: Path) -> None:
    implementation = IMPLEMENTATIONS[manifest.format]
    folder.mkdir(parents=True)
    own = [path.name for path in RUNNER.glob(f"{PurePosixPath(implementation.source).stem}_*.hpp")]
    for name in (*PROGRAM, implementation.source, *_HEADERS, *own):
        if not (app / name).is_file():
            shutil.copyfile(RUNNER / name, folder / name)
    patterns = [PurePosixPath(library).name for library in implementation.libraries]
    text = (_templates() / _BUILD).read_text(encoding="utf-8")
    # A wheel has libonnxruntime.so.1.31.1, an Android archive libonnxruntime.so.
    globs = [pattern.replace(".so.*", ".so*") for pattern in patterns]
    marks = {
        "@LIBRARIES@": " ".join(globs),
        "@PATTERNS@": " ".join(f"'{pattern}'" for pattern in globs),
        "@HEADERS@": _INCLUDE[manifest.format],
        "@SOURCE@": implementation.source,
        "@SONAME@": implementation.soname or "",
    }
    for mark, value in marks.items():
        text = text.replace(mark, value)
    (folder / _BUILD).write_text(text, encoding="utf-8")
