"""The keys of edgeopt.toml, each declared once.

The loader in `config`, the flags of `edgeopt export` and the file that `edgeopt init` writes all come from `KEYS`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from edgeopt.errors import ConfigError

ESTIMATORS = ("min-max", "percentile", "entropy", "mse")
#: No limit that anybody means is above this; keeps MB in bytes an integer.
LARGEST = 1e12
#: More threads than any machine that edgeopt runs on has cores; starting them takes minutes.
MOST_THREADS = 64
#: What a recipe may consist of: passes of `edgeopt.compression`, in the order in which they run.
PASS_NAMES = (
    "fold-batch-norm", "equalize", "absorb-high-bias", "smooth", "clip-outliers", "round-adaptively", "correct-bias",
)  # fmt: skip
_PATH_SUFFIXES = frozenset(
    {".py", ".pt2", ".onnx", ".keras", ".h5", ".npz", ".npy", ".jsonl", ".gz", ".csv", ".txt", ".toml", ".json"}
)
IO_TYPES = ("float", "int8")
#: key -> field of `Gates` that it sets.
GATE_OF_KEY = {
    "max_accuracy_drop": "max_accuracy_drop",
    "min_agreement": "min_agreement",
    "min_sqnr_db": "min_sqnr_db",
    "min_speedup": "min_speedup",
    "max_latency_ms": "max_latency_ms",
    "max_size_mb": "max_size_bytes",
    "max_peak_memory_mb": "max_peak_memory_bytes",
}


# --- one parser per kind of value; each takes what TOML or a flag gave and where it stands ---------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: how to call it in a message, and the folder that its relative paths start from."""

    where: str
    base: Path

    def error(self, problem: str, fix: str | None = None) -> ConfigError:
        return ConfigError(problem, where=self.where, fix=fix)


Parser = Callable[[object, Place], object]


def _text(value: object, place: Place) -> str:
    if not isinstance(value, str) or not value.strip():
        raise place.error(f"{value!r} is not a text")
    return value


def _slug(value: object, place: Place) -> str:
    text = _text(value, place)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise place.error(f"{text!r} can't name a folder", "use letters, digits, '.', '_' and '-'")
    return text


def _texts(value: object, place: Place) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise place.error(f"{value!r} is neither a text nor a list of texts")
    return tuple(_text(item, place) for item in items)


def _path(value: object, place: Place) -> Path:
    return place.base / (value if isinstance(value, Path) else _text(value, place))


def _source(value: object, place: Place) -> str:
    """A model or data set: as `_name_or_path`, and a bare word is a path too when it is there ("pictures")."""
    text = str(value) if isinstance(value, Path) else _text(value, place)
    if text.startswith("hf:"):
        folder = place.base / text.removeprefix("hf:")
        return f"hf:{folder}" if folder.is_dir() else text
    return str(place.base / text) if (place.base / text).exists() else _name_or_path(text, place)


def _name_or_path(value: object, place: Place) -> str:
    """A name, or a path by its looks ("net.py:build", "targets/mine.toml"), made relative to where it was written."""
    text = str(value) if isinstance(value, Path) else _text(value, place)
    head, separator, rest = text.partition(":")
    if "/" in head or Path(head).suffix in _PATH_SUFFIXES:
        return f"{place.base / head}{separator}{rest}"
    return text


def _names_or_paths(value: object, place: Place) -> tuple[str, ...]:
    return tuple(_name_or_path(text, place) for text in _texts(value, place))


def _number(value: object, place: Place) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or number != number or abs(number) == float("inf"):
        raise place.error(f"{value!r} is not a number")
    return number


def _positive(value: object, place: Place) -> float:
    number = _number(value, place)
    if number <= 0:
        raise place.error(f"{value!r} is not above 0")
    if number > LARGEST:
        raise place.error(f"{value!r} is above {LARGEST:g}")
    return number


def _percentile(value: object, place: Place) -> float:
    number = _number(value, place)
    if not 50 < number <= 100:
        raise place.error(f"{value!r} is not a percentile", "give one above 50 and up to 100, such as 99.99")
    return number


def _fraction(value: object, place: Place) -> float:
    if isinstance(value, str) and value.strip().endswith("%"):
        number = _number(value.strip()[:-1], place) / 100
    else:
        number = _number(value, place)
    if not 0 <= number <= 1:
        raise place.error(f"{value!r} is not between 0 and 1", 'write a fraction (0.005) or a percentage ("0.5%")')
    return number


def _integer(minimum: int, maximum: int = 10**18) -> Parser:
    def parse(value: object, place: Place) -> int:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,30}", value) else value
        if not isinstance(number, int) or isinstance(number, bool) or number < minimum:
            raise place.error(f"{value!r} is not a whole number of at least {minimum}")
        if number > maximum:
            raise place.error(f"{value!r} is more than {maximum}")
        return number

    return parse


def _choice(options: tuple[str, ...]) -> Parser:
    def parse(value: object, place: Place) -> str:
        if value not in options:
            raise place.error(
                f"{value!r} is not known", f"{nearest(str(value), options)}give one of {', '.join(options)}"
            )
        return str(value)

    return parse


def _recipe(value: object, place: Place) -> tuple[str, ...]:
    """`auto` and `none` stand alone; passes are put in the order in which they make sense."""
    names = tuple(part.strip() for text in _texts(value, place) for part in text.split(","))
    for name in names:
        _choice(("auto", "none", *PASS_NAMES))(name, place)
    if len(names) > 1 and {"auto", "none"} & {*names}:
        raise place.error("auto and none stand alone", "give auto, none, or names of passes")
    return tuple(sorted(dict.fromkeys(names), key=("auto", "none", *PASS_NAMES).index))


def _switch(value: object, place: Place) -> bool:
    if not isinstance(value, bool):
        raise place.error(f"{value!r} is neither true nor false")
    return value


def _table(value: object, place: Place) -> Mapping[str, object]:
    if isinstance(value, str | Path):
        path = place.base / value
        document = read_toml(path)
        return _table(document.get("preprocessing", document), Place(str(path), path.parent))
    if not isinstance(value, Mapping):
        raise place.error(f"{value!r} is not a table", "write it as [preprocessing]")
    table = dict(value)
    if "tokenizer" in table:
        table["tokenizer"] = _source(table["tokenizer"], place)
    return table


# --- the keys ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key:
    """One key of edgeopt.toml, which is one flag too.

    Attributes:
        name: field of `RunConfig`; in the file and on the command line with '-' for '_'.
        group: heading in the help and in the file.
        help: what it does, with its default, in one or two sentences.
        sample: a value as TOML.
        metavar: what the help calls the value; empty for a switch.
    """

    name: str
    group: str
    parse: Parser
    metavar: str
    sample: str
    help: str

    @property
    def spelling(self) -> str:
        return self.name.replace("_", "-")

    @property
    def is_gate(self) -> bool:
        return self.name in GATE_OF_KEY


MODEL, DATA, TARGET, QUANTIZATION, GATES, OUTPUT = "Model", "Data", "Target", "Quantization", "Gates", "Run and output"
GROUP_NOTES = {
    GATES: 'Limits on the exported file. Fractions may be percentages ("0.5%"); "off" drops the target\'s own limit. '
    "A missed gate makes the exit code 1; the bundle is written all the same."
}

KEYS: tuple[Key, ...] = (
    Key("model", MODEL, _source, "MODEL", '"net.py:build"',
        "file.py:factory, package.module:factory, a .pt2 or .onnx file, or hf:DIR-or-id."),
    Key("example", MODEL, _text, "NAME", '"digits"',
        "A built-in example instead of a model: digits or efficientnet-lite0."),
    Key("weights", MODEL, _path, "FILE", '"net.safetensors"',
        "Weights for the factory's model: .safetensors, or .pt/.pth holding tensors only."),
    Key("name", MODEL, _slug, "NAME", '"my-net"',
        "Names the bundle. Default: from the model."),
    Key("task", MODEL, _text, "TASK", '"text-classification"',
        "Task of a Hugging Face model. Default: from its config."),
    Key("input", MODEL, _texts, "NAME=DTYPE[DIMS]", '["image=float32[1,3,224,224]"]',
        "One per input, where the factory gives no example inputs: image=float32[1,3,224,224]. Repeatable."),
    Key("labels", MODEL, _path, "FILE", '"labels.txt"',
        "Class names, one a line; they travel in the bundle."),
    Key("target", TARGET, _names_or_paths, "NAME", '["android-int8", "android-onnx-int8"]',
        "What to build: a name from 'edgeopt targets' or a .toml file. Repeatable. Default: android-int8."),
    Key("device", TARGET, _name_or_path, "NAME", '"raspberry-pi-5"',
        "Where it will run: a name from 'edgeopt devices' or a .toml file. Default: the target's."),
    Key("calibration", DATA, _source, "DATA", '"pictures/train"',
        "Real inputs to quantize with: an image, WAV or array folder, .npz, .npy, .jsonl, or file.py:factory."),
    Key("num_calibration_samples", DATA, _integer(1), "N", "128",
        "How many of them are used. Default: 128."),
    Key("evaluation", DATA, _source, "DATA", '"pictures/val"',
        "Inputs to prove the result on; labelled ones give accuracy. Default: what calibration left over."),
    Key("num_evaluation_samples", DATA, _integer(1), "N", "1000",
        "How many of them are used. Default: all; 200 of what calibration left over."),
    Key("metric", DATA, _name_or_path, "NAME", '"top1"',
        "top1, top5 or file.py:function. Default: top1 where there are labels."),
    Key("seed", DATA, _integer(0), "N", "0",
        "Chooses the samples; the same seed chooses the same ones. Default: 0."),
    Key("estimator", QUANTIZATION, _choice(ESTIMATORS), "NAME", '"percentile"',
        "How ranges come from samples: min-max, percentile, entropy or mse. Default: the target's."),
    Key("percentile", QUANTIZATION, _percentile, "P", "99.99",
        "Share of values kept in the range; implies the percentile estimator."),
    Key("keep_float", QUANTIZATION, _texts, "PATTERN", '["classifier", "features.0.*"]',
        "Layers that stay float: path or shell pattern, 'features.0.*'. Repeatable."),
    Key("int16_activations", QUANTIZATION, _texts, "PATTERN", '["features.0.*"]',
        "Layers with 16-bit activations in an int8 file, where the format has them. Repeatable."),
    Key("recipe", QUANTIZATION, _recipe, "PASS", '["auto"]',
        "Passes that toughen the model before quantization, in a list or one by one; auto tries them, keeps what helps "
        "and searches which layers stay float; none. Default: the target's."),
    Key("io", QUANTIZATION, _choice(IO_TYPES), "TYPE", '"float"',
        "Type of the file's inputs and outputs: float or int8. Default: the target's."),
    Key("max_accuracy_drop", GATES, _fraction, "X", '"0.5%"',
        "Loss of the metric against the float model. Needs labels."),
    Key("min_agreement", GATES, _fraction, "X", '"97.5%"',
        "Share of samples where both models answer the same."),
    Key("min_sqnr_db", GATES, _number, "DB", "18.5",
        "Signal to quantization noise of the outputs, in dB."),
    Key("min_speedup", GATES, _positive, "X", "1.0",
        "Latency of the float model divided by that of the quantized one."),
    Key("max_latency_ms", GATES, _positive, "MS", "5.0",
        "Median time of one inference on this machine."),
    Key("max_size_mb", GATES, _positive, "MB", "6.0",
        "Size of the model file; 1 MB is 1 048 576 bytes."),
    Key("max_peak_memory_mb", GATES, _positive, "MB", "50.0",
        "Peak memory that inference adds."),
    Key("threads", OUTPUT, _integer(1, MOST_THREADS), "N", "1",
        "Threads when timing. Default: 1."),
    Key("output_dir", OUTPUT, _path, "DIR", '"dist"',
        "Bundles go to DIR/<model>-<target>/. Default: dist."),
    Key("float_twin", OUTPUT, _switch, "", "true",
        "Keep the float file in the bundle, so that 'edgeopt validate' can compare. Default: yes."),
    Key("preprocessing", DATA, _table, "FILE", "",
        "A .toml file that says how raw data becomes model input. Default: what the model brings."),
)  # fmt: skip


def nearest(word: str, options: Iterable[str]) -> str:
    matches = get_close_matches(word, list(options), n=1)
    return f"did you mean {matches[0]!r}? " if matches else ""


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=str(path), fix="'edgeopt init' writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"can't be read: {reason}", where=str(path)) from error


def read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        at = re.search(r" \(at line (\d+), column \d+\)$", message)
        where = f"{path}:{at[1]}" if at else str(path)
        raise ConfigError(f"is not TOML: {message[: at.start()] if at else message}", where=where) from error


# --- the file that `edgeopt init` writes ------------------------------------------------------------------------------

_HEADER = """\
# edgeopt.toml: what 'edgeopt export' does in this folder. Every key is a flag of the same name, and flags win.
# Paths start from this file's folder. Remove the '#' before a key to set it; see docs/configuration.md.
"""
_PREPROCESSING = """\

# How raw data becomes model input, in calibration, in evaluation and in the app. kind is image, text, audio or array.
# [preprocessing]
# kind = "image"
# height = 224
# width = 224
# rescale = 255.0
# mean = [0.485, 0.456, 0.406]
# std = [0.229, 0.224, 0.225]
"""


def template() -> str:
    """A commented edgeopt.toml with every key."""
    parts = [_HEADER]
    for group in (MODEL, TARGET, DATA, QUANTIZATION, GATES, OUTPUT):
        parts.append(f"\n# --- {group} {'-' * (74 - len(group))}\n")
        if group in GROUP_NOTES:
            parts.append(f"# {GROUP_NOTES[group]}\n")
        keys = (key for key in KEYS if key.group == group and key.sample)
        parts.extend(f"\n# {key.help}\n# {key.spelling} = {key.sample}\n" for key in keys)
    return "".join([*parts, _PREPROCESSING])
