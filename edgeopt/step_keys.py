"""The keys of a `[[step]]` table, each declared once; they are the flags of the commands `edgeopt prune` and so on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.config_keys import Key
from edgeopt.config_values import (
    LARGEST,
    Parser,
    Place,
    a_fraction,
    a_name_or_path,
    a_path,
    a_source,
    a_switch,
    a_text,
    an_integer,
    between,
    nearest,
    one_of,
    some_texts,
)

if TYPE_CHECKING:  # the values need NumPy, which `edgeopt --help` does not
    from edgeopt.compression.steps import Goal, GoalName, Step

IMPORTANCES = (
    "l1", "l2", "mean-abs", "gradient", "taylor", "hessian", "activation", "batch-norm-scale", "random",
)  # fmt: skip
STUDENTS = ("model", "derived", "search")
SCHEDULES = ("one-shot", "iterative", "cubic")
#: What a goal may be given in, beside a share ("0.6x").
_UNITS: dict[GoalName, dict[str, float]] = {
    "ratio": {"": 1.0, "%": 0.01},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "parameters": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "size": {"b": 1.0, "kb": 2.0**10, "mb": 2.0**20, "gb": 2.0**30},
    "latency": {"ms": 1.0},
}
_EXAMPLES: dict[GoalName, str] = {
    "latency": "latency=0.6x or latency=5ms",
    "macs": "macs=0.5x or macs=200M",
    "parameters": "parameters=0.5x or parameters=1.5M",
    "size": "size=0.5x or size=2MB",
    "ratio": "ratio=40% or ratio=0.4",
}
COST_HELP = "latency=0.6x, latency=5ms, macs=0.5x, macs=200M, parameters=1.5M or size=2MB"
GOAL_HELP = f"{COST_HELP}; or ratio=40% of what may go"


@dataclass(frozen=True, slots=True)
class StepKey:
    """A key, and the field of the step's settings that it sets, such as "training.learning_rate"."""

    key: Key
    field: str


def a_goal(value: object, place: Place) -> Goal:
    """`latency=0.6x`: what, and a share of what it was ("0.6x") or an amount with its unit."""
    from edgeopt.compression.steps import Goal

    word, separator, amount = a_text(value, place).partition("=")
    word = word.strip().lower()
    what = next((name for name in _UNITS if name == word), None)
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?\d+)?)\s*([a-z%]*)", amount.strip().lower())
    if not separator or what is None or match is None:
        raise place.error(f"{value!r} is no goal", f"{nearest(word, _UNITS) if what is None else ''}write {GOAL_HELP}")
    number, unit = float(match[1]), match[2]
    if unit == "x" and what != "ratio":
        if not 0 < number < 1:
            raise place.error(f"{value!r} makes nothing smaller", "give a share between 0 and 1, such as 0.6x")
        return Goal(what, number, is_share=True)
    if unit not in _UNITS[what]:
        raise place.error(f"{value!r} has no unit that {what} is measured in", f"write {_EXAMPLES[what]}")
    number *= _UNITS[what][unit]
    if not 0 < number < (1 if what == "ratio" else LARGEST):
        raise place.error(f"{value!r} can't be reached", "give a share between 0 and 1, or an amount above 0")
    return Goal(what, number)


def _some_of(options: tuple[str, ...]) -> Parser:
    def parse(value: object, place: Place) -> tuple[str, ...]:
        names = [part.strip() for text in some_texts(value, place) for part in text.split(",")]
        return tuple(dict.fromkeys(str(one_of(options)(name, place)) for name in names))

    return parse


def _a_student(value: object, place: Place) -> str:
    """A way to make the student of the model, or where another network comes from."""
    word = a_text(value, place)
    if word in STUDENTS:
        return word
    if ":" not in word and not word.endswith((".pt2", ".onnx")):
        raise place.error(
            f"{word!r} is no way to make a student",
            f"{nearest(word, STUDENTS)}give one of {', '.join(STUDENTS)}, or a network: file.py:factory, hf:DIR",
        )
    return str(a_source(value, place))


def _key(name: str, field: str, parse: Parser, metavar: str, sample: str, text: str, group: str = "") -> StepKey:
    return StepKey(Key(name, group, parse, metavar, sample, text), field)


_RATE = between(1e-9, 10.0)

_TRAINING = tuple(
    _key(name, f"training.{field}", parse, metavar, sample, text, "Training")
    for name, field, parse, metavar, sample, text in (
        ("epochs", "epochs", an_integer(1), "N", "5", "Passes over the training data. Default: 5."),
        ("lr", "learning_rate", _RATE, "X", "1e-4",
         "Peak learning rate; it falls to zero along a cosine. Default: 1e-4 for qat, else 3e-4."),
        ("batch_size", "batch_size", an_integer(1), "N", "32", "Samples per step and process. Default: 32."),
        ("optimizer", "optimizer", one_of(("adamw", "sgd")), "NAME", '"adamw"', "adamw or sgd. Default: adamw."),
        ("weight_decay", "weight_decay", between(0.0, 10.0), "X", "1e-4", "Of matrices and kernels. Default: 1e-4."),
        ("warmup", "warmup", a_fraction, "X", "0.05", "Share of the steps in which the rate rises. Default: 0.05."),
        ("freeze_batch_norm_after", "freeze_batch_norm_after", a_fraction, "X", "0.5",
         "Share of the steps with batch statistics; afterwards as in the file. Default: 0.5 for qat, else 1."),
        ("ema", "ema", between(0.0, 0.99999), "X", "0.999", "Keep the moving average of the weights with this decay."),
        ("patience", "patience", an_integer(1), "N", "3",
         "Stop after so many epochs that were no better. Needs validation data."),
        ("mixed_precision", "mixed_precision", one_of(("no", "bf16", "fp16")), "TYPE", '"bf16"',
         "Type of the matrix products: no, bf16 or fp16. Default: no."),
        ("gradient_accumulation", "gradient_accumulation", an_integer(1), "N", "1", "Batches per step. Default: 1."),
        ("gradient_checkpointing", "gradient_checkpointing", a_switch, "", "true",
         "Compute activations twice, to save memory."),
    )
)  # fmt: skip


def _loss(default: str) -> StepKey:
    text = f"distillation (from the teacher), cross-entropy, mse or file.py:function. Default: {default}."
    return _key("loss", "teaching.loss", a_name_or_path, "NAME", '"cross-entropy"', text, "Training")


_LOSS = _loss("cross-entropy with labels, else distillation")
_SOFT_LOSS = _loss("distillation")
_TEACHING = tuple(
    _key(name, f"teaching.{name}", parse, metavar, sample, text, "Training")
    for name, parse, metavar, sample, text in (
        ("alpha", a_fraction, "X", "0.5",
         "Weight of a task loss (cross-entropy, mse, your own); the rest is distillation. Default: 0.5."),
        ("label_smoothing", between(0.0, 0.9), "X", "0.1",
         "Share of a label that cross-entropy spreads over all classes. Default: 0."),
        ("temperature", between(0.01, 1000.0), "T", "2.0", "Of distillation. Default: 2."),
    )
)  # fmt: skip

_FEATURES = tuple(
    _key(name, f"teaching.{name}", parse, metavar, sample, text, "Training")
    for name, parse, metavar, sample, text in (
        ("features", some_texts, "LAYER", '["layers.2=layers.4"]',
         "Layers whose outputs are matched too: student=teacher, or one path for both. Repeatable."),
        ("feature_weight", between(0.0, 1e6), "X", "1.0", "Weight of matched layers. Default: 1."),
        ("attention", a_switch, "", "true", "Match the attention maps too."),
        ("teacher_cache", a_path, "DIR", '"teacher"', "Keep the teacher's outputs there, so that it runs but once."),
    )
)  # fmt: skip

_PROTECT = _key("protect", "protect", some_texts, "PATTERN", '["head"]',
                "Layers to leave as they are: path or shell pattern. Repeatable.")  # fmt: skip
_MULTIPLE = _key("multiple", "multiple", an_integer(1, 1024), "N", "8",
                 "What remains is a multiple of N wide. Default: what fills the device's kernels.")  # fmt: skip
_MAX_DROP = _key("max_drop", "max_drop", a_fraction, "X", '"1%"',
                 "Score on the validation data that may be lost; a round that loses more is undone.")  # fmt: skip
_SCHEDULE = _key("schedule", "schedule", one_of(SCHEDULES), "NAME", '"iterative"',
                 "one-shot, iterative or cubic (Zhu and Gupta 2017), with training in between. Default: iterative for "
                 "prune, cubic for sparsify.")  # fmt: skip

STEP_KEYS: dict[str, tuple[StepKey, ...]] = {
    "prune": (
        _key("prune_to", "to", a_goal, "GOAL", '"latency=0.6x"', f"How small: {GOAL_HELP}. Default: macs=0.5x."),
        _key("remove", "remove", _some_of(("channels", "heads", "blocks")), "WHAT", '["channels", "heads"]',
             "What may go: channels, heads, blocks. Repeatable. Default: channels and heads."),
        _key("importance", "importance", one_of(IMPORTANCES), "NAME", '"taylor"',
             f"How the worth of a channel is judged: {', '.join(IMPORTANCES)}. Default: taylor with training data, "
             "activation with calibration data, else l2."),
        _key("scope", "scope", one_of(("global", "per-layer")), "NAME", '"global"',
             "Compare over the whole network, or take the same share of every layer. Default: global."),
        _MULTIPLE,
        _PROTECT,
        _key("max_ratio", "max_ratio", between(0.01, 0.99), "X", "0.9",
             "Largest share that one layer may lose. Default: 0.9."),
        _SCHEDULE,
        _key("rounds", "rounds", an_integer(1, 100), "N", "3", "Of an iterative or cubic schedule. Default: 3."),
        _MAX_DROP,
        _key("round_epochs", "round_epochs", an_integer(0), "N", "1",
             "Of training after every round but the last. Default: 1."),
        _key("group_lasso", "group_lasso", between(0.0, 1e3), "X", "1e-4",
             "Penalty on whole channels while training between rounds. Default: none."),
        _LOSS,
        *_TEACHING,
        *_TRAINING,
    ),
    "sparsify": (
        _key("sparsity", "to", between(0.01, 0.99), "X", '"60%"', "Share of weights that become zero. Default: 50%."),
        _key("pattern", "pattern", one_of(("unstructured", "2:4")), "NAME", '"unstructured"',
             "unstructured, or 2:4: two of every four. Default: unstructured."),
        _key("method", "method", one_of(("magnitude", "movement")), "NAME", '"magnitude"',
             "By magnitude, or by movement while training (Sanh et al. 2020). Default: magnitude."),
        _key("scope", "scope", one_of(("global", "per-layer")), "NAME", '"global"',
             "Compare weights over the whole network, or within each layer. Default: global."),
        _SCHEDULE,
        _key("rounds", "rounds", an_integer(1, 100), "N", "4", "Of an iterative or cubic schedule. Default: 4."),
        _PROTECT,
        _key("l1", "l1", between(0.0, 1e3), "X", "1e-5", "Penalty on weights while training. Default: none."),
        _MAX_DROP,
        _LOSS,
        *_TEACHING,
        *_TRAINING,
    ),
    "factorize": (
        _key("factorize_to", "to", a_goal, "GOAL", '"macs=0.7x"',
             "How small: macs=0.7x, parameters=1.5M, size=2MB or latency=0.8x. Default: what --energy leaves."),
        _key("energy", "energy", between(0.01, 1.0), "X", "0.95",
             "Share of its output's energy that each layer keeps. Default: 0.95."),
        _key("activation_aware", "activation_aware", a_switch, "", "true",
             "Weight directions by how calibration data use them. Default: yes."),
        _MULTIPLE,
        _PROTECT,
        _LOSS,
        *_TEACHING,
        *_TRAINING,
    ),
    "distil": (
        _key("teacher", "teacher", a_source, "MODEL", '"big.py:build"',
             "What to learn from, given like the model. Default: the model as it was before any step."),
        _key("teacher_weights", "teacher_weights", a_path, "FILE", '"big.safetensors"', "Weights for the teacher."),
        _key("student", "student", _a_student, "HOW", '"model"',
             "model: train it as it is; derived: make it narrower and shallower first; search: find out how much "
             "under --student-to; file.py:factory or hf:DIR: a network of its own. Default: model."),
        _key("width", "width", between(0.05, 1.0), "X", "0.5", "Of a derived student, by the model's. Default: 1."),
        _key("depth", "depth", between(0.05, 1.0), "X", "0.5", "Of a derived student, by the model's. Default: 1."),
        _key("student_to", "to", a_goal, "GOAL", '"latency=0.5x"', f"Budget of the search: {COST_HELP}."),
        _key("trials", "trials", an_integer(1, 1000), "N", "12", "Students that the search tries. Default: 12."),
        _key("sequence_level", "sequence_level", a_switch, "", "true",
             "Train a generator on what the teacher writes (Kim and Rush 2016)."),
        _SOFT_LOSS,
        *_TEACHING,
        *_FEATURES,
        *_TRAINING,
    ),
    "qat": (
        _key("lsq", "learned", a_switch, "", "true", "Train scales and ranges too (learned step size).", "Training"),
        _LOSS,
        *_TEACHING,
        *_TRAINING,
    ),
}  # fmt: skip
STEP_KEYS = {
    kind: tuple(k if k.key.group else replace(k, key=replace(k.key, group=kind.capitalize())) for k in keys)
    for kind, keys in STEP_KEYS.items()
}
_NEVER_SIZED = {"factorize": ("ratio",), "distil": ("ratio",)}


def a_step(value: object, place: Place) -> Step:
    """One `[[step]]` table: its `do`, and the keys of that step."""
    if not isinstance(value, dict):
        raise place.error(f"{value!r} is not a table", "write it as [[step]]")
    kind = value.get("do")
    if kind not in STEP_KEYS:
        near = nearest(str(kind), STEP_KEYS) if kind is not None else ""
        raise place.error(
            "does not say what to do" if kind is None else f"can't do {kind!r}",
            f'{near}give do = "..." with one of {", ".join(STEP_KEYS)}',
        )
    known = {key.key.spelling: key for key in STEP_KEYS[kind]}
    values: dict[str, object] = {}
    for spelling, given in value.items():
        if spelling == "do":
            continue
        at = Place(f"{place.where} ({kind}): {spelling}", place.base)
        if spelling not in known:
            raise at.error("unknown key", nearest(spelling.replace("_", "-"), known) or f"see 'edgeopt {kind} --help'")
        values[known[spelling].field] = known[spelling].key.parse(given, at)
    return step_of(kind, values, place)


def some_steps(value: object, place: Place) -> tuple[Step, ...]:
    if not isinstance(value, list):
        raise place.error(f"{value!r} is not a list of tables", "write each as [[step]]")
    return tuple(a_step(item, place.item(index)) for index, item in enumerate(value))


def step_of(kind: str, values: dict[str, object], place: Place) -> Step:
    """The settings with these fields set.

    Args:
        values: field, such as "to" or "training.epochs" -> parsed value.

    Raises ConfigError where two of them contradict each other.
    """
    from edgeopt.compression.steps import Distil, Factorize, Prune, Qat, Sparsify

    step: Step = {"prune": Prune, "sparsify": Sparsify, "factorize": Factorize, "distil": Distil, "qat": Qat}[kind]()
    own: dict[str, Any] = {field: value for field, value in values.items() if "." not in field}
    for part in ("training", "teaching"):
        inner: dict[str, Any] = {
            field.partition(".")[2]: v for field, v in values.items() if field.startswith(f"{part}.")
        }
        own[part] = replace(getattr(step, part), **inner)
    step = replace(step, **own)
    goal = getattr(step, "to", None)
    if kind in _NEVER_SIZED and goal is not None and goal.what in _NEVER_SIZED[kind]:
        raise place.error(f"{kind} has no goal {goal.what!r}", "give latency, macs, parameters or size")
    if isinstance(step, Distil):
        if step.teacher_weights is not None and step.teacher is None:
            raise place.error("teacher-weights go with a teacher", 'give teacher = "file.py:factory" too')
        if step.student == "search" and step.to is None:
            raise place.error("the search for a student has no budget", "give student-to, such as latency=0.5x")
        if step.student == "derived" and step.width == 1 and step.depth == 1:
            raise place.error("a derived student has the model's own size", "give width or depth below 1")
        if step.student != "derived" and (step.width < 1 or step.depth < 1):
            raise place.error("width and depth are of a derived student", 'give student = "derived" too')
        if step.student != "search" and step.to is not None:
            raise place.error("student-to is the budget of a search", 'give student = "search" too')
    if isinstance(step, Sparsify) and step.method == "movement" and step.pattern == "2:4":
        raise place.error("movement pruning knows no 2:4 pattern", "drop one of the two")
    return step


def step_from_flags(kind: str, flags: Mapping[str, object]) -> Step:
    """The step that a command does.

    Args:
        flags: name of a key -> value as the flag gave it; None and empty lists mean "not given".

    Raises ConfigError naming the flag.
    """
    values = {
        known.field: known.key.parse(flags[known.key.name], Place(f"--{known.key.spelling}", Path()))
        for known in STEP_KEYS[kind]
        if flags.get(known.key.name) not in (None, (), [])
    }
    return step_of(kind, values, Place(f"edgeopt {kind}", Path()))
