"""edgeopt.toml and flags -> `RunConfig`.

Flags win over the file, the file wins over the defaults; the keys themselves are in `config_keys`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from edgeopt.config_keys import GATE_OF_KEY, KEYS, Key
from edgeopt.config_values import Place, nearest, read_text, read_toml
from edgeopt.step_keys import some_steps

if TYPE_CHECKING:  # types.py needs NumPy, which `edgeopt --help` does not
    from edgeopt.compression.steps import Step
    from edgeopt.datasets import DataSource
    from edgeopt.sources import ModelSpec
    from edgeopt.types import Gates

DEFAULT_FILE = "edgeopt.toml"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """All that one `edgeopt export` was asked to do. `None` means: as the target, the model or the data says.

    Fractions are fractions (0.005 is half a point), sizes are in MB of 2**20 bytes, times in milliseconds.

    Attributes:
        model, calibration, evaluation, train, validation: strings from the command line and edgeopt.toml; objects from
            Python.
        preprocessing: the `[preprocessing]` table as it was written; `tokenizer` already resolved.
        step: what is done to the model before its export, in order.
        gates_off: fields of `Gates` that the user switched off.
        config_dir: folder of the configuration file; relative paths in that file start here.
    """

    model: str | ModelSpec | None = None
    example: str | None = None
    weights: Path | None = None
    name: str | None = None
    task: str | None = None
    input: tuple[str, ...] = ()
    max_source_length: int | None = None
    max_target_length: int | None = None
    num_beams: int = 1
    labels: Path | None = None
    licence: str | None = None
    target: tuple[str, ...] = ()
    device: str | None = None
    calibration: DataSource | None = None
    num_calibration_samples: int = 128
    evaluation: DataSource | None = None
    num_evaluation_samples: int | None = None
    train: DataSource | None = None
    validation: DataSource | None = None
    verify_on: tuple[str, ...] = ()
    num_verification_samples: int = 32
    metric: str | None = None
    seed: int = 0
    estimator: Literal["min-max", "percentile", "entropy", "mse"] | None = None
    percentile: float | None = None
    keep_float: tuple[str, ...] = ()
    int16_activations: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()
    io: Literal["float", "int8"] | None = None
    max_accuracy_drop: float | None = None
    min_accuracy_kept: float | None = None
    min_agreement: float | None = None
    min_sqnr_db: float | None = None
    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    max_peak_memory_mb: float | None = None
    max_cpu_operators: int | None = None
    min_accelerated: float | None = None
    max_instructions: int | None = None
    threads: int = 1
    step: tuple[Step, ...] = ()
    output_dir: Path = Path("dist")
    save_weights: Path | None = None
    cache_dir: Path | None = None
    float_twin: bool = True
    apply_rewrites: bool = False
    preprocessing: Mapping[str, object] | None = None
    gates_off: frozenset[str] = frozenset()
    config_dir: Path = Path()

    @property
    def gates_set(self) -> frozenset[str]:
        """Fields of `Gates` that the user decided, by a limit or by `off`."""
        limits = {gate for key, gate in GATE_OF_KEY.items() if getattr(self, key) is not None}
        return frozenset(limits) | self.gates_off


def resolve_gates(target_gates: Gates, config: RunConfig) -> Gates:
    """The limits of one run: the user's where given, the target's elsewhere, none where switched off."""
    from edgeopt.types import Gates

    def pick(gate: str, own: T | None, default: T | None) -> T | None:
        if gate in config.gates_off:
            return None
        return default if own is None else own

    return Gates(
        max_accuracy_drop=pick("max_accuracy_drop", config.max_accuracy_drop, target_gates.max_accuracy_drop),
        min_accuracy_kept=pick("min_accuracy_kept", config.min_accuracy_kept, target_gates.min_accuracy_kept),
        min_agreement=pick("min_agreement", config.min_agreement, target_gates.min_agreement),
        min_sqnr_db=pick("min_sqnr_db", config.min_sqnr_db, target_gates.min_sqnr_db),
        min_speedup=pick("min_speedup", config.min_speedup, target_gates.min_speedup),
        max_latency_ms=pick("max_latency_ms", config.max_latency_ms, target_gates.max_latency_ms),
        max_size_bytes=pick("max_size_bytes", _bytes(config.max_size_mb), target_gates.max_size_bytes),
        max_peak_memory_bytes=pick(
            "max_peak_memory_bytes", _bytes(config.max_peak_memory_mb), target_gates.max_peak_memory_bytes
        ),
        max_cpu_operators=pick("max_cpu_operators", config.max_cpu_operators, target_gates.max_cpu_operators),
        min_accelerated=pick("min_accelerated", config.min_accelerated, target_gates.min_accelerated),
        max_instructions=pick("max_instructions", config.max_instructions, target_gates.max_instructions),
    )


def _bytes(megabytes: float | None) -> int | None:
    from edgeopt.targets.schema import BYTES_PER_MB

    return None if megabytes is None else round(megabytes * BYTES_PER_MB)


#: No flag can say this one.
_STEP = Key("step", "", some_steps, "", "", "")
_BY_SPELLING = {key.spelling: key for key in (*KEYS, _STEP)}


def load_config(path: Path | None, overrides: Mapping[str, object]) -> RunConfig:
    """Flags over file over defaults.

    Args:
        path: the configuration file; None takes edgeopt.toml of the current directory where there is one.
        overrides: as for `config_of`.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or value; names file and line, or the flag.
    """
    if path is None and os.path.lexists(DEFAULT_FILE):  # a broken link is a mistake, not "no file"
        path = Path(DEFAULT_FILE)
    if path is None:
        return config_of(overrides)
    lines = read_text(path).splitlines()
    given: dict[str, tuple[object, Place]] = {}
    for spelling, value in read_toml(path).items():
        found = _lines_of(spelling, lines) or [1]  # a key may be written in ways that the pattern doesn't know
        items = tuple(f"{path}:{line}: {spelling} {number}" for number, line in enumerate(found, 1))
        place = Place(f"{path}:{found[0]}: {spelling}", path.parent, items)
        given[_known(spelling, place).name] = (value, place)
    flags = _flags(overrides)
    for one, other in (("model", "example"), ("example", "model")):
        if one in flags and other not in flags:
            given.pop(other, None)
    return _build({**given, **flags}, path.parent)


def config_of(overrides: Mapping[str, object]) -> RunConfig:
    """A configuration from flags alone; no file is read.

    Args:
        overrides: field of `RunConfig` -> value, as TOML or a flag would give it ("off" switches a gate off); None
            and empty lists mean "not given".

    Raises:
        ConfigError: unknown key, wrong type or value; names the flag.
    """
    return _build(_flags(overrides), Path())


def _flags(overrides: Mapping[str, object]) -> dict[str, tuple[object, Place]]:
    flags = {}
    for name, value in overrides.items():
        spelling = name.replace("_", "-")
        place = Place(f"--{spelling}", Path())
        key = _known(spelling, place)
        if value is not None and value != () and value != []:
            flags[key.name] = (value, place)
    return flags


def _build(given: Mapping[str, tuple[object, Place]], base: Path) -> RunConfig:
    values: dict[str, Any] = {}
    off: set[str] = set()
    for key in _BY_SPELLING.values():
        if key.name not in given:
            continue
        value, place = given[key.name]
        if key.is_gate and value == "off":
            off.add(GATE_OF_KEY[key.name])
        else:
            values[key.name] = key.parse(value, place)
    if "percentile" in values:
        estimator = values.setdefault("estimator", "percentile")
        if estimator != "percentile":
            raise given["percentile"][1].error(f"means nothing to the {estimator} estimator", "drop one of the two")
    return RunConfig(**values, gates_off=frozenset(off), config_dir=base)


def _known(spelling: str, place: Place) -> Key:
    key = _BY_SPELLING.get(spelling)
    if key is None:
        near = nearest(spelling.replace("_", "-"), _BY_SPELLING)
        raise place.error("unknown key", near or "'edgeopt init' writes a file with every key; gates have no table")
    return key


def _lines_of(spelling: str, lines: list[str]) -> list[int]:
    """Lines of a top-level key, or of the headers of its tables; tomllib doesn't tell."""
    pattern = re.compile(rf"""\s*(\[\[?)?\s*["']?{re.escape(spelling)}["']?\s*[\].=]""")
    return [number for number, line in enumerate(lines, 1) if pattern.match(line)]
