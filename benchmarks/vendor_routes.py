"""Each vendor's own default int8 route, as its documentation shows it: the baselines of docs/results.md."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from edgeopt.types import Array

Samples = Sequence[dict[str, Array]]


def litert(module: torch.nn.Module, example: torch.Tensor, samples: Samples, path: Path) -> None:
    """litert_torch.convert, then ai-edge-quantizer's static_wi8_ai8 with its own calibration."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    float_path = path.with_name("float_" + path.name)
    litert_torch.convert(module, (example,)).export(str(float_path))
    work = quantizer.Quantizer(str(float_path))
    work.load_quantization_recipe(recipe.static_wi8_ai8())
    feeds = {"serving_default": [{"args_0": next(iter(sample.values()))} for sample in samples]}
    work.quantize(work.calibrate(feeds)).export_model(str(path), overwrite=True)


def litert_channel_last(module: torch.nn.Module, example: torch.Tensor, samples: Samples, path: Path) -> None:
    """The same on a model converted channel-last, as ai-edge-quantizer's users with CPU targets do."""
    import litert_torch

    nhwc = litert_torch.to_channel_last_io(module, args=[0])
    transposed = [{"image": next(iter(sample.values())).transpose(0, 2, 3, 1)} for sample in samples]
    litert(nhwc, example.permute(0, 2, 3, 1).contiguous(), transposed, path)


def onnx(module: torch.nn.Module, example: torch.Tensor, samples: Samples, path: Path, **options: Any) -> None:
    """torch.onnx.export, then quantize_static with its defaults, or `options`."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, Array]] = iter(samples)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.feeds, None)

    float_path = path.with_name("float_" + path.name)
    name = next(iter(samples[0]))
    program = torch.onnx.export(module, (example,), dynamo=True, opset_version=18, input_names=[name])
    assert program is not None
    program.save(str(float_path), external_data=False)
    quant_pre_process(str(float_path), str(float_path))
    quantize_static(str(float_path), str(path), Reader(), **options)


def onnx_u8s8(module: torch.nn.Module, example: torch.Tensor, samples: Samples, path: Path) -> None:
    """The same with the options that suit x86 and Arm best, which one has to know."""
    from onnxruntime.quantization import QuantType

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    onnx(module, example, samples, path, per_channel=True, **types)


def executorch(module: torch.nn.Module, example: torch.Tensor, samples: Samples, path: Path) -> None:
    """PT2E with the stock XNNPACKQuantizer."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(module, (example,)).module(check_guards=False), quantizer)
    with torch.no_grad():
        for sample in samples:
            prepared(torch.from_numpy(next(iter(sample.values()))))
    program = torch.export.export(convert_pt2e(prepared), (example,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def litert_dynamic(module: torch.nn.Module, example: torch.Tensor, samples: Samples, path: Path) -> None:
    """litert_torch.convert, then ai-edge-quantizer's dynamic_wi8_afp32."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    del samples
    float_path = path.with_name("float_" + path.name)
    litert_torch.convert(module, (example,)).export(str(float_path))
    work = quantizer.Quantizer(str(float_path))
    work.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    work.quantize().export_model(str(path), overwrite=True)


def onnx_dynamic(module: torch.nn.Module, example: torch.Tensor, samples: Samples, path: Path) -> None:
    """torch.onnx.export, then quantize_dynamic with its defaults."""
    import onnx as onnx_format
    from onnxruntime.quantization import quantize_dynamic

    float_path = path.with_name("float_" + path.name)
    program = torch.onnx.export(module, (example,), dynamo=True, opset_version=18, input_names=[next(iter(samples[0]))])
    assert program is not None
    program.save(str(float_path), external_data=False)
    graph = onnx_format.load(str(float_path))
    del graph.graph.value_info[:]  # quantize_dynamic stumbles over the exporter's own
    onnx_format.save(graph, str(float_path))
    quantize_dynamic(str(float_path), str(path))


def executorch_dynamic(module: torch.nn.Module, example: torch.Tensor, samples: Samples, path: Path) -> None:
    """PT2E with the stock XNNPACKQuantizer's dynamic configuration."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    del samples
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    graph = torch.export.export(module, (example,)).module(check_guards=False)
    prepared = prepare_pt2e(graph, XNNPACKQuantizer().set_global(config))
    with torch.no_grad():
        prepared(example)
    lowered = to_edge_transform_and_lower(
        torch.export.export(convert_pt2e(prepared), (example,)), partitioner=[XnnpackPartitioner()]
    )
    path.write_bytes(lowered.to_executorch().buffer)


ROUTES = {
    "litert": litert,
    "litert channel-last": litert_channel_last,
    "onnx": onnx,
    "onnx per-channel U8S8": onnx_u8s8,
    "executorch": executorch,
    "litert dynamic": litert_dynamic,
    "onnx dynamic": onnx_dynamic,
    "executorch dynamic": executorch_dynamic,
}


def build(route: str, module: torch.nn.Module, example: torch.Tensor, samples: Samples, path: Path) -> None:
    """Run one route with the vendors' warnings silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ROUTES[route](module, example, samples, path)
