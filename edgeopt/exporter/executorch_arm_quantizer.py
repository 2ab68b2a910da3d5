"""Which tensors Arm's backends shall hold as integers: ExecuTorch's own quantizer, with places for our ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.exporter.executorch_graph import layer_of
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Scheme

if TYPE_CHECKING:
    from executorch.backends.arm.common.arm_compile_spec import ArmCompileSpec
    from executorch.backends.arm.quantizer.quantization_config import QuantizationConfig
    from torch.fx import GraphModule, Node
    from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer

#: Scale of an observer whose range calibration has to find; those with a scale of their own are the backend's.
UNSET = math.nan


def quantizer_for(spec: ArmCompileSpec, scheme: Scheme, keep_float: tuple[str, ...]) -> Quantizer:
    """The PT2E quantizer of the accelerator that `spec` describes, for `prepare_pt2e`.

    Its activation observers are FixedQParamsObserver with scale `UNSET`, which `executorch_arm_observer.calibrate`
    fills in. Convolution and linear layers followed by ReLU or ReLU6 are observed behind it.
    """
    from executorch.backends.arm.quantizer import EthosUQuantizer, VgfQuantizer
    from executorch.backends.arm.vgf import VgfCompileSpec

    quantizer = VgfQuantizer(spec) if isinstance(spec, VgfCompileSpec) else EthosUQuantizer(spec)
    quantizer.set_global(_config(scheme))
    if keep_float:
        quantizer.set_node_finder(None, _Exempt(keep_float))
    made: Quantizer = quantizer
    return made


@dataclass(frozen=True, slots=True)
class _Exempt:
    """Finds the operators of layers that stay float (a NodeFinder of the backend's quantizer)."""

    patterns: tuple[str, ...]

    def find_nodes(self, model: GraphModule) -> Iterator[Node]:
        return (node for node in model.graph.nodes if layer_is_exempt(layer_of(node), self.patterns))


def _config(scheme: Scheme) -> QuantizationConfig:
    from executorch.backends.arm.quantizer import get_symmetric_quantization_config

    per_channel = scheme.weight_granularity == "per-channel"
    stock: QuantizationConfig = get_symmetric_quantization_config(is_per_channel=per_channel)
    activation = _activation(scheme)
    return replace(stock, input_activation=activation, output_activation=activation)


def _activation(scheme: Scheme) -> QuantizationSpec:
    """int8 with a zero point, or symmetric int16; the observer only holds a place for what calibration finds."""
    import torch
    from torchao.quantization.pt2e import FixedQParamsObserver
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

    wide = scheme.activation_bits == 16
    symmetric = wide or scheme.activation_symmetric
    bound = 32767 if wide else 127
    return QuantizationSpec(
        dtype=torch.int16 if wide else torch.int8,
        quant_min=-bound if symmetric else -128,
        quant_max=bound,
        # A clip is fused into its producer by saturation at the zero point: not where that is in the middle.
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=FixedQParamsObserver.with_args(scale=UNSET, zero_point=0),
    )
