"""Which single operators `edgetpu_compiler` 16 takes, as far as that is published.

Three kinds of source, named beside every rule:

- [table] the table of supported operations and its known limitations: coral.ai/docs/edgetpu/models-intro, and the same
  table with more text at developer.axis.com/computer-vision/on-device/system-on-chip/artpec-7/supported-ops.
- [#n] a compiler log or a maintainer's answer in issue n of github.com/google-coral/edgetpu.
- [study] logs and findings of github.com/jiaheguo521/int8-pruning-pipeline (docs/PRUNING_HAZARDS.md, results/), all of
  version 16.0.384591198. [yolov9] is the log in github.com/dbro/frigate-detector-edgetpu-yolo9.
- [libredgetpu] what github.com/ricardodeazambuja/LibrEdgeTPU (libredgetpu/postprocess/, docs/HARDWARE_ANALYSIS.md)
  found left beside the Edge TPU's operator in compiled files of Coral's model zoo.

Where logs only bracket a limit (mapped at one size, not at another), the limit here lies between and says so. Logs give
counts and no shapes: those named here are worked out from the networks, and so are less certain than the logs are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeopt.accelerators.edge_tpu.alternatives import INSTEAD
from edgeopt.accelerators.edge_tpu.graph import COMPILED, Graph, Operator, Tensor

# The compiler's own words in the column "Status" of its log.
MAPPED = "Mapped to Edge TPU"
UNSUPPORTED = "Operation not supported"
VERSION = "Operation version not supported"
DATA_TYPE = "Operation is working on an unsupported data type"
UNSPECIFIED = "Operation is otherwise supported, but not mapped due to some unspecified limitation"
ONE_SUBGRAPH = "More than one subgraph is not supported"
STRIDES = "Only Strided-Slice with unitary strides supported"
RANK = "Tensor has unsupported rank (up to 3 innermost dimensions mapped)"
NOT_CONSTANT = "Filter, bias, or other param is not constant at compile-time"
IMPRECISE = "Image-interpolation layer won't run precisely enough on Edge TPU"

_QUANTIZED = ("int8", "uint8")
_MEBI = 2**20
#: Innermost dimensions that may be larger than 1 [table].
_INNER = 3


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an operator is not taken: the compiler's status, what we think is behind it, what would help."""

    status: str
    detail: str | None = None
    fix: str | None = None

    @property
    def reason(self) -> str:
        return f"{self.status} ({self.detail})" if self.detail else self.status


@dataclass(frozen=True, slots=True)
class View:
    """An operator with its tensors at hand."""

    operator: Operator
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]

    @property
    def data(self) -> Tensor | None:
        """The first input that is computed at run time."""
        return next((t for t in self.inputs if t is not None and t.content == "activation"), None)

    def constant(self, position: int) -> Tensor | None:
        """That input, where it is a constant that the compiler can read."""
        tensor = self.inputs[position] if position < len(self.inputs) else None
        return tensor if tensor is not None and tensor.content == "constant" else None

    def axes(self, position: int) -> tuple[int, ...] | None:
        """Axes from a constant input, counted from the front; None where it is no constant."""
        tensor = self.constant(position)
        if tensor is None or tensor.integers is None or self.data is None or not self.data.shape:
            return None
        return tuple(axis % len(self.data.shape) for axis in tensor.integers)


Rule = Callable[[View], Refusal | None]


def refusal(graph: Graph, operator: Operator) -> Refusal | None:
    """Why the compiler leaves this operator to the CPU, whatever stands around it; None where it takes it."""
    view = View(operator, graph.inputs_of(operator), graph.outputs_of(operator))
    if operator.type == COMPILED:
        return None
    if operator.is_custom:  # [#515] detection and pose decoders stay on the CPU
        return Refusal(DATA_TYPE, "a custom operator", "end the model before it and decode on the CPU")
    # A quantizing operator at the border has a status of its own [#342, and all logs of models with float inputs].
    types = _border if operator.type == "QUANTIZE" else _data_type
    rules = (types, _static, *SUPPORTED.get(operator.type, (_unsupported,)), _rank)
    return next((found for rule in rules if (found := rule(view)) is not None), None)


def _unsupported(view: View) -> Refusal:
    return Refusal(UNSUPPORTED, fix=INSTEAD.get(view.operator.type))


def _data_type(view: View) -> Refusal | None:
    """8-bit throughout [table]: judged on what is computed; indices and state have types of their own."""
    computed = [t for t in (view.data, *view.outputs) if t is not None]
    wrong = next((t for t in computed if t.dtype not in _QUANTIZED), None)
    if wrong is None:
        return None
    if view.operator.type == "DEQUANTIZE":
        return Refusal(DATA_TYPE, f"writes {wrong.dtype}", "take int8 outputs and scale them in the application")
    return Refusal(DATA_TYPE, f"{wrong.name!r} is {wrong.dtype}", "quantize it to int8, ranges from calibration")


def _border(view: View) -> Refusal | None:
    if any(t.dtype == "float32" for t in (view.data, *view.outputs) if t is not None):
        return Refusal(UNSPECIFIED, "quantizes a float input", "feed int8 inputs")
    return _data_type(view)


def _static(view: View) -> Refusal | None:
    """Tensor sizes are fixed [table]. A free batch is fixed to the 1 that the file stores."""
    tensors = [t for t in (*view.inputs, *view.outputs) if t is not None and t.content == "activation"]
    for tensor in tensors:
        if -1 in tensor.signature[1:] or 0 in tensor.shape:
            return Refusal(UNSPECIFIED, f"{tensor.name!r} has a dynamic shape", "export with fixed shapes")
    return None


def _rank(view: View) -> Refusal | None:
    """At most three inner dimensions above 1 [table]; the status is in the log of [#537]."""
    for tensor in (*(t for t in view.inputs if t is not None and t.content == "activation"), *view.outputs):
        if any(size > 1 for size in tensor.shape[:-_INNER]):
            fix = "export with batch 1" if len(tensor.shape) == _INNER + 1 else "reshape to at most 4 dimensions"
            return Refusal(RANK, f"{tensor.name!r} is {_times(tensor.shape)}", fix)
    return None


def _constant_parameters(*positions: int) -> Rule:
    """Weights, biases and axes are compile-time constants inside the FlatBuffer [table, #25]."""

    def rule(view: View) -> Refusal | None:
        for position in positions:
            tensor = view.inputs[position] if position < len(view.inputs) else None
            if tensor is None or tensor.content == "constant":
                continue
            if tensor.content == "external":  # [study] the parser of version 16 reads 3 of 345 operators of such files
                return Refusal(
                    NOT_CONSTANT, f"{tensor.name!r} lies behind the FlatBuffer", "store buffers inside the FlatBuffer"
                )
            return Refusal(NOT_CONSTANT, f"{tensor.name!r} is computed at run time")
        return None

    return rule


def _no_activation(view: View) -> Refusal | None:
    """[table] "No fused activation function." """
    if view.operator.options.get("fusedActivationFunction"):
        return Refusal(UNSPECIFIED, "has a fused activation", "make the activation an operator of its own")
    return None


def _equal_dilation(view: View) -> Refusal | None:
    """[table] "Must use the same dilation in x and y dimensions." """
    options = view.operator.options
    if options.get("dilationHFactor", 1) != options.get("dilationWFactor", 1):
        return Refusal(UNSPECIFIED, "dilation differs between height and width", "use one dilation")
    return None


def _ungrouped(view: View) -> Refusal | None:
    """A CONV_2D whose weights see fewer channels than the input has is a grouped one, which came after version 16."""
    weights, data = view.constant(1), view.data
    if weights is None or data is None or weights.shape[-1:] == data.shape[-1:]:
        return None
    return Refusal(VERSION, "a grouped convolution", "split it into one convolution per group")


def _row(view: View) -> Refusal | None:
    """[table] "Output tensor is one-dimensional"; [yolov9] maps N x 1, [study] does not map 50 x 6144."""
    if view.operator.options.get("weightsFormat"):
        return Refusal(UNSPECIFIED, "shuffled weights", "convert without shuffled weights")
    if view.outputs and sum(size > 1 for size in view.outputs[0].shape) > 1:
        return Refusal(
            UNSPECIFIED, f"writes {_times(view.outputs[0].shape)}, not one row", "write it as a 1x1 convolution"
        )
    return None


def _joined(view: View) -> Refusal | None:
    """[table] a constant only beside one other input, and all zeros."""
    constants = [t for t in view.inputs if t is not None and t.content != "activation"]
    if constants and (len(view.inputs) > 2 or not all(t.is_zero for t in constants)):
        return Refusal(UNSPECIFIED, "joins a constant that is not zero", "pad, or add the constant afterwards")
    return None


def _joined_rows(view: View) -> Refusal | None:
    """EfficientDet-Lite0 joins 19206 x 90 values of all levels; Lite1, with 27621 x 90, probably does not [study]."""
    if not view.outputs or len(view.outputs[0].shape) > _INNER or view.outputs[0].elements <= 2 * _MEBI:
        return None
    return Refusal(UNSPECIFIED, f"{view.outputs[0].elements} values, too large", "join smaller tensors, or on the host")


def _limited(limit: int, fix: str) -> Rule:
    """Tensors of more elements are not mapped."""

    def rule(view: View) -> Refusal | None:
        largest = max((t.elements for t in (view.data, *view.outputs) if t is not None), default=0)
        return Refusal(UNSPECIFIED, f"{largest} values, too large", fix) if largest > limit else None

    return rule


def _reduction(view: View) -> Refusal | None:
    """[table] not over the batch; over channels only for MEAN, and only multiples of 4."""
    axes, data = view.axes(1), view.data
    if axes is None or data is None:
        return None
    rank = len(data.shape)
    if rank > _INNER and 0 in axes:
        return Refusal(UNSPECIFIED, "reduces the batch dimension", "reduce height, width or channels only")
    if view.operator.type == "MEAN" and rank - 1 in axes and data.shape[-1] % 4:
        return Refusal(UNSPECIFIED, f"reduces {data.shape[-1]} channels", "use a multiple of 4 channels")
    # [#461] a mean over 256x128 is not mapped, four over 64x128 are. A plane of 16384 lies between.
    plane = [data.shape[axis] for axis in axes if rank == _INNER + 1 and axis in (1, 2)]
    if len(plane) == 2 and plane[0] * plane[1] > _MEAN_PLANE:
        return Refusal(UNSPECIFIED, f"reduces {_times(tuple(plane))} at once", "reduce in stages, or pool first")
    return None


_MEAN_PLANE = 16384


def _padding(view: View) -> Refusal | None:
    paddings = view.constant(1)
    if paddings is None:
        return None
    if paddings.dtype == "int64":  # [study] read as int32, so that a spatial padding lands on the channels
        return Refusal(DATA_TYPE, "paddings are int64", "store the paddings as int32")
    rows = paddings.integers or ()
    if view.data is not None and len(view.data.shape) > _INNER and any(rows[:2]):  # [table]
        return Refusal(UNSPECIFIED, "pads the batch dimension", "pad height, width or channels only")
    return None


def _stacked(view: View) -> Refusal | None:
    """[table] "No packing in batch dimension." """
    if view.operator.options.get("axis") == 0 and view.outputs and len(view.outputs[0].shape) > _INNER:
        return Refusal(UNSPECIFIED, "packs into the batch dimension", "pack into another dimension")
    return None


def _split(view: View) -> Refusal | None:
    """[table] "No splitting in batch dimension." """
    axes, data = view.axes(0), view.data
    if axes and data is not None and axes[0] == 0 and len(data.shape) > _INNER:
        return Refusal(UNSPECIFIED, "splits the batch dimension", "split another dimension")
    return None


def _alpha(view: View) -> Refusal | None:
    """[table] "Alpha must be 1-dimensional": one slope per channel at most."""
    alpha = view.constant(1)
    if alpha is not None and any(size > 1 for size in alpha.shape[:-1]):
        return Refusal(UNSPECIFIED, f"slopes of shape {_times(alpha.shape)}", "share slopes over height and width")
    return None


def _leading_ones(view: View) -> Refusal | None:
    """[table] removes leading dimensions only, so that nothing moves."""
    if view.data is None or not view.outputs:
        return None
    kept = view.outputs[0].shape
    if view.data.shape[len(view.data.shape) - len(kept) :] != kept:
        return Refusal(UNSPECIFIED, "removes an inner dimension", "use RESHAPE")
    return None


def _unit_strides(view: View) -> Refusal | None:
    """[table] strides 1, no ellipsis and no new axis."""
    strides = view.constant(3)
    if strides is not None and any(s != 1 for s in strides.integers or ()):
        return Refusal(STRIDES, fix="slice with step 1, or use a strided convolution or pooling")
    masks = (view.operator.options.get("ellipsisMask"), view.operator.options.get("newAxisMask"))
    if any(masks):
        return Refusal(UNSPECIFIED, "an ellipsis or a new axis", "spell out all dimensions")
    return None


def _softmax_row(view: View) -> Refusal | None:
    if view.data is None or not view.data.shape or view.data.shape[-1] <= _SOFTMAX_ROW:
        return None
    return Refusal(UNSPECIFIED, f"rows of {view.data.shape[-1]} values", "compute the softmax on the host")


_SOFTMAX_ROW = 16000


def _scaling(view: View) -> Refusal | None:
    """[table] "might not be mapped to avoid loss in precision": the status named so is in [#63].

    [libredgetpu] In Coral's DeepLab the 33-fold enlargement of the pooled pixel stays on the CPU, and so does the
    16-fold one at its end; the doubling of decoders is mapped [#31]. Our limit of 8 is a guess between.
    """
    data, output = view.data, view.outputs[0] if view.outputs else None
    if data is None or output is None or len(data.shape) != _INNER + 1 or len(output.shape) != _INNER + 1:
        return None
    factor = max(new / max(old, 1) for old, new in zip(data.shape[1:3], output.shape[1:3], strict=True))
    if factor > _MAX_SCALE:
        return Refusal(IMPRECISE, f"enlarges {factor:.3g} times", "enlarge in steps of 2, or on the host")
    return None


_MAX_SCALE = 8


_FILTER = _constant_parameters(1, 2)
_POOL = (_no_activation,)
_ELEMENTWISE: tuple[Rule, ...] = ()

#: Operator -> its rules, without those that hold for all. Sizes: what logs bracket, in elements.
SUPPORTED: dict[str, tuple[Rule, ...]] = {
    "ADD": _ELEMENTWISE,
    "AVERAGE_POOL_2D": _POOL,
    "CONCATENATION": (_no_activation, _joined, _joined_rows),
    "CONV_2D": (_FILTER, _ungrouped, _equal_dilation),
    "DEPTHWISE_CONV_2D": (_FILTER, _equal_dilation),
    "EXPAND_DIMS": (),
    "FULLY_CONNECTED": (_FILTER, _row),
    "L2_NORMALIZATION": (_no_activation,),
    "LOGISTIC": (),
    "LSTM": (),
    "MAXIMUM": _ELEMENTWISE,
    "MAX_POOL_2D": _POOL,
    "MEAN": (_constant_parameters(1), _reduction),
    "MINIMUM": _ELEMENTWISE,
    "MUL": _ELEMENTWISE,
    "PACK": (_stacked,),
    "PAD": (_constant_parameters(1), _padding),
    "PRELU": (_constant_parameters(1), _alpha),
    "QUANTIZE": (),
    "REDUCE_MAX": (_constant_parameters(1), _reduction),
    "REDUCE_MIN": (_constant_parameters(1), _reduction),
    "RELU": (),
    "RELU6": (),
    "RELU_N1_TO_1": (),
    # [table] "Certain reshapes might not be mapped for large tensor sizes"; EfficientDet-Lite0: 1.3 M mapped;
    # Lite1, of which 7 operators stay on the CPU [study]: probably 1.9 M not; [#356] 3.5 M not.
    "RESHAPE": (_limited(3 * _MEBI // 2, "reshape smaller tensors, or on the host"),),
    # [#31] 128x128x32 is mapped, 512x512x32 is not.
    "RESIZE_BILINEAR": (_scaling, _limited(4 * _MEBI, "enlarge on the host")),
    # [study] 96x96x192 is mapped; the same bound as above.
    "RESIZE_NEAREST_NEIGHBOR": (_limited(4 * _MEBI, "enlarge on the host"),),
    "RSQRT": (),
    "SLICE": (_constant_parameters(1, 2),),
    # [table] "1-D input, at most 16000 elements", but [yolov9] maps one of 36864 values in rows of 16, and [study] does
    # not map one of 32 x 50 x 50. Rows up to 16000, 65536 values in all.
    "SOFTMAX": (_softmax_row, _limited(65536, "compute the softmax on the host")),
    "SPACE_TO_DEPTH": (),
    "SPLIT": (_constant_parameters(0), _split),
    "SQUARED_DIFFERENCE": _ELEMENTWISE,  # [#461]
    "SQUEEZE": (_leading_ones,),
    "STRIDED_SLICE": (_constant_parameters(1, 2, 3), _unit_strides),
    "SUB": _ELEMENTWISE,
    "SUM": (_constant_parameters(1), _reduction),  # [study]
    "TANH": (),
    # Since version 16 [#193]. [#512] 196x3x85 is mapped, 784x3x85 is not, and the counts at inputs of 256 and 512 fit
    # if 256x3x85 is not, either; [#433] 3x224x224 is not; [study] 50x2048 is not.
    "TRANSPOSE": (_constant_parameters(1), _limited(57344, "keep tensors channel-last, so that nothing is moved")),
    "TRANSPOSE_CONV": (_constant_parameters(0, 1, 3),),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": (),
}


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
