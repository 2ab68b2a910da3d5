"""Whether a rewritten .tflite file still computes what it did: both run on LiteRT's reference kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from edgeopt.errors import ConversionError
from edgeopt.types import Array

if TYPE_CHECKING:
    from ai_edge_litert import interpreter as litert

#: Random inputs that both files are run on.
_INPUTS = 2
#: What another rounding of single operators may cost by the time it reaches an output that is more than a step off.
_MIN_SQNR_DB = 40.0


def check_results(before: Path, after: Path, *, exact: bool) -> None:
    """Run both files on the same random inputs; integers take all values, other indices only the first two.

    Args:
        exact: whether every output must be equal to the last bit; otherwise it may be a step of int8 off, or what
            such steps make of it in later layers.

    Raises:
        ConversionError: they differ, or LiteRT can't run one of them.
    """
    runners = [_Runner(path) for path in (before, after)]
    for seed in range(_INPUTS):
        inputs = runners[0].random_inputs(seed)
        wanted, got = (runner.run(inputs) for runner in runners)
        if wanted.keys() != got.keys():
            raise ConversionError("the rewrite for the Edge TPU changed the outputs", where=str(after))
        for name, values in wanted.items():
            same = np.array_equal(values, got[name], equal_nan=values.dtype.kind == "f")
            if not same and (exact or not runners[0].is_near(name, values, got[name])):
                raise ConversionError(
                    "the file rewritten for the Edge TPU computes something else",
                    where=f"output {name!r}",
                    fix="report it, with the model",
                )


class _Detail(TypedDict):
    """What LiteRT tells about a tensor."""

    index: int
    shape: Array
    dtype: type
    quantization: tuple[float, int]


_Details = dict[str, _Detail]


class _Runner:
    """One file on the reference kernels. Tensors go by the signature's names, or by their position without one."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert import interpreter as litert

        self._path = path
        try:
            self._interpreter = litert.Interpreter(
                str(path), experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ConversionError(f"LiteRT refuses the file: {error}", where=str(path)) from error
        self._inputs, self._outputs = _details(self._interpreter)

    def random_inputs(self, seed: int) -> dict[str, Array]:
        random = np.random.default_rng(seed)
        made: dict[str, Array] = {}
        for name, detail in self._inputs.items():
            shape, dtype = tuple(int(n) for n in detail["shape"]), np.dtype(str(np.dtype(detail["dtype"])))
            if dtype.kind == "f":
                made[name] = random.standard_normal(shape).astype(dtype)
            elif dtype.itemsize <= 2 and dtype.kind in "iu":
                info = np.iinfo(dtype)
                made[name] = random.integers(info.min, info.max, shape, dtype, endpoint=True)
            else:
                made[name] = random.integers(0, 2, shape).astype(dtype)
        return made

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        for name, detail in self._inputs.items():
            self._interpreter.set_tensor(detail["index"], inputs[name])
        try:
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ConversionError(f"LiteRT can't run the file: {error}", where=str(self._path)) from error
        return {name: self._interpreter.get_tensor(detail["index"]) for name, detail in self._outputs.items()}

    def is_near(self, name: str, wanted: Array, got: Array) -> bool:
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            return False
        _, zero_point = self._outputs[name]["quantization"]
        signal, noise = wanted.astype(np.float64) - zero_point, wanted.astype(np.float64) - got
        if wanted.dtype.kind in "iu" and np.abs(noise).max() <= 1:
            return True
        return bool(np.square(signal).sum() >= np.square(noise).sum() * 10 ** (_MIN_SQNR_DB / 10))


def _details(interpreter: litert.Interpreter) -> tuple[_Details, _Details]:
    if interpreter.get_signature_list():
        runner = interpreter.get_signature_runner()
        return runner.get_input_details(), runner.get_output_details()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    return {str(i): d for i, d in enumerate(inputs)}, {str(i): d for i, d in enumerate(outputs)}
