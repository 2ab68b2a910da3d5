"""Makes every artifact of a run once, however many targets ask for it."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.calibration.ranges import Range
from edgeopt.compression.base import PassInputs
from edgeopt.errors import EdgeoptError
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest, check_keep_float
from edgeopt.sources import as_torch
from edgeopt.types import Artifact, EstimatorSpec, Finding, Format, LayerRules, Model, Sample, Scheme, StepRecord

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress

_Key = tuple[Format, Scheme, EstimatorSpec, LayerRules]


@dataclass(frozen=True, slots=True)
class _Observed:
    """What the calibration samples have shown so far, which does not depend on the layers' rules.

    Findings are kept beside the ranges: only the conversion that runs the samples is told of them, and those that
    take its ranges are as much concerned.
    """

    ranges: dict[str, Range] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)


#: Bytes of a float file from which on the garbage of its conversions counts.
LARGE = 1 << 26
#: The one format that takes a native graph as it is; every other goes through torch.
NATIVE_FORMAT: dict[str, Format] = {"onnx": "onnx", "savedmodel": "litert", "keras": "litert"}


class Workbench:
    """Exports one model. Files lie below `directory`, which outlives the run only if the caller wants it to.

    Raises UsageError when a pattern of `rules` matches none of the model's layers.
    """

    def __init__(
        self,
        model: Model,
        calibration: Dataset | None,
        rules: LayerRules,
        seed: int,
        directory: Path,
        progress: Progress,
    ) -> None:
        check_keep_float(model, (*rules.keep_float, *rules.int16_activations))
        self.model = model
        self.rules = rules
        self._calibration = calibration
        self._seed = seed
        self._directory = directory
        self._progress = progress
        self._floats: dict[Format, Artifact] = {}
        self._refused: dict[Format, EdgeoptError] = {}
        self._quantized: dict[_Key, tuple[Artifact, tuple[Finding, ...]]] = {}
        self._observed: dict[tuple[Format, Scheme, EstimatorSpec], _Observed] = {}
        self._torch_model: Model | None = None
        self._variants = 0
        self._conversions = 0

    def variant(self, model: Model) -> Workbench:
        """A workbench for a changed model: same data, same rules, files of its own."""
        self._variants += 1
        directory = self._directory / f"variant-{self._variants}"
        directory.mkdir()
        return Workbench(model, self._calibration, self.rules, self._seed, directory, self._progress)

    def torch_model(self) -> Model:
        """The model with a torch module, which compression passes need."""
        return self.model if self.model.module is not None else self._rebuilt()

    def pass_inputs(self, scheme: Scheme, estimator: EstimatorSpec) -> PassInputs:
        """What compression passes are given in this run."""
        data = self._calibration
        samples = (lambda: iter(data)) if data is not None else None
        count = len(data) if data is not None else 0
        return PassInputs(scheme, samples, count, self._seed, self._progress, estimator, self.rules)

    def float_artifact(self, format_: Format) -> Artifact:
        """The fp32 file of that format. A conversion that failed is not tried again: it raises what it raised."""
        if format_ in self._refused:
            raise self._refused[format_]
        if format_ not in self._floats:
            self._progress.step(f"Exporting fp32 ({format_})")
            try:
                with self._folder(f"{format_}-fp32") as directory:
                    self._floats[format_] = load_exporter(format_).export_float(self._model_for(format_), directory)
            except EdgeoptError as error:
                self._refused[format_] = error
                raise
            _give_back(self._floats[format_])
        return self._floats[format_]

    def quantized_artifact(
        self, format_: Format, scheme: Scheme, estimator: EstimatorSpec, rules: LayerRules | None = None
    ) -> tuple[Artifact, tuple[Finding, ...]]:
        """The file at that scheme, and what calibration found odd about its activations.

        A second file that differs only in `rules` costs its conversion alone: activation ranges are kept.
        """
        rules = self.rules if rules is None else rules
        key = (format_, scheme, estimator, rules)
        if key not in self._quantized:
            float_artifact = self.float_artifact(format_)
            self._progress.step(f"Converting to {scheme.precision} ({format_})")
            observed = self._observed.setdefault((format_, scheme, estimator), _Observed())
            run = self._calibration_run(scheme, estimator, observed)
            request = QuantizationRequest(scheme, run, rules)
            model = self._model_for(format_)
            kind = scheme.npu.kind if scheme.npu is not None else None
            if run is not None:
                step = self._calibration_step(run)
                model = replace(model, history=(*model.history, step))
                float_artifact = replace(float_artifact, history=(*float_artifact.history, step))
            self._conversions += 1
            with self._folder(f"{format_}-{self._conversions}") as directory:
                artifact = load_exporter(format_, kind).export_quantized(model, float_artifact, request, directory)
            self._quantized[key] = (artifact, tuple(observed.findings))
            _give_back(float_artifact)
        return self._quantized[key]

    def discard(self, format_: Format, scheme: Scheme, estimator: EstimatorSpec, rules: LayerRules) -> None:
        """Delete that quantized file, if it was made; who asks for it again gets the same bytes from a new
        conversion. The ranges stay."""
        made = self._quantized.pop((format_, scheme, estimator, rules), None)
        if made is not None:
            shutil.rmtree(made[0].path.parent)

    def clear(self) -> None:
        """Delete all files made so far, but not those of variants."""
        files = [*self._floats.values(), *(artifact for artifact, _ in self._quantized.values())]
        self._floats.clear()
        self._quantized.clear()
        for artifact in files:
            shutil.rmtree(artifact.path.parent)

    def _model_for(self, format_: Format) -> Model:
        if self.model.native is None or NATIVE_FORMAT[self.model.native.kind] == format_:
            return self.model
        return self._rebuilt()

    def _rebuilt(self) -> Model:
        if self._torch_model is None:
            self._progress.step("Rebuilding the graph in torch")
            self._torch_model = as_torch(self.model)
        return self._torch_model

    def _calibration_run(self, scheme: Scheme, estimator: EstimatorSpec, observed: _Observed) -> CalibrationRun | None:
        data = self._calibration
        if not scheme.needs_calibration or data is None:
            return None

        def samples() -> Iterator[Sample]:
            return self._progress.track(data, "Calibrating", len(data))

        return CalibrationRun(samples, len(data), estimator, observed.add, observed.ranges)

    def _calibration_step(self, run: CalibrationRun) -> StepRecord:
        assert self._calibration is not None
        config: dict[str, str | int | float | bool | None] = {
            "estimator": run.estimator.name,
            "samples": run.count,
            "seed": self._seed,
            "data_sha256": self._calibration.fingerprint(),
        }
        if run.estimator.name == "percentile":
            config["percentile"] = run.estimator.percentile
        return StepRecord("calibrate", config)

    @contextmanager
    def _folder(self, name: str) -> Iterator[Path]:
        """A new folder, which stays if what is written to it is whole."""
        directory = self._directory / name
        directory.mkdir()
        try:
            yield directory
        except BaseException:
            shutil.rmtree(directory)
            raise


def _give_back(float_artifact: Artifact) -> None:
    """Return to the system what a large network's conversion has freed: cycles of graph nodes hold its weights, and the
    C library keeps freed memory for a next time that may want it in other pieces."""
    if float_artifact.size_bytes < LARGE:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)
