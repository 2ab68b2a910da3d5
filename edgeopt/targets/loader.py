"""The TOML form of a target, and how one is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from edgeopt.errors import ConfigError
from edgeopt.targets.schema import BYTES_PER_MB, Target
from edgeopt.toml_data import Form, find_file, parse, read_with_bases
from edgeopt.types import EstimatorSpec, Format, Gates, NpuKind, PassName, Precision, Scheme

DIRECTORY = Path(__file__).parent

Text = Annotated[str, Field(min_length=1)]


def _off_is_none(value: object) -> object:
    """ "off" drops a gate that an extended target sets; TOML has no null for it."""
    return None if value == "off" else value


Fraction = Annotated[Annotated[float, Field(ge=0, le=1)] | None, BeforeValidator(_off_is_none)]
Positive = Annotated[Annotated[float, Field(gt=0, le=1e12)] | None, BeforeValidator(_off_is_none)]
Count = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_off_is_none)]
Decibels = Annotated[float | None, BeforeValidator(_off_is_none)]


class SchemeForm(Form):
    precision: Precision
    activations: Literal["none", "static", "dynamic"]
    weight_granularity: Literal["per-channel", "per-tensor", "per-group"] = "per-channel"
    activation_symmetric: bool = False
    io: Literal["float", "int8"] = "float"
    weight_symmetric: bool = True
    scale: Literal["any", "power-of-two"] = "any"
    weight_estimator: Literal["max", "mse", "hqq"] = "max"
    weight_values: Literal["linear", "logarithmic", "k-means"] = "linear"
    group_size: Annotated[int, Field(ge=2, le=65_536)] = 32


class CalibrationForm(Form):
    estimator: Literal["min-max", "percentile", "entropy", "mse"] = "min-max"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.999


class GatesForm(Form):
    max_accuracy_drop: Fraction = None
    min_accuracy_kept: Fraction = None
    min_agreement: Fraction = None
    min_sqnr_db: Decibels = None
    min_speedup: Positive = None
    max_latency_ms: Positive = None
    max_size_mb: Positive = None
    max_peak_memory_mb: Positive = None
    max_cpu_operators: Count = None
    min_accelerated: Fraction = None
    max_instructions: Count = None


class AdviceForm(Form):
    accuracy_drop: Text | None = None
    agreement: Text | None = None
    sqnr_db: Text | None = None
    speedup: Text | None = None
    latency_ms: Text | None = None
    size_bytes: Text | None = None
    peak_memory_bytes: Text | None = None
    cpu_operators: Text | None = None
    accelerated: Text | None = None
    sram_bytes: Text | None = None
    storage_bytes: Text | None = None


class TargetForm(Form):
    summary: Text
    platform: Text
    format: Format
    runtimes: Annotated[list[Text], Field(min_length=1)]
    device: Text
    scheme: SchemeForm
    calibration: CalibrationForm = CalibrationForm()
    gates: GatesForm = GatesForm()
    advice: AdviceForm = AdviceForm()
    recipe: list[PassName] | Literal["auto"] = Field(default_factory=list)
    accelerator: NpuKind | None = None
    emulators: list[Text] = Field(default_factory=list)


def names() -> list[str]:
    """Names of the built-in targets, sorted."""
    return sorted(path.stem for path in DIRECTORY.glob("*.toml"))


def load(name_or_path: str) -> Target:
    path = find_file("target", name_or_path, DIRECTORY)
    form = parse(TargetForm, read_with_bases("target", path, DIRECTORY), path)
    _check(form, path)
    gates = form.gates
    return Target(
        name=path.stem,
        summary=form.summary,
        platform=form.platform,
        format=form.format,
        runtimes=tuple(form.runtimes),
        device=_beside(path, form.device),
        scheme=Scheme(**form.scheme.model_dump()),
        estimator=EstimatorSpec(name=form.calibration.estimator, percentile=form.calibration.percentile),
        gates=Gates(
            max_accuracy_drop=gates.max_accuracy_drop,
            min_accuracy_kept=gates.min_accuracy_kept,
            min_agreement=gates.min_agreement,
            min_sqnr_db=gates.min_sqnr_db,
            min_speedup=gates.min_speedup,
            max_latency_ms=gates.max_latency_ms,
            max_size_bytes=_bytes(gates.max_size_mb),
            max_peak_memory_bytes=_bytes(gates.max_peak_memory_mb),
            max_cpu_operators=gates.max_cpu_operators,
            min_accelerated=gates.min_accelerated,
            max_instructions=gates.max_instructions,
        ),
        advice=form.advice.model_dump(exclude_none=True),
        recipe=("auto",) if form.recipe == "auto" else tuple(form.recipe),
        accelerator=form.accelerator,
        emulators=tuple(form.emulators),
    )


def _beside(path: Path, device: str) -> str:
    """A device given as a path starts from the target's file, as `extends` does; a name stays a name."""
    return str(path.parent / device) if "/" in device or device.endswith(".toml") else device


def _check(form: TargetForm, path: Path) -> None:
    """What no single key can say: which values go together, whatever the format."""
    for key, problem, fix in _contradictions(form.scheme):
        raise ConfigError(problem, where=f"{path}: scheme.{key}", fix=fix)


def _contradictions(scheme: SchemeForm) -> Iterator[tuple[str, str, str]]:
    """Key, problem and fix of each."""
    precision, activations = scheme.precision, scheme.activations
    fitting = {"w8a8": ("static", "dynamic"), "w8a16": ("static",), "8da4w": ("dynamic",)}.get(precision, ("none",))
    if activations not in fitting:
        say = " or ".join(f'"{word}"' for word in fitting)
        yield "activations", f"{activations!r} does not go with precision {precision!r}", f"say {say}"
    if scheme.io == "int8" and (precision, activations) != ("w8a8", "static"):
        yield "io", "int8 inputs and outputs need 8-bit activations with static ranges", 'say "float"'
    if scheme.activation_symmetric and activations == "none":
        yield "activation-symmetric", f"{precision} does not quantize activations", "leave it out"
    if scheme.scale == "power-of-two" and activations == "dynamic":
        yield "scale", "scales found at run time are not rounded to powers of two", 'say "any", or static activations'
    integers = (
        ("weight-symmetric", scheme.weight_symmetric, True),
        ("scale", scheme.scale, "any"),
        ("weight-estimator", scheme.weight_estimator, "max"),
    )
    if precision in ("fp32", "fp16"):
        grouped = ("weight-granularity", scheme.weight_granularity == "per-group", False)
        for key, value, plain in (*integers, grouped, ("weight-values", scheme.weight_values, "linear")):
            if value != plain:
                yield key, f"{precision} weights are not quantized", "leave it out"
    elif scheme.weight_values != "linear":
        if activations != "none":
            fix = 'say "linear", or take precision w8 or w4 without activations'
            yield "weight-values", f"kernels compute with linear weights, not with {scheme.weight_values} codes", fix
        for key, value, plain in integers:
            if value != plain:
                yield key, f"{scheme.weight_values} weights have a table instead of a scale", "leave it out"


def _bytes(megabytes: float | None) -> int | None:
    return None if megabytes is None else round(megabytes * BYTES_PER_MB)
