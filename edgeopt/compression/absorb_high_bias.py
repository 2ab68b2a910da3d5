"""High-bias absorption: what every activation of a channel has in common moves into the next layer's bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgeopt.compression.base import CHECKED_SAMPLES, Needs, PassInputs, check_same_function
from edgeopt.compression.dataflow import Dataflow, follow, ranges_without
from edgeopt.compression.fold_batch_norm import fold
from edgeopt.compression.graph import MOVES, Operator, arguments, aten, name_of
from edgeopt.compression.observe import Visit, observe
from edgeopt.compression.surgery import Surgery, biasable
from edgeopt.errors import ConversionError
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Array, Model, Scheme, StepRecord

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

#: f(x - c) = f(x) - c for a c per channel. Average pooling only where it has no padding.
_SHIFTING = MOVES | aten(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d alias "
    "avg_pool1d avg_pool2d avg_pool3d clone contiguous detach dropout max_pool1d max_pool2d max_pool3d mean "
    "upsample_bilinear2d upsample_nearest2d"
)


@dataclass(frozen=True, slots=True)
class AbsorbHighBias:
    """Shift activations that never come near zero down to it, which narrows the range that they are quantized to.

    Nagel et al. 2019, *Data-Free Quantization Through Weight Equalization and Bias Correction*, section 4.1.3: where
    a channel in front of a ReLU never falls below c > 0, relu(x - c) = relu(x) - c, so c is taken off the bias before
    it, and weight * c added to the bias after it. The paper takes c from batch normalization's statistics; here it is
    the smallest value that any sample has. Under ReLU6 and the like only channels that never reach the upper bound
    are shifted. Convolutions with padding can't absorb: at the border they see zeros that no shift has moved.

    The function is unchanged on the samples, which is checked on the first of them, and only nearly so elsewhere.
    """

    name: ClassVar[str] = "absorb-high-bias"
    needs: ClassVar[Needs] = "samples"
    keeps_function: ClassVar[bool] = False

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        if scheme.activation_bits == 32:
            return "activations are not quantized"
        try:
            flow = follow(fold(model)[0])
        except ConversionError as error:
            return error.problem
        return None if _pairs(flow) else "no ReLU lies between two layers of which the second takes no padding"

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        folded, _ = fold(model)
        if folded.module is None or inputs.samples is None:
            raise ValueError("needs a module and samples")
        flow = follow(folded)
        exempt = inputs.rules.keep_float
        pairs = [
            pair
            for pair in _pairs(flow)
            if not any(layer_is_exempt(operator.layer, exempt) for operator in (pair.writer, *pair.readers))
        ]
        lows, highs = _extremes(folded, inputs, pairs)
        missing = {reader.weight: reader for pair in pairs for reader in pair.readers if reader.bias is None}
        able = biasable(folded, missing) if missing else frozenset()
        surgery = Surgery(folded.module)
        biases = {name: surgery.add_bias(missing[name], np.zeros(missing[name].out_channels)) for name in sorted(able)}
        absorbed = 0
        moved: set[str] = set()
        for pair in pairs:
            if any(reader.bias is None and reader.weight not in able for reader in pair.readers):
                continue
            low, high = lows[pair.writer.weight], highs[pair.writer.weight]
            # No sample may have reached the layer, which leaves the extremes infinite.
            shift = np.where((low > 0) & np.isfinite(low) & (high <= pair.upper_bound), low, 0.0)
            if shift.any():
                _absorb(flow, surgery, pair, shift, biases)
                absorbed += int(np.count_nonzero(shift))
                moved |= {reader.weight for reader in pair.readers}
        record = StepRecord(self.name, {"channels": absorbed})
        ranges = ranges_without(model.input_ranges, moved)
        done = replace(model, module=surgery.module, native=None, history=(*model.history, record), input_ranges=ranges)
        samples = (sample.inputs for sample in islice(inputs.samples(), CHECKED_SAMPLES))
        check_same_function(model, done, samples, f"pass {self.name!r}")
        return done


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer in front of a ReLU, and all that reads the ReLU. `upper_bound` is infinite for a plain one."""

    writer: Operator
    readers: tuple[Operator, ...]
    upper_bound: float


def _pairs(flow: Dataflow) -> list[_Pair]:
    pairs = []
    for operator in flow.operators.values():
        if operator.kind == "affine" or operator.bias is None or len(operator.node.users) != 1:
            continue
        rectifier = next(iter(operator.node.users))
        bound = _upper_bound(rectifier)
        readers = _readers(flow, rectifier) if bound is not None else None
        if bound is None or not readers:
            continue
        if all(np.isin(flow.read[reader.weight], flow.wrote[operator.weight]).all() for reader in readers):
            pairs.append(_Pair(operator, tuple(readers), bound))
    return pairs


def _upper_bound(node: Node) -> float | None:
    """Of a rectifier; None for any other operator."""
    name = name_of(node)
    if name == "aten.relu":
        return float("inf")
    if name == "aten.relu6":
        return 6.0
    given = arguments(node) if name in ("aten.clamp", "aten.clamp_min", "aten.hardtanh") else {}
    low, high = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
    if low != 0:
        return None
    return float(high) if isinstance(high, int | float) else float("inf") if high is None else None


def _readers(flow: Dataflow, node: Node) -> list[Operator] | None:
    """Weighted operators behind operators that a shift passes; None when anything else reads the value."""
    found = []
    for user in node.users:
        operator = flow.graph.operators.get(user)
        if operator is not None:
            if operator.value is not node or operator.kind == "affine":
                return None
            if operator.is_padded or operator.has_foreign_bias:
                return None
            found.append(operator)
        elif name_of(user) in _SHIFTING and _averages_all(user):
            behind = _readers(flow, user)
            if behind is None:
                return None
            found.extend(behind)
        else:
            return None
    return found


def _averages_all(node: Node) -> bool:
    """Average pooling is no mean, which shifts with its values, where it counts zeros in or has its own divisor."""
    if not name_of(node).startswith("aten.avg_pool"):
        return True
    given = arguments(node)
    padding = given["padding"]
    is_padded = any(padding) if isinstance(padding, list | tuple) else padding != 0
    return not is_padded and given.get("divisor_override") is None


def _extremes(model: Model, inputs: PassInputs, pairs: list[_Pair]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Smallest and largest output of each writer's channels over all samples."""
    lows: dict[str, Array] = {}
    highs: dict[str, Array] = {}

    def visit(operator: Operator) -> Visit:
        name = operator.weight
        lows[name] = np.full(operator.out_channels, np.inf)
        highs[name] = np.full(operator.out_channels, -np.inf)

        def take(_: torch.Tensor, output: torch.Tensor) -> None:
            flat = output.movedim(operator.channel_axis, 0).reshape(operator.out_channels, -1)
            lows[name] = np.minimum(lows[name], flat.amin(1).double().numpy())
            highs[name] = np.maximum(highs[name], flat.amax(1).double().numpy())

        return take

    if pairs:
        observe(model, inputs, {pair.writer.weight: visit(pair.writer) for pair in pairs}, "Looking for high biases")
    return lows, highs


def _absorb(flow: Dataflow, surgery: Surgery, pair: _Pair, shift: Array, added: Mapping[str, str]) -> None:
    writer = pair.writer
    assert writer.bias is not None
    surgery.set(writer.bias, surgery.get(writer.bias) - shift)
    by_label = np.zeros(flow.labels)
    by_label[flow.wrote[writer.weight]] = shift
    for reader in pair.readers:
        weight = surgery.get(reader.weight)
        assert reader.in_index is not None
        moved = weight * by_label[flow.read[reader.weight]][reader.in_index]
        outputs = np.broadcast_to(reader.out_index, weight.shape)
        total = np.bincount(outputs.ravel(), moved.ravel(), minlength=reader.out_channels)
        name = reader.bias if reader.bias is not None else added[reader.weight]
        surgery.set(name, surgery.get(name) + total)
