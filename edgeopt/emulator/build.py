"""Builds the runners, the plugin and the CPU probe of an installation from the sources in edgeopt/native."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgeopt.emulator.toolchain import CrossCompiler, Loader, build_plugin
from edgeopt.emulator.unpacking import linked
from edgeopt.native import IMPLEMENTATIONS, PROGRAM, RUNNER, SOURCES
from edgeopt.progress import Progress
from edgeopt.types import Format

PROBE = "hwcap"


def build(tree: Path, tools: Path, progress: Progress) -> None:
    """Fill `tree/bin` and write `tree/counter.so`. Raises MissingError where something can't be built."""
    compiler = CrossCompiler(tools / "compiler", tree / "sysroot", Loader.of(tree / "counting", tools / "compiler"))
    header_of_onnxruntime = tools / "headers/usr/include/onnxruntime"

    def compiled(source: Path, include: tuple[Path, ...] = (), definitions: tuple[str, ...] = ()) -> Path:
        target = tools / f"{source.stem}.o"
        compiler.compile(source, target, include, definitions)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The runtimes first: they take longest, and no processor should wait for the last.
        runtimes = {
            format_: pool.submit(
                compiled,
                RUNNER / runtime.source,
                (header_of_onnxruntime, *(_package(tree, format_) / folder for folder in runtime.include)),
                runtime.definitions,
            )
            for format_, runtime in IMPLEMENTATIONS.items()
        }
        program = [pool.submit(compiled, RUNNER / name) for name in PROGRAM]
        probe = pool.submit(compiled, SOURCES / f"{PROBE}.cpp")
        everything = (*runtimes.values(), *program, probe)
        for future in progress.track(everything, "Compiling the runners", len(everything)):
            future.result()
    (tree / "bin").mkdir()
    compiler.link([probe.result()], tree / "bin" / PROBE, ())
    for format_, runtime_object in runtimes.items():
        libraries = linked(tree / "runtimes" / format_, format_)
        compiler.link(
            [*(future.result() for future in program), runtime_object.result()],
            tree / "bin" / f"edgeopt-runner-{format_}",
            libraries,
            f"$ORIGIN/../{libraries[0].parent.relative_to(tree)}",
        )
    progress.step("Compiling the counting plugin")
    build_plugin(SOURCES / "counter.c", tree / "counter.so")


def _package(tree: Path, format_: Format) -> Path:
    return tree / "runtimes" / format_ / IMPLEMENTATIONS[format_].package
