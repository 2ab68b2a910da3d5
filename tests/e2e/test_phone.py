"""The emulated phone for real: files of all formats on several cores, against the same runtimes on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from edgeopt.errors import ConversionError, DataError
from edgeopt.native import SOURCES
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.types import Array, Format, Signature, SignatureTensor

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("emulator")]

#: The oldest cores, those with dot products, those with matrix products, and those with SVE2.
CORES = ("cortex-a53", "cortex-a76", "cortex-a710", "neoverse-n2")


def _stored(dtype: Literal["int8", "uint8"], shape: tuple[int, ...]) -> Signature:
    """What the int8 networks of edgeopt/native/selftest take and give."""
    return Signature(
        (SignatureTensor("image", "image", shape, dtype, dtype),),
        (SignatureTensor("output", "output", (1, 10), dtype, dtype),),
    )


STORED: Mapping[Format, tuple[Path, Signature]] = {
    "litert": (SOURCES / "selftest/model.tflite", _stored("int8", (1, 16, 16, 3))),
    "onnx": (SOURCES / "selftest/model.onnx", _stored("uint8", (1, 3, 16, 16))),
    "executorch": (SOURCES / "selftest/model.pte", _stored("int8", (1, 3, 16, 16))),
}


def _sample(signature: Signature, seed: int) -> dict[str, Array]:
    (tensor,) = signature.inputs
    limits = np.iinfo(tensor.dtype)
    values = np.random.default_rng(seed).integers(limits.min, limits.max, tensor.shape, tensor.dtype, endpoint=True)
    return {tensor.name: values}


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("format_", STORED)
def test_an_int8_network_agrees_with_this_machine(format_: Format, core: str) -> None:
    path, signature = STORED[format_]
    host, phone = load_runtime(HOST_RUNTIMES[format_]), load_runtime(f"phone:{core}")
    with host.open(path, signature) as here, phone.open(path, signature) as there:
        for seed in range(3):
            sample = _sample(signature, seed)
            np.testing.assert_array_equal(there.run(sample)["output"], here.run(sample)["output"])


def test_a_float_network_follows_free_sizes_and_agrees_to_rounding(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    weights = np.random.default_rng(0).standard_normal((40, 9)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "y"], ["sum"]),
            helper.make_node("MatMul", ["sum", "w"], ["product"]),
            helper.make_node("Softmax", ["product"], ["scores"]),
        ],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 40]) for name in ("x", "y")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", w]) for name, w in (("scores", 9), ("sum", 40))],
        [numpy_helper.from_array(weights, "w")],
    )
    path = tmp_path / "float.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    # The model's names and order are not the file's.
    inputs = tuple(SignatureTensor(f"my {n}", n, ("n", 40), "float32", "float32") for n in ("y", "x"))
    outputs = tuple(
        SignatureTensor(name, native, ("n", width), "float32", "float32")
        for name, native, width in (("total", "sum", 40), ("result", "scores", 9))
    )
    signature = Signature(inputs, outputs)
    random = np.random.default_rng(1)
    with (
        load_runtime("onnxruntime").open(path, signature) as here,
        load_runtime("phone:pixel-4").open(path, signature, threads=2) as there,
    ):
        for rows in (1, 7, 3):
            sample = {f"my {name}": random.standard_normal((rows, 40)).astype(np.float32) for name in ("x", "y")}
            wanted, found = here.run(sample), there.run(sample)
            np.testing.assert_array_equal(found["total"], wanted["total"])
            np.testing.assert_allclose(found["result"], wanted["result"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("format_", STORED)
def test_goes_on_after_what_does_not_fit(format_: Format) -> None:
    path, signature = STORED[format_]
    with load_runtime("phone:cortex-a76").open(path, signature) as session:
        with pytest.raises(DataError, match="input 'image': has the shape"):
            session.run({"image": np.zeros((1, 3, 8, 8), signature.inputs[0].dtype)})
        assert session.run(_sample(signature, 0))["output"].shape == (1, 10)


@pytest.mark.parametrize("format_", STORED)
def test_more_threads_compute_the_same(format_: Format) -> None:
    path, signature = STORED[format_]
    results = []
    for threads in (1, 4):
        with load_runtime("phone:cortex-a76").open(path, signature, threads) as session:
            results.append(session.run(_sample(signature, 5))["output"])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("format_", STORED)
def test_a_file_that_was_cut_off_is_one_line(format_: Format, keep: float, tmp_path: Path) -> None:
    """LiteRT and ExecuTorch trust what they read: some such files end their process, and must not end ours."""
    whole, signature = STORED[format_]
    path = tmp_path / whole.name
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * keep)])
    with pytest.raises(ConversionError) as error:
        load_runtime("phone:cortex-a76").open(path, signature)
    assert "\n" not in error.value.line()
    assert error.value.line().startswith(f"{path.name}: ")
