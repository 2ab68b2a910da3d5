"""The frozen values that travel down the pipe, from the trained model to the report.

Arrays are NumPy arrays throughout, so that a stage need not import torch to look at data. Shapes are in
elements, sizes in bytes, times in milliseconds unless a name says otherwise.
"""

from edgeopt.types.generation import Generation, GenerationTask, PartName
from edgeopt.types.models import (
    WRAPPED_ATTRIBUTE,
    Artifact,
    FileSummary,
    Model,
    NativeGraph,
    OpInfo,
    QuantParams,
    Signature,
    SignatureTensor,
    StepRecord,
    UnquantizedOp,
)
from edgeopt.types.names import DEVICE, PHONE, Array, DType, Format, PassName, Precision, Provenance
from edgeopt.types.npu import EdgeTpu, EthosU, EthosUKind, Hexagon, NeuralEngine, Npu, NpuKind, OpenVino, Vgf, Vulkan
from edgeopt.types.placement import OpPlacement, Placement
from edgeopt.types.quantization import EstimatorSpec, LayerRules, Scheme
from edgeopt.types.results import Bundle, Check, Finding, Gates, Measurement, OpTiming, Report, StepFigures
from edgeopt.types.tensors import (
    ArrayPreprocessing,
    AudioPreprocessing,
    Dim,
    ImagePreprocessing,
    Preprocessing,
    Sample,
    TensorSpec,
    TextPreprocessing,
)

__all__ = [
    "DEVICE",
    "PHONE",
    "WRAPPED_ATTRIBUTE",
    "Array",
    "ArrayPreprocessing",
    "Artifact",
    "AudioPreprocessing",
    "Bundle",
    "Check",
    "DType",
    "Dim",
    "EdgeTpu",
    "EstimatorSpec",
    "EthosU",
    "EthosUKind",
    "FileSummary",
    "Finding",
    "Format",
    "Gates",
    "Generation",
    "GenerationTask",
    "Hexagon",
    "ImagePreprocessing",
    "LayerRules",
    "Measurement",
    "Model",
    "NativeGraph",
    "NeuralEngine",
    "Npu",
    "NpuKind",
    "OpInfo",
    "OpPlacement",
    "OpTiming",
    "OpenVino",
    "PartName",
    "PassName",
    "Placement",
    "Precision",
    "Preprocessing",
    "Provenance",
    "QuantParams",
    "Report",
    "Sample",
    "Scheme",
    "Signature",
    "SignatureTensor",
    "StepFigures",
    "StepRecord",
    "TensorSpec",
    "TextPreprocessing",
    "UnquantizedOp",
    "Vgf",
    "Vulkan",
]
