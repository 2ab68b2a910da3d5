"""Many independent layers in one exported file, timed one by one in the target's runtime."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeopt.progress import Silent
from edgeopt.runtimes import load_runtime
from edgeopt.tuning.estimates import estimate, is_emulated, known_ms
from edgeopt.tuning.layers import path_of
from edgeopt.types import (
    Array,
    Artifact,
    EstimatorSpec,
    Format,
    LayerRules,
    Model,
    Npu,
    OpTiming,
    Sample,
    Scheme,
    TensorSpec,
)
from edgeopt.workbench import Workbench

if TYPE_CHECKING:
    import torch

    from edgeopt.compression.cost import LayerShape
    from edgeopt.runtimes.base import Session

#: Layers of one file: enough that the converter's own start-up does not decide. LiteRT's takes time for each layer.
LAYERS_PER_FILE: Mapping[Format, int] = {"litert": 24, "onnx": 40, "executorch": 40}
WEIGHTS_PER_FILE = 4_000_000
PROFILED_RUNS = 40
#: Samples that set the activation ranges, which no kernel's time depends on.
_CALIBRATION_SAMPLES = 2
#: Operators of a bank's file that are not its layers.
_AROUND = re.compile(r"convert|quant|transpose|copy|reshape|view|permute|squeeze|clone|slice|pad", re.IGNORECASE)
_NUMBER = re.compile(r"(\d+)$")
_MEMBER = re.compile(r"(?:^|\.)layers\.(\d+)$")


@dataclass(frozen=True, slots=True)
class Bench:
    """Where layers are timed.

    Attributes:
        format, scheme: of the file.
        runtime: a name in `edgeopt.runtimes.RUNTIMES`.
        threads: of the runtime.
    """

    format: Format
    scheme: Scheme
    runtime: str
    threads: int


def time_layers(shapes: Sequence[LayerShape], bench: Bench) -> list[float]:
    """Milliseconds of one call of each layer.

    Weights and inputs are random: no kernel's time depends on their values. Times come from the runtime's profiler;
    where it can't tell layers apart, they are the whole file's time shared out by multiply-accumulates, and where there
    is none, every layer gets a file of its own.

    Raises ConversionError when the format does not take the layers, MissingError when the runtime is not installed.
    """
    model = bank_of(shapes)
    with tempfile.TemporaryDirectory(prefix="edgeopt-bank-") as folder:
        data = _Noise(model)
        workbench = Workbench(model, data, LayerRules(), 0, Path(folder), Silent())
        if bench.scheme.is_plain_float:
            artifact = workbench.float_artifact(bench.format)
        else:
            artifact, _ = workbench.quantized_artifact(bench.format, bench.scheme, EstimatorSpec())
        npu = bench.scheme.npu
        if npu is not None and is_emulated((artifact,), bench.runtime):
            return _estimated(artifact, npu, shapes)
        with load_runtime(bench.runtime).open(artifact.path, artifact.signature, bench.threads) as session:
            timings = session.profile(data[0].inputs, PROFILED_RUNS)
            if timings:
                return attributed(timings, shapes, bench.format)
            if len(shapes) == 1:
                return [_whole(session, data[0].inputs)]
    return [time_layers([shape], bench)[0] for shape in shapes]


def _estimated(artifact: Artifact, npu: Npu, shapes: Sequence[LayerShape]) -> list[float]:
    """As the accelerator's compiler tells; the whole shared out by multiply-accumulates where it tells no more."""
    told = estimate(artifact, npu)
    if told.operators:
        return attributed(told.operators, shapes, artifact.format)
    total_macs = sum(shape.macs / shape.calls for shape in shapes)
    return [known_ms(artifact, npu) * shape.macs / shape.calls / max(total_macs, 1) for shape in shapes]


def _whole(session: Session, inputs: Mapping[str, Array]) -> float:
    """Milliseconds of a file, median; conversions at its ends are part of them."""
    native = session.encode(inputs)
    times = []
    for _ in range(PROFILED_RUNS):
        start = perf_counter()
        session.run_native(native)
        times.append(perf_counter() - start)
    return median(times) * 1e3


def chunks(shapes: Sequence[LayerShape], format_: Format) -> list[list[LayerShape]]:
    """The shapes in lots for one file each, every one of them once."""
    lots: list[list[LayerShape]] = [[]]
    weights = 0
    for shape in dict.fromkeys(shapes):
        size = shape.out_channels * shape.in_channels // max(shape.groups, 1) * int(np.prod(shape.kernel or (1,)))
        if lots[-1] and (len(lots[-1]) == LAYERS_PER_FILE[format_] or weights + size > WEIGHTS_PER_FILE):
            lots.append([])
            weights = 0
        lots[-1].append(shape)
        weights += size
    return [lot for lot in lots if lot]


def attributed(timings: Sequence[OpTiming], shapes: Sequence[LayerShape], format_: Format) -> list[float]:
    """Milliseconds by layer of a bank, in its order, from a profile of its file."""
    named = _by_name(timings, len(shapes), format_)
    if named is not None:
        return named
    layers = [timing for timing in timings if not _AROUND.search(timing.type)]
    ordered = _in_order(layers, shapes)
    if ordered is not None:
        return ordered
    total_ms = sum(timing.ms for timing in layers)
    total_macs = sum(shape.macs / shape.calls for shape in shapes)
    return [total_ms * shape.macs / shape.calls / max(total_macs, 1) for shape in shapes]


def _by_name(timings: Sequence[OpTiming], count: int, format_: Format) -> list[float] | None:
    """Where operators are called after their layers; None where one of them is not."""
    times = [0.0] * count
    seen: set[int] = set()
    if format_ == "executorch":
        return None
    for timing in timings:
        if (member := _MEMBER.search(path_of(format_, timing.name))) and not _AROUND.search(timing.type):
            index = int(member[1])
            times[index] += timing.ms
            seen.add(index)
    return times if len(seen) == count else None


def _in_order(timings: Sequence[OpTiming], shapes: Sequence[LayerShape]) -> list[float] | None:
    """Where operators are numbered as they run: over the whole file, or within their type.

    XNNPACK has one type of operator for each kind of layer, so layers of a kind are met in the bank's order.
    """
    if len(timings) != len(shapes):
        return None
    numbered = [(int(found[1]), t) for t in timings if (found := _NUMBER.search(t.name))]
    if len(numbered) == len(shapes) == len({number for number, _ in numbered}):
        return [t.ms for _, t in sorted(numbered, key=lambda pair: pair[0])]
    times = [0.0] * len(shapes)
    kinds = {kind: [i for i, shape in enumerate(shapes) if _kernel_kind(shape) == kind] for kind in _KERNEL_KINDS}
    for kind, places in kinds.items():
        own = sorted(
            ((number, t.ms) for number, t in numbered if _KERNEL_KINDS[kind].search(t.type)), key=lambda pair: pair[0]
        )
        if len(own) != len(places):
            return None
        for place, (_, ms) in zip(places, own, strict=True):
            times[place] = ms
    return times


#: What XNNPACK calls its operators of each kind ("Convolution (NHWC, QC8) IGEMM").
_KERNEL_KINDS = {
    "depthwise": re.compile(r"\bDWConv\b"),
    "matrix": re.compile(r"(?<!I)GEMM\b"),
    "convolution": re.compile(r"\bIGEMM\b"),
}


def _kernel_kind(shape: LayerShape) -> str:
    if shape.type == "convolution" and shape.groups == shape.in_channels > 1:
        return "depthwise"
    plain = all(size == 1 for size in (*shape.kernel, *shape.stride)) and not any(shape.padding)
    return "matrix" if plain and shape.groups == 1 else "convolution"


def bank_of(shapes: Sequence[LayerShape]) -> Model:
    """A model with one input, one layer and one output for each shape, none connected to another."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _bank_module([_layer(shape) for shape in shapes])
    arrays = _random_inputs(shapes, 0)
    with torch.no_grad():
        results = module(*(torch.from_numpy(array) for array in arrays.values()))
    outputs = tuple(
        TensorSpec(f"out{index}", tuple(result.shape), "float32", _layout(result.ndim))
        for index, result in enumerate(results)
    )
    inputs = tuple(
        TensorSpec(name, tuple(array.shape), "float32", _layout(array.ndim)) for name, array in arrays.items()
    )
    return Model("layer-bank", module, None, inputs, outputs, arrays, None, (), (), "")


def _bank_module(layers: Sequence[torch.nn.Module]) -> torch.nn.Module:
    from torch import Tensor, nn

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(layer(tensor) for layer, tensor in zip(self.layers, inputs, strict=True))

    return Bank().eval()


def _layer(shape: LayerShape) -> torch.nn.Module:
    from torch import nn

    if shape.type == "linear":
        return nn.Linear(shape.in_channels, shape.out_channels, shape.has_bias)
    kinds: dict[tuple[str, int], Callable[..., nn.Module]] = {
        ("convolution", 1): nn.Conv1d,
        ("convolution", 2): nn.Conv2d,
        ("convolution", 3): nn.Conv3d,
        ("transposed convolution", 1): nn.ConvTranspose1d,
        ("transposed convolution", 2): nn.ConvTranspose2d,
        ("transposed convolution", 3): nn.ConvTranspose3d,
    }
    return kinds[shape.type, len(shape.kernel)](
        shape.in_channels,
        shape.out_channels,
        shape.kernel,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
        bias=shape.has_bias,
    )


def _random_inputs(shapes: Sequence[LayerShape], seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        f"in{index:03d}": random.normal(size=_input_shape(shape)).astype(np.float32)
        for index, shape in enumerate(shapes)
    }


def _input_shape(shape: LayerShape) -> tuple[int, ...]:
    if shape.type == "linear":
        return (*shape.input_size, shape.in_channels)
    return (1, shape.in_channels, *shape.input_size)


def _layout(rank: int) -> Literal["NCHW"] | None:
    """Pictures are stored channel-last where the format likes that, as they are between a network's layers."""
    return "NCHW" if rank == 4 else None


class _Noise:
    """Random samples for the bank's calibration."""

    is_labelled = False
    class_names: tuple[str, ...] = ()

    def __init__(self, model: Model) -> None:
        self._shapes = {name: array.shape for name, array in model.example_inputs.items()}

    def __len__(self) -> int:
        return _CALIBRATION_SAMPLES

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        random = np.random.default_rng(index)
        inputs = {name: random.normal(size=shape).astype(np.float32) for name, shape in self._shapes.items()}
        return Sample(inputs, None, f"noise {index}")

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        return f"noise-{len(self)}"
