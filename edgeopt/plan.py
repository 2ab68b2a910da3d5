"""Everything that can be decided or refused before the first minute of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.accelerators import load_accelerator
from edgeopt.bundle.licences_metadata import spdx
from edgeopt.compression.steps import Qat
from edgeopt.config import RunConfig, resolve_gates
from edgeopt.device_profiles import list_devices, load_device
from edgeopt.errors import ConfigError, ConversionError, MissingError, UsageError
from edgeopt.examples import EXAMPLES
from edgeopt.exporter import load_exporter
from edgeopt.runtimes import load_runtime, runtimes_here
from edgeopt.targets import load_target
from edgeopt.types import EstimatorSpec, Finding, Gates, LayerRules, Model, Sample, Scheme
from edgeopt.validation.phones import check_phone

if TYPE_CHECKING:
    from edgeopt.datasets import DataSource
    from edgeopt.datasets.base import Dataset
    from edgeopt.device_profiles.schema import DeviceProfile
    from edgeopt.targets.schema import Target
    from edgeopt.validation.metrics import Metric

DEFAULT_TARGET = "android-int8"
#: Held-out samples used for fidelity when the user names no evaluation set.
HELD_OUT_SAMPLES = 200


@dataclass(frozen=True, slots=True)
class Job:
    """One bundle to build: a target with the user's overrides applied, its runtimes those that work on this machine.

    `scheme.npu` is the device's accelerator. `recipe` names passes in the order in which they run; ("auto",) has them
    searched for.
    """

    target: Target
    device: DeviceProfile
    scheme: Scheme
    estimator: EstimatorSpec
    gates: Gates
    recipe: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Data:
    """The samples of a run. `origin` says what the evaluation samples are, for the report."""

    calibration: Dataset | None
    evaluation: Dataset
    origin: Literal["evaluation set", "held out of the calibration set", "calibration set", "example input"]
    findings: tuple[Finding, ...]


def with_example(config: RunConfig) -> RunConfig:
    """The configuration with the named example's model and data where the user gave none of his own."""
    if config.example is None:
        if config.model is None:
            raise UsageError(
                "no model given",
                fix="name one (file.py:factory, model.onnx, model.pt2, hf:DIR), or run a built-in: --example digits",
            )
        return config
    if config.model is not None:
        raise UsageError("both a model and --example are given", fix="drop one of them")
    example = EXAMPLES.get(config.example)
    if example is None:
        near = get_close_matches(config.example, EXAMPLES, n=1, cutoff=0.0)[0]
        raise UsageError(f"no example {config.example!r}", fix=f"did you mean {near!r}?")
    own_data = config.calibration is not None
    return replace(
        config,
        example=None,
        model=example.model,
        calibration=config.calibration or example.calibration,
        train=config.train or (example.calibration if config.step and not own_data else None),
        evaluation=config.evaluation or (None if own_data else example.evaluation),
    )


#: The best epoch is the one that did best on these samples, by luck too.
_EVALUATED_ON_VALIDATION_DATA = Finding(
    "evaluated-on-validation-data",
    "evaluation",
    "the result is proven on the samples that chose among epochs or rounds, which flatters it; give --evaluation DATA",
)
_EVALUATED_ON_TRAINING_DATA = Finding(
    "evaluated-on-training-data",
    "evaluation",
    "the result is proven on samples that it was trained on; give --validation DATA or --evaluation DATA",
)


def with_training_data(config: RunConfig) -> tuple[RunConfig, tuple[Finding, ...]]:
    """The configuration with the training data for calibration and the validation data for evaluation where it names
    none of its own, and what that makes of the proof."""
    if config.train is None:
        return config, ()
    calibration = config.train if config.calibration is None else config.calibration
    evaluation = config.validation if config.evaluation is None else config.evaluation
    proof = calibration if evaluation is None else evaluation
    findings: tuple[Finding, ...] = ()
    if _same(proof, config.train):
        findings = (_EVALUATED_ON_TRAINING_DATA,)
    elif _same(proof, config.validation):
        findings = (_EVALUATED_ON_VALIDATION_DATA,)
    return replace(config, calibration=calibration, evaluation=evaluation), findings


def _same(one: DataSource, other: DataSource | None) -> bool:
    return one is other or (isinstance(one, str) and one == other)


def plan_jobs(config: RunConfig) -> tuple[Job, ...]:
    """Resolve every target; raises before any work when one can't be built or validated on this machine."""
    if config.licence is not None and spdx(config.licence) is None:
        raise ConfigError(
            f"{config.licence!r} is no SPDX expression",
            where="licence",
            fix="such as Apache-2.0, MIT OR Apache-2.0, or LicenseRef-NAME for one of your own",
        )
    jobs = tuple(_job(name, config) for name in dict.fromkeys(config.target or (DEFAULT_TARGET,)))
    for job in jobs:
        if job.scheme.needs_calibration and config.calibration is None:
            data = "--train or --calibration DATA" if config.step else "--calibration DATA"
            raise UsageError(
                f"target {job.target.name!r} quantizes statically and needs sample data",
                fix=f"give {data} (some hundred real inputs), or take a target that needs none, such as "
                "android-int8-dynamic",
            )
        for phone in config.verify_on:
            check_phone(phone, job.target)
    names = [job.target.name for job in jobs]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"two targets are called {doubled!r}, and would write the same bundle", fix="rename one of the files"
        )
    return jobs


def _with_runtimes(target: Target) -> Target:
    """The target with the runtimes that will prove it on this machine."""
    where = f"target {target.name!r}"
    try:
        for name in (*target.runtimes, *target.emulators):
            if target.format not in load_runtime(name).formats:
                raise ConfigError(f"makes {target.format}, which the runtime {name!r} does not run")
        return replace(target, runtimes=runtimes_here(target.runtimes, target.emulators))
    except (ConfigError, MissingError) as error:
        raise type(error)(error.problem, where=where, fix=error.fix) from error


def _with_npu(scheme: Scheme, target: Target, device: DeviceProfile) -> Scheme:
    """The scheme for the device's accelerator, where the target wants one."""
    if target.accelerator is None:
        return scheme
    npu = device.npu(target.accelerator)
    if npu is None:
        has = ", ".join(npu.kind for npu in device.npus) or "none"
        others = ", ".join(one.name for one in list_devices() if one.npu(target.accelerator) is not None)
        raise UsageError(
            f"has no {target.accelerator}, which target {target.name!r} is for (its accelerators: {has})",
            where=f"device {device.name!r}",
            fix=f"take one of {others}",
        )
    accelerator = load_accelerator(target.format, target.accelerator)
    if (reason := accelerator.unavailable()) is not None:
        raise MissingError(reason, where=f"target {target.name!r}")
    return replace(scheme, npu=npu)


def _job(name: str, config: RunConfig) -> Job:
    target = _with_runtimes(load_target(name))
    device = load_device(config.device or target.device)
    if target.format not in device.formats:
        raise UsageError(
            f"takes {', '.join(device.formats)}, and target {target.name!r} makes {target.format}",
            where=f"device {device.name!r}",
            fix="see `edgeopt devices`",
        )
    estimator = EstimatorSpec(
        name=config.estimator or target.estimator.name,
        percentile=config.percentile if config.percentile is not None else target.estimator.percentile,
    )
    scheme = replace(target.scheme, io=config.io) if config.io is not None else target.scheme
    scheme = _with_npu(scheme, target, device)
    rules = LayerRules(config.keep_float, config.int16_activations)
    if (problem := load_exporter(target.format, target.accelerator).unsupported(scheme, rules)) is not None:
        raise ConversionError(problem, where=f"target {target.name!r}")
    recipe = config.recipe or target.recipe
    if recipe == ("none",) or not scheme.is_quantized:
        recipe = ()
    gates = target.gates
    if not all(isinstance(step, Qat) for step in config.step):
        # They judge quantization; a smaller network that answers as well has other logits all the same.
        gates = replace(gates, min_sqnr_db=None, min_agreement=None)
    return Job(target, device, scheme, estimator, resolve_gates(gates, config), recipe)


def with_preprocessing(config: RunConfig, model: Model) -> Model:
    """The model with the preprocessing that its data gets, so that the bundle can tell the app."""
    from edgeopt.datasets import resolve_preprocessing

    data = config.calibration or config.evaluation
    if data is None or model.preprocessing is not None:
        return model
    return replace(model, preprocessing=resolve_preprocessing(data, model.inputs, None))


def open_data(config: RunConfig, model: Model, jobs: tuple[Job, ...]) -> Data:
    """Open the data sets and choose the samples; the same seed always chooses the same ones."""
    from edgeopt.datasets import match_labels, open_dataset, select

    def opened(spec: DataSource) -> Dataset:
        return match_labels(open_dataset(spec, model.inputs, model.preprocessing), model.labels)

    calibration: Dataset | None = None
    rest: Dataset | None = None
    if config.calibration is not None:
        source = opened(config.calibration)
        chosen = select(source, config.num_calibration_samples, config.seed)
        if config.step or any(job.scheme.needs_calibration or job.recipe for job in jobs):
            calibration = chosen
        if len(chosen) < len(source):
            count = config.num_evaluation_samples or HELD_OUT_SAMPLES
            rest = select(source, count, config.seed, exclude=frozenset(chosen.indices))
    if config.evaluation is not None:
        evaluation = opened(config.evaluation)
        return Data(calibration, select(evaluation, config.num_evaluation_samples, config.seed), "evaluation set", ())
    if rest is not None:
        return Data(calibration, rest, "held out of the calibration set", ())
    if config.calibration is not None:
        finding = Finding(
            "evaluated-on-calibration-data",
            "evaluation",
            "the calibration set has no samples to spare, so fidelity is measured on the very samples that set the "
            "ranges; give --evaluation DATA",
        )
        return Data(calibration, chosen, "calibration set", (finding,))
    finding = Finding(
        "evaluated-on-example-input",
        "evaluation",
        "no data was given, so fidelity is measured on the model's example input alone; give --evaluation DATA",
    )
    return Data(None, ExampleInput(model), "example input", (finding,))


class ExampleInput:
    """The model's own example input as a data set of one."""

    is_labelled = False
    class_names: tuple[str, ...] = ()

    def __init__(self, model: Model) -> None:
        self._sample = Sample(model.example_inputs, None, "example input")

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        if index != 0:
            raise IndexError(index)
        return self._sample

    def __iter__(self) -> Iterator[Sample]:
        yield self._sample

    def fingerprint(self) -> str:
        from hashlib import sha256

        digest = sha256()
        for name, values in sorted(self._sample.inputs.items()):
            digest.update(name.encode())
            digest.update(values.tobytes())
        return digest.hexdigest()


def bundle_path(config: RunConfig, model: Model, job: Job) -> Path:
    return config.output_dir / f"{model.name}-{job.target.name}"


def load(config: RunConfig) -> Model:
    """Load the model that the configuration names, with what it says about it."""
    from edgeopt.datasets import load_preprocessing
    from edgeopt.sources import SourceOptions, load_model, parse_input

    if config.model is None:
        raise ValueError("with_example must have run")
    options = SourceOptions(
        weights=config.weights,
        name=config.name,
        inputs=tuple(parse_input(text) for text in config.input),
        preprocessing=load_preprocessing(config.preprocessing) if config.preprocessing is not None else None,
        labels=_read_labels(config.labels) if config.labels is not None else (),
        task=config.task,
        max_source_length=config.max_source_length,
        max_target_length=config.max_target_length,
    )
    return load_model(config.model, options)


def metric_of(config: RunConfig, model: Model, evaluation: Dataset) -> Callable[[], Metric] | None:
    """The user's metric; else top-1 where the data has class indices and the model class scores; else none.

    Raises UsageError for an unknown metric, and when the user limits the accuracy drop where there is no metric.
    """
    from edgeopt.validation.metrics import load_metric

    if config.metric is not None:
        return load_metric(config.metric)
    has_classes = evaluation.is_labelled and isinstance(evaluation[0].label, int)
    has_scores = any(len(spec.shape) == 2 and spec.shape[-1] not in (0, 1) for spec in model.outputs)
    if has_classes and has_scores:
        return load_metric("top1")
    limits = {"max-accuracy-drop": config.max_accuracy_drop, "min-accuracy-kept": config.min_accuracy_kept}
    if limited := next((key for key, limit in limits.items() if limit is not None), None):
        raise UsageError(
            "can't be measured: the evaluation data have no class labels, or the model no class scores",
            where=limited,
            fix="give labelled data with --evaluation DATA, or name your own --metric file.py:function",
        )
    return None


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't be read: {error}", where=str(path), fix="one class name per line, UTF-8") from error
    return tuple(line.strip() for line in lines if line.strip())
