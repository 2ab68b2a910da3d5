"""The runtimes' own benchmark programs: how each is called, and what it prints.

They time a model well, but not all of them take inputs from files and write outputs; what they can't do is reported as
not checked.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .programs import Figures, Program

if TYPE_CHECKING:
    from .contents import Contents, Vector
    from .device import Workspace

_NUMBER = r"([0-9.eE+-]+)"


class Benchmark(Program):
    """A program at `path` on the device."""

    #: Names under which devices have it, newest first.
    programs: tuple[str, ...]

    def __init__(self, contents: Contents, workspace: Workspace, model: str, threads: int, path: str) -> None:
        super().__init__(contents, workspace, model, threads)
        self._path = path
        self.name = self.programs[0]


class LiteRTBenchmark(Benchmark):
    """`benchmark_model` of LiteRT and TensorFlow Lite; newer ones write outputs.

    Flags: tensorflow/lite/tools/benchmark/README.md. It takes and gives tensors by position, whatever their names, and
    a file's order need not be the signature's: with several inputs or outputs, the outputs are not compared.
    """

    programs = ("benchmark_model", "android_aarch64_benchmark_model", "linux_aarch64_benchmark_model")

    def run(self, vector: Vector, paths: list[str], warmup: int, runs: int, mask: str, seconds: float) -> Figures:
        names = [stored.tensor.native_name for stored in vector.inputs]
        shapes = [",".join(map(str, stored.shape)) for stored in vector.inputs]
        files = [f"{name.replace(':', '::')}:{path}" for name, path in zip(names, paths)]
        # A least time of 0 keeps it from running more often than asked.
        arguments = [
            self._path, f"--graph={self.model}", f"--num_threads={self.threads}", f"--num_runs={max(runs, 1)}",
            f"--warmup_runs={max(warmup, 1)}", "--min_secs=0", "--warmup_min_secs=0", f"--max_secs={seconds:.0f}",
            "--report_peak_memory_footprint=true", f"--input_layer={','.join(names)}",
            f"--input_layer_shape={':'.join(shapes)}", f"--input_layer_value_files={','.join(files)}",
            "--output_filepath=out/all",
        ]  # fmt: skip
        reply = self.call(arguments, mask, seconds)
        text = f"{reply.text}\n{reply.errors}"
        timings = _numbers(
            text,
            rf"Init: {_NUMBER}, First inference: {_NUMBER}, Warmup \(avg\): {_NUMBER}, Inference \(avg\): {_NUMBER}",
        )
        peak = _numbers(text, rf"Overall peak memory footprint \(MB\).*?: {_NUMBER}") or _numbers(
            text, rf"overall={_NUMBER}"
        )
        return Figures(
            load_ms=timings[0] / 1e3 if timings else None,
            first_ms=timings[1] / 1e3 if timings else None,
            latencies_ms=(),
            summary_ms=_micro_summary(text, timings),
            peak_bytes=int(peak[0] * (1 << 20)) if peak else None,
            outputs=self._outputs(vector),
        )

    def _outputs(self, vector: Vector) -> tuple[bytes, ...] | None:
        """The file's one output; None where this version wrote none, or where it isn't clear which is which."""
        if len(vector.inputs) != 1 or len(vector.outputs) != 1:
            return None
        listing = self.workspace.device.call("digest", f"{self.workspace.path}/out/all").text.split()
        if len(listing) != 2 or listing[1] != str(vector.outputs[0].size_bytes):
            return None
        return (self.workspace.get("out/all"),)


class ExecuTorchRunner(Benchmark):
    """`executor_runner` of ExecuTorch; takes inputs from files, and writes outputs where it is new enough."""

    programs = ("executor_runner", "xnn_executor_runner")

    def run(self, vector: Vector, paths: list[str], warmup: int, runs: int, mask: str, seconds: float) -> Figures:
        del warmup
        arguments = [
            self._path, f"--model_path={self.model}", f"--inputs={','.join(paths)}", f"--num_executions={max(runs, 1)}",
            f"--cpu_threads={self.threads}", "--output_file=out/output",
        ]  # fmt: skip
        reply = self.call(arguments, mask, seconds)
        total = _numbers(f"{reply.text}\n{reply.errors}", rf"executed successfully {_NUMBER} time\(s\) in {_NUMBER} ms")
        mean = total[1] / total[0] if total and total[0] else None
        return Figures(
            load_ms=None,
            first_ms=None,
            latencies_ms=(),
            summary_ms={"mean": mean} if mean is not None else {},
            peak_bytes=None,
            outputs=self._outputs(vector),
        )

    def _outputs(self, vector: Vector) -> tuple[bytes, ...] | None:
        names = [f"out/output-{k}.bin" for k in range(len(vector.outputs))]
        for name, stored in zip(names, vector.outputs):
            listing = self.workspace.device.call("digest", f"{self.workspace.path}/{name}").text.split()
            if len(listing) != 2 or listing[1] != str(stored.size_bytes):
                return None
        return tuple(self.workspace.get(name) for name in names)


class OnnxPerfTest(Benchmark):
    """`onnxruntime_perf_test`; it makes up its inputs (-I) and writes no outputs."""

    programs = ("onnxruntime_perf_test",)

    def run(self, vector: Vector, paths: list[str], warmup: int, runs: int, mask: str, seconds: float) -> Figures:
        del vector, paths, warmup
        arguments = [
            self._path, "-e", "cpu", "-I", "-m", "times", "-r", str(max(runs, 1)), "-x", str(self.threads), self.model,
            "out/times.csv",
        ]  # fmt: skip
        text = self.call(arguments, mask, seconds).text
        load = _numbers(text, rf"Session creation time cost: ?{_NUMBER} s")
        average = _numbers(text, rf"Average inference time cost(?: total)?: ?{_NUMBER} ms")
        peak = _numbers(text, r"Peak working set size: ?(\d+) bytes")
        summary = {"mean": average[0]} if average else {}
        for key, label in (("min", "Min"), ("max", "Max"), ("p50", "P50"), ("p90", "P90")):
            found = _numbers(text, rf"{label} Latency(?: is|:) ?{_NUMBER} s")
            if found:
                summary[key] = found[0] * 1e3
        return Figures(
            load_ms=load[0] * 1e3 if load else None,
            first_ms=None,
            latencies_ms=(),
            summary_ms=summary,
            peak_bytes=int(peak[0]) if peak else None,
            outputs=None,
        )


#: By the format of the model.
BENCHMARKS: dict[str, type[Benchmark]] = {
    "litert": LiteRTBenchmark,
    "executorch": ExecuTorchRunner,
    "onnx": OnnxPerfTest,
}


def _micro_summary(text: str, timings: list[float]) -> dict[str, float]:
    """The last line of statistics, in microseconds: "count=50 first=.. curr=.. min=.. max=.. avg=.. std=.." and, in
    newer versions, "median=.."."""
    summary = {"mean": timings[3] / 1e3} if timings else {}
    lines = [line for line in text.splitlines() if line.lstrip().startswith("count=") or " count=" in line]
    if lines:
        values = {key: float(value) for key, value in re.findall(rf"(\w+)={_NUMBER}", lines[-1])}
        for key, name in (("min", "min"), ("max", "max"), ("p50", "median"), ("mean", "avg")):
            if name in values:
                summary[key] = values[name] / 1e3
    return summary


def _numbers(text: str, pattern: str) -> list[float]:
    """The groups of the last match; empty where there is none."""
    matches = list(re.finditer(pattern, text))
    return [float(group) for group in matches[-1].groups()] if matches else []
