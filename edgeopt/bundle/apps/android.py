"""android/: a Gradle library module around the model, in Kotlin. It takes the model from the bundle, one folder up."""

from __future__ import annotations

from collections.abc import Mapping

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
from edgeopt.bundle.guide import GRADLE, PYTHON_PACKAGE
from edgeopt.bundle.manifest import Manifest, StoredArray
from edgeopt.types import DType, Format, NpuKind

KEYWORDS = words(
    """
    as break class continue do else false for fun if in interface is null object package return super this throw true
    try typealias typeof val var when while
    """
)
#: In a package's name Java's count too: Android generates Java classes there.
PACKAGE_KEYWORDS = KEYWORDS | words(
    """
    abstract assert boolean byte case catch char const default double enum extends final finally float goto implements
    import instanceof int long native new private protected public short static strictfp switch synchronized throws
    transient void volatile
    """
)
#: What the generated files define or use under these names.
CLASS_NAMES = words(
    """
    Any Array Assets AutoCloseable Bitmap Boolean BooleanArray Byte ByteArray ByteBuffer Context Double DoubleArray
    ElementType File FileTensor Float FloatArray GoldenTest Inputs Int IntArray Kernel List Long LongArray Numbers
    Outputs Pixels Prediction R Runner Short ShortArray Stored String Tensor TensorSpec Weights
    """
)
ARRAYS: dict[DType, str] = {
    "float32": "FloatArray",
    "float16": "FloatArray",
    "int8": "ByteArray",
    "uint8": "ByteArray",
    "int16": "ShortArray",
    "int32": "IntArray",
    "int64": "LongArray",
    "bool": "BooleanArray",
}
DECODERS = {
    "FloatArray": "floats",
    "ByteArray": "bytes",
    "ShortArray": "shorts",
    "IntArray": "ints",
    "LongArray": "longs",
    "BooleanArray": "booleans",
}
#: A number of type Long as an element of each array.
CASTS = {
    "FloatArray": "{}.toFloat()",
    "ByteArray": "{}.toByte()",
    "ShortArray": "{}.toShort()",
    "IntArray": "{}.toInt()",
    "LongArray": "{}",
    "BooleanArray": "{} != 0L",
}
#: The number of type Long at a place `it`: of a text that is padded, and of one that is not.
PADDED_TOKENS: dict[TokenField, str] = {"id": "id(it)", "mask": "mask(it)", "type": "type(it)"}
TOKENS: dict[TokenField, str] = {"id": "ids[it]", "mask": "1L", "type": "typeIds[it]"}
#: Types of the file that the runtime's Java classes have.
SUPPORTED: dict[Format, frozenset[str]] = {
    "litert": frozenset({"float32", "int8", "uint8", "int16", "int32", "int64", "bool"}),
    "onnx": frozenset(ARRAYS),
    "executorch": frozenset({"float32", "float16", "int8", "uint8", "int32", "int64"}),
}
#: Maven packages with an accelerator's backend, in place of those for the CPU.
ACCELERATED: dict[tuple[Format, NpuKind], str] = {
    ("onnx", "hexagon"): "com.microsoft.onnxruntime:onnxruntime-android-qnn",
    ("executorch", "hexagon"): "org.pytorch:executorch-android-qnn",
    ("executorch", "vulkan"): "org.pytorch:executorch-android-vulkan",
}


def files(manifest: Manifest) -> Mapping[str, str]:
    """Path in android/ -> text; nothing where no published Android package of the runtime can open the file."""
    signature = manifest.model.signature
    inputs = tensors(signature.inputs, "camel", KEYWORDS, "input")
    outputs = tensors(signature.outputs, "camel", KEYWORDS, "output")
    dependency = _dependency(manifest)
    if dependency is None or not uses_only((*inputs, *outputs), SUPPORTED[manifest.format]):
        return {}
    name = identifier(manifest.name, "snake", PACKAGE_KEYWORDS, "model")
    package = f"edgeopt.{name}"
    class_name = identifier(manifest.name, "pascal", CLASS_NAMES, "Model")
    image = image_code(manifest, inputs, _number)
    source = f"src/main/kotlin/{package.replace('.', '/')}"
    written = {
        "build.gradle.kts": _build_script(manifest, name, package, dependency),
        "src/main/AndroidManifest.xml": render("android", "AndroidManifest.xml.j2"),
        f"{source}/{class_name}.kt": _model(manifest, package, class_name, inputs, outputs),
        f"{source}/Tensors.kt": render("android", "Tensors.kt.j2", package=package),
        f"{source}/Runner.kt": render(
            "android",
            f"Runner_{manifest.format}.kt.j2",
            package=package,
            hexagon=manifest.target_definition.accelerator == "hexagon",
        ),
        f"{source}/Assets.kt": render(
            "android",
            "Assets.kt.j2",
            package=package,
            asset_folder=kotlin_string(name),
            model_asset=kotlin_string(f"{name}/{manifest.model.file}"),
            maps=manifest.format == "litert",
        ),
    }
    if image is not None:
        written[f"{source}/Pixels.kt"] = render(
            "android", "Pixels.kt.j2", package=package, columns_first=image.columns_first
        )
    if manifest.golden:
        test = source.replace("src/main", "src/androidTest")
        values = golden_values(manifest, class_name, inputs, _tensor, _stored)
        written[f"{test}/GoldenTest.kt"] = render("android", "GoldenTest.kt.j2", package=package, **values)
    return written


def kotlin_string(text: str) -> str:
    """A literal in ASCII for any text, half a surrogate pair and "$" included."""
    escapes = {'"': '\\"', "\\": "\\\\", "$": "\\$", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    made = []
    for character in text:
        if character in escapes:
            made.append(escapes[character])
        elif " " <= character <= "~":
            made.append(character)
        else:
            raw = character.encode("utf-16-be", "surrogatepass")
            made += [f"\\u{raw[k]:02x}{raw[k + 1]:02x}" for k in range(0, len(raw), 2)]
    return f'"{"".join(made)}"'


def _dependency(manifest: Manifest) -> str | None:
    """Maven group and name of the runtime; None where none is published."""
    accelerator = manifest.target_definition.accelerator
    if accelerator is not None:
        return ACCELERATED.get((manifest.format, accelerator))
    return GRADLE.get(manifest.format)


def _build_script(manifest: Manifest, name: str, package: str, dependency: str) -> str:
    version = tool_version(manifest, PYTHON_PACKAGE[manifest.format])
    assets = [manifest.model.file, *(["labels.txt"] if manifest.labels else [])]
    return render(
        "android",
        "build.gradle.kts.j2",
        title=title(manifest),
        module=name,
        maps=manifest.format == "litert",
        suffix=kotlin_string(manifest.model.file.rpartition(".")[2]),
        assets=", ".join(kotlin_string(f"../{asset}") for asset in assets),
        asset_folder=kotlin_string(name),
        package_text=kotlin_string(package),
        dependency=kotlin_string(f"{dependency}:{version or 'latest.release'}"),
        proven=version is not None,
    )


def _model(
    manifest: Manifest,
    package: str,
    class_name: str,
    inputs: tuple[AppTensor, ...],
    outputs: tuple[AppTensor, ...],
) -> str:
    text = text_code(manifest, inputs)
    values = model_values(manifest, class_name, inputs, outputs, _number, _tensor)
    token_arrays = [] if text is None else _token_arrays(text)
    return render("android", "Model.kt.j2", package=package, token_arrays=token_arrays, **values)


def _token_arrays(text: TextCode) -> list[str]:
    """What fills each input: an array of its type, made number by number."""
    tokens = PADDED_TOKENS if text.pad_to else TOKENS
    made = []
    for field, tensor in text.fields:
        array = ARRAYS[tensor.model_dtype]
        made.append(f"{array}(length) {{ {CASTS[array].format(tokens[field])} }}")
    return made


def _tensor(tensor: AppTensor, axis: int | None) -> MobileTensor:
    array = ARRAYS[tensor.model_dtype]
    spec = [
        kotlin_string(tensor.native_name),
        f"ElementType.{tensor.file_dtype.upper()}",
        f"ElementType.{tensor.model_dtype.upper()}",
        f"intArrayOf({sizes(tensor.file_shape)})",
    ]
    if tensor.permutation is not None:
        spec.append(f"permutation = intArrayOf({sizes(tensor.permutation)})")
    if tensor.scale is not None:
        spec += [f"scale = {_number(tensor.scale)}", f"zeroPoint = {tensor.zero_point}"]
    return MobileTensor(
        identifier=tensor.identifier,
        position=tensor.position,
        comment=comment(tensor),
        element=array,
        decoder=DECODERS[array],
        spec=f"TensorSpec({', '.join(spec)})",
        axis=axis,
    )


def _stored(array: StoredArray) -> str:
    return ", ".join([kotlin_string(array.file), *map(str, array.shape)])


def _number(value: float) -> str:
    return f"{float32_text(value)}f"
