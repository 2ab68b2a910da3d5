"""Code for the app that the model goes into, generated from the manifest: one folder of the bundle per kind of app."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from edgeopt.bundle.manifest import Manifest
from edgeopt.types import NpuKind

#: Folder of the bundle -> module with a function `files(manifest) -> {path in that folder: text}`.
APPS: dict[str, str] = {
    "android": "edgeopt.bundle.apps.android",
    "ios": "edgeopt.bundle.apps.ios",
    "cpp": "edgeopt.bundle.apps.cpp",
    "python": "edgeopt.bundle.apps.python",
}

#: The apps in which a file for an accelerator can be opened with what is published for the app's language. What needs
#: a firmware build (Ethos-U, Edge TPU) or a runtime that the user must compile (VGF) has none.
ACCELERATED: dict[NpuKind, tuple[str, ...]] = {
    "hexagon": ("android",),
    "vulkan": ("android",),
    "neural-engine": ("ios", "python"),
    "openvino": ("python",),
}


class AppWriter(Protocol):
    """What a module in `APPS` offers."""

    def files(self, manifest: Manifest) -> Mapping[str, str]:
        """The same text for the same manifest; `manifest.files` is still empty when this is called."""
        ...


def apps_for(manifest: Manifest) -> tuple[str, ...]:
    """Names in `APPS` that make sense for a bundle, by its format, platform and accelerator."""
    target = manifest.target_definition
    if target.accelerator is not None:
        apps = ACCELERATED.get(target.accelerator, ())
    elif target.platform == "android":
        apps = ("android", "ios", "cpp", "python")  # files for CPU kernels run in the iOS builds of the runtimes, too
    elif target.platform == "ios":
        apps = ("ios", "cpp", "python")
    else:
        apps = ("cpp", "python")
    if manifest.format == "coreml":
        return tuple(app for app in apps if app in ("ios", "python"))
    if manifest.format == "executorch" and target.accelerator is not None:
        return tuple(app for app in apps if app != "python")  # its Python package has the CPU backends only
    return apps


def write_apps(manifest: Manifest, directory: Path) -> None:
    """Write every app that fits into its folder of the bundle. Generated code refers to the bundle's other files by
    relative paths, so the model and the golden vectors are there once."""
    for app in apps_for(manifest):
        writer = cast(AppWriter, import_module(APPS[app]))
        for name, text in writer.files(manifest).items():
            path = directory / app / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
