"""How a file for an accelerator gets to run there, in the words of the bundle's README."""

from __future__ import annotations

from edgeopt.types import Format, NpuKind

_ETHOS_U_LITERT = (
    "The file holds Vela's command stream in the custom operator `ethos-u`. It runs in TensorFlow Lite for "
    "Microcontrollers built with the Ethos-U kernel and the Ethos-U core driver; other interpreters refuse it. "
    "Address inputs and outputs by position: Vela renames tensors. It is for one configuration and memory mode of the "
    "NPU: for another board, export it again."
)
_ETHOS_U_EXECUTORCH = (
    "The file holds Vela's command stream in delegates of the backend `EthosUBackend`. It runs in ExecuTorch built for "
    "the board with `-DEXECUTORCH_BUILD_ARM_BAREMETAL=ON` (or the Ethos-U Linux driver)."
)
_TEXTS: dict[tuple[Format, NpuKind], str] = {
    ("litert", "ethos-u55"): _ETHOS_U_LITERT,
    ("litert", "ethos-u65"): _ETHOS_U_LITERT,
    ("litert", "ethos-u85"): _ETHOS_U_LITERT,
    ("executorch", "ethos-u55"): _ETHOS_U_EXECUTORCH,
    ("executorch", "ethos-u65"): _ETHOS_U_EXECUTORCH,
    ("executorch", "ethos-u85"): _ETHOS_U_EXECUTORCH,
    ("executorch", "vgf"): (
        "It runs in ExecuTorch with the VGF backend, on Vulkan with Arm's tensor and data graph extensions (or their "
        "emulation layer)."
    ),
    ("litert", "edge-tpu"): (
        "A file that was not compiled runs on the CPU only. `edgetpu_compiler -s model.tflite` makes "
        "`model_edgetpu.tflite` of it, which runs with the Edge TPU runtime (libedgetpu) as a LiteRT delegate."
    ),
    ("onnx", "hexagon"): (
        "Open it with ONNX Runtime's QNN execution provider (for Android: the Maven package "
        "`com.microsoft.onnxruntime:onnxruntime-android-qnn`) and `backend_path` = `libQnnHtp.so`. A context binary in "
        "`compiled/` spares the device the compilation, on the one system on chip that it was made for."
    ),
    ("litert", "hexagon"): "Open it with LiteRT's NPU accelerator for Qualcomm (QNN).",
    ("executorch", "hexagon"): "It runs in ExecuTorch with the Qualcomm backend and Qualcomm's runtime libraries.",
    ("coreml", "neural-engine"): (
        "Add the package to the Xcode project, which compiles it and makes a Swift class. With `computeUnits = .all` "
        "(the default), Core ML chooses between CPU, GPU and Neural Engine by operator."
    ),
    ("executorch", "neural-engine"): "It runs in ExecuTorch for iOS with the Core ML backend.",
    ("executorch", "vulkan"): "It runs in ExecuTorch for Android built with the Vulkan backend.",
    ("onnx", "openvino"): (
        "OpenVINO opens the ONNX file as it is: `openvino.Core().compile_model(path, device)`, with the hint "
        "`INFERENCE_PRECISION_HINT` = `f32` for what stays float."
    ),
}


def on_device(format_: Format, kind: NpuKind | None) -> str | None:
    """A paragraph of Markdown; None for files that run on the CPU."""
    return _TEXTS[format_, kind] if kind is not None else None
