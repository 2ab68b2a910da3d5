"""ios/: a Swift package around the model. The app takes the model itself from the bundle, one folder up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.bundle.apps.base import AppTensor, float32_text, identifier, render, tensors, words
from edgeopt.bundle.apps.mobile import (
    MobileTensor,
    TextCode,
    TokenField,
    comment,
    golden_values,
    image_code,
    model_values,
    sizes,
    text_code,
    title,
    tool_version,
    uses_only,
)
from edgeopt.bundle.guide import PYTHON_PACKAGE
from edgeopt.bundle.manifest import Manifest, StoredArray
from edgeopt.types import DType, Format

KEYWORDS = words(
    """
    actor any as associatedtype async await break case catch class continue default defer deinit do else enum
    extension fallthrough false fileprivate for func guard if import in init inout internal is let nil none open
    operator precedencegroup private protocol public repeat rethrows return self some static struct subscript super
    switch throw throws true try type typealias var where while
    """
)
#: What the generated files define or use under these names, modules that they import included.
CLASS_NAMES = words(
    """
    Any AnyTensor Array Bool Bundle CGImage CompiledModel CoreGraphics CoreML CpuOptions Data DataType Dictionary
    Double ElementType Environment Error ExecuTorch FileTensor FixedWidthInteger Float Foundation GoldenTests Inputs
    Int Int16 Int32 Int64 Int8 Kernel LiteRT Model ModelError Module Number Options Outputs Pixels Prediction Protocol
    Runner Self Set String Tensor TensorSpec Type UInt16 UInt32 UInt8 URL Value Weights XCTest
    """
)
ELEMENTS: dict[DType, str] = {
    "float32": "Float",
    "float16": "Float",
    "int8": "Int8",
    "uint8": "UInt8",
    "int16": "Int16",
    "int32": "Int32",
    "int64": "Int64",
    "bool": "Bool",
}
#: An Int64 `$0` as each type.
CASTS = {
    "Float": "Float($0)",
    "Int8": "Int8(truncatingIfNeeded: $0)",
    "UInt8": "UInt8(truncatingIfNeeded: $0)",
    "Int16": "Int16(truncatingIfNeeded: $0)",
    "Int32": "Int32(truncatingIfNeeded: $0)",
    "Int64": "$0",
    "Bool": "$0 != 0",
}
#: The numbers of a text, and what pads them, as [Int64].
TOKENS: dict[TokenField, tuple[str, str]] = {
    "id": ("ids", "padID"),
    "mask": ("[Int64](repeating: 1, count: ids.count)", "0"),
    "type": ("types", "0"),
}
#: Types of the file that the runtime's Swift or Objective-C classes have.
SUPPORTED: dict[Format, frozenset[str]] = {
    "litert": frozenset(ELEMENTS),
    "onnx": frozenset({"float32", "int8", "uint8", "int32", "int64"}),
    "executorch": frozenset(ELEMENTS),
    "coreml": frozenset({"float32", "float16", "int32"}),
}


@dataclass(frozen=True, slots=True)
class Dependency:
    """How Swift Package Manager gets a runtime.

    Attributes:
        ios, macos: the oldest system that it runs on.
        package: a line for Package.swift with "{version}" where that counts; None for what is part of the system.
        products: of that package.
        takes_threads: its classes can be told how many threads to use.
        all_load: it must be linked whole.
    """

    ios: int
    macos: int
    package: str | None
    products: tuple[str, ...]
    takes_threads: bool
    all_load: bool = False


EXECUTORCH_PACKAGE = '.package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-{version}")'
DEPENDENCIES: dict[Format, Dependency] = {
    "coreml": Dependency(16, 13, None, (), takes_threads=False),
    "onnx": Dependency(
        15,
        12,
        '.package(url: "https://github.com/microsoft/onnxruntime-swift-package-manager", from: "1.20.0")',
        ('.product(name: "onnxruntime", package: "onnxruntime-swift-package-manager")',),
        takes_threads=True,
    ),
    "executorch": Dependency(
        17,
        12,
        EXECUTORCH_PACKAGE,
        tuple(
            f'.product(name: "{name}", package: "executorch")'
            for name in ("executorch", "backend_xnnpack", "kernels_optimized", "kernels_quantized")
        ),
        takes_threads=False,
        all_load=True,
    ),
    "litert": Dependency(
        15,
        12,
        '.package(url: "https://github.com/google-ai-edge/LiteRT.git", revision: "v{version}")',
        ('.product(name: "LiteRT", package: "LiteRT")',),
        takes_threads=True,
    ),
}


def files(manifest: Manifest) -> Mapping[str, str]:
    """Path in ios/ -> text; nothing where the runtime's classes for Swift lack the type of a tensor."""
    signature = manifest.model.signature
    inputs = tensors(signature.inputs, "camel", KEYWORDS, "input")
    outputs = tensors(signature.outputs, "camel", KEYWORDS, "output")
    if not uses_only((*inputs, *outputs), SUPPORTED[manifest.format]):
        return {}
    class_name = identifier(manifest.name, "pascal", CLASS_NAMES, "Net")
    # Not the class's own name: Swift can't tell a module from a type of the same name.
    module = f"{class_name}Package"
    image = image_code(manifest, inputs, float32_text)
    written = {
        "Package.swift": _package(manifest, module),
        f"Sources/{module}/{class_name}.swift": _model(manifest, class_name, inputs, outputs),
        f"Sources/{module}/Tensors.swift": render("ios", "Tensors.swift.j2"),
        f"Sources/{module}/Runner.swift": render("ios", f"Runner_{manifest.format}.swift.j2"),
    }
    if image is not None:
        written[f"Sources/{module}/Pixels.swift"] = render("ios", "Pixels.swift.j2", columns_first=image.columns_first)
    if manifest.golden:
        written[f"Tests/{module}Tests/GoldenTests.swift"] = render(
            "ios",
            "GoldenTests.swift.j2",
            module=module,
            model_text=swift_string(manifest.model.file),
            labels=bool(manifest.labels),
            **golden_values(manifest, class_name, inputs, _tensor, _stored),
        )
    return written


def swift_string(text: str) -> str:
    """A literal in ASCII for any text; half a surrogate pair, which Swift can't hold, becomes U+FFFD."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    made = []
    for character in text:
        if character in escapes:
            made.append(escapes[character])
        elif " " <= character <= "~":
            made.append(character)
        else:
            code = 0xFFFD if 0xD800 <= ord(character) < 0xE000 else ord(character)
            made.append(f"\\u{{{code:x}}}")
    return f'"{"".join(made)}"'


def _package(manifest: Manifest, module: str) -> str:
    dependency = DEPENDENCIES[manifest.format]
    products, version = dependency.products, tool_version(manifest, PYTHON_PACKAGE[manifest.format])
    if manifest.target_definition.accelerator == "neural-engine":
        products = tuple(product.replace("backend_xnnpack", "backend_coreml") for product in products)
    line = dependency.package
    if line is not None and "{version}" in line:
        # Without a known version, the branch that moves.
        line = line.replace("{version}", version) if version else line.rpartition(",")[0] + ', branch: "main")'
    proven = f"The model was proven with {PYTHON_PACKAGE[manifest.format]} {version}."
    return render(
        "ios",
        "Package.swift.j2",
        title=title(manifest),
        model_file=manifest.model.file,
        labels=bool(manifest.labels),
        note=proven if line is not None and version else None,
        module_text=swift_string(module),
        tests_text=swift_string(f"{module}Tests"),
        ios=dependency.ios,
        macos=dependency.macos,
        package_line=line,
        products=", ".join(products),
        all_load=dependency.all_load,
        golden=bool(manifest.golden),
    )


def _model(manifest: Manifest, class_name: str, inputs: tuple[AppTensor, ...], outputs: tuple[AppTensor, ...]) -> str:
    text = text_code(manifest, inputs)
    return render(
        "ios",
        "Model.swift.j2",
        model_file=manifest.model.file,
        threads=DEPENDENCIES[manifest.format].takes_threads,
        token_arrays=[] if text is None else _token_arrays(text),
        **model_values(manifest, class_name, inputs, outputs, float32_text, _tensor),
    )


def _token_arrays(text: TextCode) -> list[dict[str, str]]:
    """For each input, what fills it."""
    made = []
    for field, tensor in text.fields:
        values, padding = TOKENS[field]
        element = ELEMENTS[tensor.model_dtype]
        whole = f"padded({values}, {padding})" if text.pad_to else values
        cast = "" if element == "Int64" else f".map {{ {CASTS[element]} }}"
        made.append({"identifier": tensor.identifier, "array": f"{whole}{cast}"})
    return made


def _tensor(tensor: AppTensor, axis: int | None) -> MobileTensor:
    element = ELEMENTS[tensor.model_dtype]
    spec = [
        f"name: {swift_string(tensor.native_name)}",
        f"type: .{tensor.file_dtype}",
        f"shape: [{sizes(tensor.file_shape)}]",
    ]
    if tensor.permutation is not None:
        spec.append(f"permutation: [{sizes(tensor.permutation)}]")
    if tensor.scale is not None:
        spec += [f"scale: {float32_text(tensor.scale)}", f"zeroPoint: {tensor.zero_point}"]
    return MobileTensor(
        identifier=tensor.identifier,
        position=tensor.position,
        comment=comment(tensor),
        element=element,
        decoder={"Float": "floats", "Bool": "booleans"}.get(element, "integers"),
        spec=f"TensorSpec({', '.join(spec)})",
        axis=axis,
    )


def _stored(array: StoredArray) -> str:
    return f"{swift_string(array.file)}, [{', '.join(map(str, array.shape))}]"
