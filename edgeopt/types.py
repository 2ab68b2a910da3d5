"""The frozen values that travel down the pipe, from the trained model to the report.

Arrays are NumPy arrays throughout, so that a stage need not import torch to look at data. Shapes are in
elements, sizes in bytes, times in milliseconds unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch.nn

Array = np.ndarray[Any, np.dtype[Any]]

Precision = Literal["fp32", "fp16", "w8a8", "w8a16", "w8", "w4", "8da4w"]
DType = Literal["float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"]
Format = Literal["litert", "onnx", "executorch"]
PassName = Literal[
    "fold-batch-norm", "equalize", "absorb-high-bias", "smooth", "clip-outliers", "round-adaptively", "correct-bias"
]  # fmt: skip
Provenance = Literal["measured-host", "emulated", "estimated", "measured-device"]

#: Attribute under which a source's adapter module holds the user's own module (see `edgeopt.layer_names`).
WRAPPED_ATTRIBUTE = "edgeopt_model"


@dataclass(frozen=True, slots=True)
class Dim:
    """A named dynamic dimension, e.g. `Dim("batch", 1, 16)`; both bounds are inclusive."""

    name: str
    min: int = 1
    max: int = 512


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: how the tensor is called in samples, manifests and messages.
        shape: one entry per dimension, batch included; a `Dim` where the size is free.
        dtype: element type.
        layout: "NCHW" for images that a channel-last runtime may take as NHWC; None where order has no such meaning.
    """

    name: str
    shape: tuple[int | Dim, ...]
    dtype: DType
    layout: Literal["NCHW", "NHWC"] | None = None

    @property
    def is_dynamic(self) -> bool:
        return any(isinstance(d, Dim) for d in self.shape)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One thing that was done to the model, for the history in the manifest. Holds no times and no paths."""

    step: str
    config: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


# --- preprocessing: declared data, applied the same way in calibration, evaluation and the app -----------------------


@dataclass(frozen=True, slots=True)
class ImagePreprocessing:
    """Picture file -> float32 tensor (1, C, H, W) or (1, H, W, C).

    In this order: convert to `channels` (1 grey, 3 RGB); if `crop_fraction`, keep the central
    square of side crop_fraction * min(height, width); if `resize_shorter`, scale the shorter side to it; then
    resize to (height, width) or, after `resize_shorter`, cut the central (height, width); finally
    `(pixel / rescale - mean) / std`, pixel in 0..255.
    """

    height: int
    width: int
    channels: Literal[1, 3] = 3
    crop_fraction: float | None = None
    resize_shorter: int | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    rescale: float = 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    kind: Literal["image"] = "image"


@dataclass(frozen=True, slots=True)
class TextPreprocessing:
    """Text -> token ids (1, max_length) through a Hugging Face tokenizer.

    `tokenizer` is a tokenizer.json file or a directory that holds one; it travels in the bundle. The tokenizer's
    fields (input_ids, attention_mask, token_type_ids) are matched to the model's inputs by name, or by order.
    """

    tokenizer: str
    max_length: int = 128
    padding: Literal["max_length", "none"] = "max_length"
    text_keys: tuple[str, ...] = ("text",)
    kind: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class AudioPreprocessing:
    """WAV file -> float32 mono waveform (1, num_samples) in -1..1, resampled, then cut or zero-padded at the end."""

    sample_rate: int = 16_000
    num_samples: int = 16_000
    mean: float = 0.0
    std: float = 1.0
    channel_axis: bool = False
    kind: Literal["audio"] = "audio"


@dataclass(frozen=True, slots=True)
class ArrayPreprocessing:
    """Array -> `(value / rescale - mean) / std` per channel along `channel_axis` (of the batched array)."""

    rescale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channel_axis: int = 1
    kind: Literal["array"] = "array"


Preprocessing = ImagePreprocessing | TextPreprocessing | AudioPreprocessing | ArrayPreprocessing


@dataclass(frozen=True, slots=True)
class Sample:
    """One item of a data set, ready for the model.

    Attributes:
        inputs: model input name -> array, batch dimension of 1 included.
        label: class index, or an array for other tasks; None when unlabelled.
        name: where it came from, for messages ("cat/001.jpg", "row 17").
    """

    inputs: Mapping[str, Array]
    label: int | Array | None
    name: str


# --- models and artifacts --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NativeGraph:
    """A model file that already is in some framework's graph format and needs no torch to be exported."""

    kind: Literal["onnx", "savedmodel", "keras"]
    path: Path


@dataclass(frozen=True, slots=True)
class Model:
    """A trained model with all that is known about it.

    Attributes:
        name: short slug; names the bundle.
        module: eval-mode module, called with one positional tensor per entry of `inputs`, in order; returns a tensor
            or a (nested) list/tuple of tensors whose flat order is that of `outputs`. None only where `native` is set.
        native: the graph file it was loaded from, where a format can take that without torch.
        inputs, outputs: signatures.
        example_inputs: input name -> array that fits `inputs`; at least one sample.
        preprocessing, labels: what the app must do before and after; None/() when unknown.
        history: what was done so far. source_sha256: of the code and weights that it was loaded from.
        input_ranges: path of a layer with weights -> (min, max) that its input was trained to be quantized to; wins
            over what calibration finds for that tensor. Empty unless quantization-aware training learned them.
    """

    name: str
    module: torch.nn.Module | None
    native: NativeGraph | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example_inputs: Mapping[str, Array]
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    history: tuple[StepRecord, ...]
    source_sha256: str
    input_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantParams:
    """real = scale * (quantized - zero_point); per-channel along `axis` when there is more than one entry."""

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class SignatureTensor:
    """One input or output of an exported file, and how it maps to the model's own.

    Attributes:
        name: the model's name for it (`TensorSpec.name`).
        native_name: its name in the file.
        shape: as in the file; a string names a dynamic dimension.
        dtype: as in the file (int8 where I/O is quantized).
        model_dtype: the model's own type, which `Session.run` takes and returns.
        permutation: model tensor transposed by this gives the file's tensor, (0, 2, 3, 1) for NCHW -> NHWC;
            None where they are the same.
        quantization: set where dtype is quantized and model_dtype is not.
    """

    name: str
    native_name: str
    shape: tuple[int | str, ...]
    dtype: DType
    model_dtype: DType
    permutation: tuple[int, ...] | None = None
    quantization: QuantParams | None = None


@dataclass(frozen=True, slots=True)
class Signature:
    inputs: tuple[SignatureTensor, ...]
    outputs: tuple[SignatureTensor, ...]


@dataclass(frozen=True, slots=True)
class UnquantizedOp:
    """An operator that computes in float in a quantized file, or that its delegate did not take."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """An exported file. `history` includes the model's; `tools` maps package name -> version."""

    path: Path
    format: Format
    precision: Precision
    signature: Signature
    size_bytes: int
    sha256: str
    history: tuple[StepRecord, ...]
    tools: Mapping[str, str]
    unquantized_ops: tuple[UnquantizedOp, ...]


@dataclass(frozen=True, slots=True)
class OpInfo:
    """One operator of an exported file, as `edgeopt inspect` shows it and the exporters judge it.

    Attributes:
        name: unique in the file; carries the source layer's path where the format keeps it.
        type: the format's operator name ("Conv", "CONV_2D", "aten.convolution.default").
        dtype: type it computes in.
        delegate: "XNNPACK" and the like where the file itself says so (.pte); None elsewhere.
        weight_bytes: constants that only this operator reads.
    """

    name: str
    type: str
    dtype: str
    delegate: str | None
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What is inside one model file, read without running it. `signature` uses the file's own names throughout."""

    format: Format
    size_bytes: int
    sha256: str
    signature: Signature
    ops: tuple[OpInfo, ...]
    metadata: Mapping[str, str]


# --- quantization ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a quantized file should look like; means the same in every format.

    Attributes:
        precision: `w8a8` quantizes weights and activations, `w8` and `w4` weights only, `8da4w` has 4-bit weights and
            int8 activations with run-time ranges, fp16/fp32 are plain casts.
        activations: "static" ranges come from calibration; "dynamic" ones are computed at run time.
        weight_granularity: one scale per output channel, one per tensor, or one per `group_size` consecutive weights
            of an output channel.
        activation_symmetric: zero point fixed at 0.
        io: whether the file's float inputs and outputs stay float32 or become int8 (uint8 where the format's
            fast kernels want that).
        weight_symmetric: zero point of weights fixed at 0.
        scale: "power-of-two" rounds every scale up to a power of two, for hardware that shifts.
        weight_estimator: how a weight scale is chosen: "max" covers the largest magnitude, "mse" minimizes the squared
            error of the weights, "hqq" their half-quadratic, outlier-robust error (Badri and Shaji 2023).
        weight_values: "linear" integers; "logarithmic" (signed powers of two) and "k-means" values are stored as codes
            with a table and expanded when the file is loaded, so they save storage only.
        group_size: for "per-group".
    """

    precision: Precision
    activations: Literal["none", "static", "dynamic"]
    weight_granularity: Literal["per-channel", "per-tensor", "per-group"] = "per-channel"
    activation_symmetric: bool = False
    io: Literal["float", "int8"] = "float"
    weight_symmetric: bool = True
    scale: Literal["any", "power-of-two"] = "any"
    weight_estimator: Literal["max", "mse", "hqq"] = "max"
    weight_values: Literal["linear", "logarithmic", "k-means"] = "linear"
    group_size: int = 32

    @property
    def needs_calibration(self) -> bool:
        return self.activations == "static"

    @property
    def is_quantized(self) -> bool:
        return self.precision not in ("fp32", "fp16")

    @property
    def weight_bits(self) -> int:
        """Bits of one stored weight; 32 and 16 for float."""
        return {"fp32": 32, "fp16": 16, "w4": 4, "8da4w": 4}.get(self.precision, 8)

    @property
    def activation_bits(self) -> int:
        """Bits of one quantized activation; 32 where activations stay float."""
        return {"w8a8": 8, "8da4w": 8, "w8a16": 16}.get(self.precision, 32)


@dataclass(frozen=True, slots=True)
class LayerRules:
    """Exceptions from a scheme, as shell patterns matched against source layer paths ("features.0.*", "classifier").

    Attributes:
        keep_float: layers that stay float.
        int16_activations: layers whose inputs and outputs have 16 bits (w8a16) in a w8a8 file.
    """

    keep_float: tuple[str, ...] = ()
    int16_activations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EstimatorSpec:
    """Which range estimator, and its one parameter (the percentile kept, e.g. 99.99; unused by the others)."""

    name: Literal["min-max", "percentile", "entropy", "mse"] = "min-max"
    percentile: float = 99.999


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure with how it was obtained.

    `spread` is (25th percentile, 75th percentile) in the same unit; None for exact figures such as a size.
    `subject` says of which file: "quantized" (what ships; of a smaller network in float, too) or "float" (the twin).
    """

    name: str
    subject: str
    value: float
    unit: str
    provenance: Provenance
    runtime: str
    threads: int | None = None
    repetitions: int | None = None
    spread: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """A gate and what was measured: `measured op limit`. A limit of None is no gate; the check then passes."""

    name: str
    measured: float | None
    limit: float | None
    op: Literal["<=", ">="]
    unit: str
    passed: bool
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a person should know: a calibration worry, a slow operator. `code` is stable, `where` names it."""

    code: str
    where: str
    message: str


@dataclass(frozen=True, slots=True)
class OpTiming:
    """Median time of one operator (or of one delegated block) per inference, in milliseconds."""

    name: str
    type: str
    ms: float


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits on the exported file; None switches a gate off. Fractions, not per cent: 0.005 is half a point."""

    max_accuracy_drop: float | None = None
    min_agreement: float | None = None
    min_sqnr_db: float | None = None
    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_size_bytes: int | None = None
    max_peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What the model was worth and cost after one step, measured on the file exported after that step.

    Attributes:
        step: "start" for the model as it was loaded, then "prune", "distil", ...; the last is the shipped file.
        samples: on which the next three were measured.
        score: the task's metric; None without labels.
        agreement, sqnr_db: with the float file of the model as it was loaded; None where no output has them.
        macs: multiply-accumulate operations of one inference on the example input; None where torch can't count them.
        parameters: of the torch module; None where there is none.
        size_bytes: of the file.
        latency_ms, spread_ms: median and quartiles of one inference, all steps' files timed in turns.
    """

    step: str
    samples: int
    score: float | None
    agreement: float | None
    sqnr_db: float | None
    macs: int | None
    parameters: int | None
    size_bytes: int
    latency_ms: float
    spread_ms: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Report:
    """What validation found out about one artifact, beside its float twin, in one runtime.

    `steps` is empty where the model was exported as it came.
    """

    status: Literal["passed", "failed"]
    model: str
    target: str
    runtime: str
    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    unquantized_ops: tuple[UnquantizedOp, ...]
    op_timings: tuple[OpTiming, ...]
    findings: tuple[Finding, ...]
    evaluation: Mapping[str, str | int | float | bool | None]
    steps: tuple[StepFigures, ...] = ()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A directory that an app developer can drop in."""

    path: Path
    target: str
    passed: bool
    report: Report
