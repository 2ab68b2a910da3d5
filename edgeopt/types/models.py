"""Models and the files made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.types.generation import Generation
from edgeopt.types.names import Array, DType, Format, Precision
from edgeopt.types.tensors import Preprocessing, TensorSpec

if TYPE_CHECKING:
    import torch.nn


#: Attribute under which a source's adapter module holds the user's own module (see `edgeopt.layer_names`).
WRAPPED_ATTRIBUTE = "edgeopt_model"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One thing that was done to the model, for the history in the manifest. Holds no times and no paths."""

    step: str
    config: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


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
        generation: set where the network writes sequences: `module` then is teacher-forced (prompt and target in,
            logits out), and what is exported are its parts (see `edgeopt.generation.parts`).
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
    generation: Generation | None = None


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
    """An exported file (of Core ML: a directory).

    Attributes:
        history: includes the model's.
        tools: package name -> version.
        emulation: a file with the same arithmetic that runs here, where `path` only runs on the device (a .pte for an
            NPU, what an NPU's compiler wrote); None where `path` itself can be run.
    """

    path: Path
    format: Format
    precision: Precision
    signature: Signature
    size_bytes: int
    sha256: str
    history: tuple[StepRecord, ...]
    tools: Mapping[str, str]
    unquantized_ops: tuple[UnquantizedOp, ...]
    emulation: Path | None = None

    @property
    def runnable(self) -> Path:
        """The file that a runtime of this machine opens to see what `path` computes."""
        return self.emulation or self.path


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
