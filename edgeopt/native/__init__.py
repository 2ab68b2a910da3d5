"""C and C++ sources of ours that are built where they are needed: on this machine, on a device, by an app developer.

`runner/` is one program, edgeopt-runner, that is linked with one runtime; `runner/main.cpp` documents it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeopt.types import Format

SOURCES = Path(__file__).parent
RUNNER = SOURCES / "runner"
#: What every runner is made of, besides the implementation for its format. An app needs the implementation only.
PROGRAM = ("main.cpp", "serve.cpp", "once.cpp", "text.cpp")


@dataclass(frozen=True, slots=True)
class Implementation:
    """`edgeopt_model.hpp` for one runtime, and what the compiler and the linker need for it.

    Attributes:
        source: file in `RUNNER`.
        package: the Python package whose wheel brings the libraries, for aarch64 and x86-64 Linux.
        libraries: in the package's folder, as shell patterns. All must be linked, also where no symbol of theirs is
            used (-Wl,--no-as-needed): kernels and backends register themselves as they are loaded.
        soname: the name under which a program looks for its library at run time, where that is not the file's own; a
            link of that name must stand in a folder of its run path. None elsewhere.
        include: folders of headers in the package's folder. ONNX Runtime's one header, onnxruntime_c_api.h, is in no
            wheel; LiteRT's API is declared by us.
        definitions: for the preprocessor.
    """

    source: str
    package: str
    libraries: tuple[str, ...]
    soname: str | None = None
    include: tuple[str, ...] = ()
    definitions: tuple[str, ...] = ()


IMPLEMENTATIONS: Mapping[Format, Implementation] = {
    "litert": Implementation("litert.cpp", "ai_edge_litert", ("libLiteRt.so",)),
    "onnx": Implementation(
        "onnxruntime.cpp", "onnxruntime", ("capi/libonnxruntime.so.*",), soname="libonnxruntime.so.1"
    ),
    "executorch": Implementation(
        "executorch.cpp",
        "executorch",
        (
            "lib/libexecutorch.so",
            "lib/libexecutorch_threadpool.so",
            "lib/libexecutorch_backend_xnnpack.so",
            "lib/libexecutorch_kernels_optimized.so",
            "lib/libexecutorch_kernels_quantized.so",
        ),
        include=("include", "include/executorch/runtime/core/portable_type/c10"),
        definitions=("C10_USING_CUSTOM_GENERATED_MACROS",),
    ),
}
