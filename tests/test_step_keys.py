"""`[[step]]` tables and the flags of the commands that do one step."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from edgeopt.compression.steps import Distil, Factorize, Goal, Importance, Prune, Qat, ScheduleName, Sparsify
from edgeopt.config import RunConfig, load_config
from edgeopt.config_values import Place
from edgeopt.errors import ConfigError
from edgeopt.step_keys import IMPORTANCES, SCHEDULES, STEP_KEYS, a_goal, step_from_flags
from edgeopt.training.config import Teaching, TrainingConfig

HERE = Place("here", Path())
#: The default differs between steps, or is "none".
SAID_IN_WORDS = ("training.learning_rate", "training.freeze_batch_norm_after", "group_lasso", "l1")
STEPS = {"prune": Prune, "sparsify": Sparsify, "factorize": Factorize, "distil": Distil, "qat": Qat}


def loaded(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "edgeopt.toml"
    path.write_text(text)
    return load_config(path, {})


def error_line(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    return str(caught.value)


@pytest.mark.parametrize("kind", STEPS)
def test_every_key_sets_a_field_and_every_plain_field_has_a_key(kind: str) -> None:
    known = {key.field for key in STEP_KEYS[kind]}
    own = {field.name for field in fields(STEPS[kind])} - {"training", "teaching"}
    assert {name for name in known if "." not in name} == own
    for prefix, settings in (("training", TrainingConfig), ("teaching", Teaching)):
        inner = {name.partition(".")[2] for name in known if name.startswith(f"{prefix}.")}
        assert inner <= {field.name for field in fields(settings)}
    assert len({key.key.name for key in STEP_KEYS[kind]}) == len(STEP_KEYS[kind])


def test_the_words_are_those_of_the_settings() -> None:
    assert get_args(Importance) == IMPORTANCES
    assert get_args(ScheduleName) == SCHEDULES


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("latency=0.6x", Goal("latency", 0.6, is_share=True)),
        ("latency = 5 ms", Goal("latency", 5.0)),
        ("macs=200M", Goal("macs", 200e6)),
        ("parameters=1.5m", Goal("parameters", 1.5e6)),
        ("size=2MB", Goal("size", 2.0 * 2**20)),
        ("ratio=0.4", Goal("ratio", 0.4)),
        ("ratio=40%", Goal("ratio", 0.4)),
    ],
)
def test_goals(text: str, goal: Goal) -> None:
    assert a_goal(text, HERE) == goal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency", "is no goal"),
        ("latncy=0.5x", "did you mean 'latency'"),
        ("latency=2x", "makes nothing smaller"),
        ("latency=5", "has no unit"),
        ("size=5ms", "has no unit"),
        ("ratio=1.5", "can't be reached"),
        ("ratio=0.5x", "has no unit"),
        ("ratio=0.5x", "write ratio=40% or ratio=0.4"),
        ("macs=0", "can't be reached"),
        ("macs=1e999", "can't be reached"),
        ("macs=-1", "is no goal"),
    ],
)
def test_bad_goals_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        a_goal(text, HERE)


def test_a_recipe_of_steps(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        """
        [[step]]
        do = "prune"
        prune-to = "latency=0.6x"
        protect = "head"
        epochs = 4
        loss = "losses.py:mine"
        [[step]]
        do = "distil"
        student = "derived"
        width = 0.5
        [[step]]
        do = "qat"
        lr = 1e-5
        """,
    )
    first, second, third = config.step
    assert isinstance(first, Prune)
    assert first.to == Goal("latency", 0.6, is_share=True)
    assert (first.protect, first.training.epochs) == (("head",), 4)
    assert first.training.learning_rate == Prune().training.learning_rate
    assert first.teaching.loss == f"{tmp_path / 'losses.py'}:mine"
    assert isinstance(second, Distil)
    assert second.width == 0.5
    assert isinstance(third, Qat)
    assert third.training.learning_rate == 1e-5


def test_a_student_may_be_a_network_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "edgeopt.toml"
    file.write_text('[[step]]\ndo = "distil"\nstudent = "small.py:build"\nlabel-smoothing = 0.1\n')
    (step,) = load_config(file, {}).step
    assert isinstance(step, Distil)
    assert step.student == f"{tmp_path / 'small.py'}:build"
    assert step.teaching.label_smoothing == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[step]]\ndo = "distil"\nstudent = "derivd"', "did you mean 'derived'"),
        ("step = 3", "is not a list of tables"),
        ("[[step]]\nepochs = 3", "step 1: does not say what to do"),
        ('[[step]]\ndo = "purne"', "did you mean 'prune'"),
        ('[[step]]\ndo = "prune"\n[[step]]\ndo = "qat"\nepoch = 3', r"step 2 \(qat\): epoch: unknown key; did"),
        ('[[step]]\ndo = "prune"\nepochs = 0', r"step 1 \(prune\): epochs: 0 is not a whole number"),
        ('[[step]]\ndo = "prune"\nimportance = "size"', "is not known"),
        ('[[step]]\ndo = "distil"\nstudent = "search"', "has no budget"),
        ('[[step]]\ndo = "distil"\nstudent = "derived"', "has the model's own size"),
        ('[[step]]\ndo = "distil"\nteacher-weights = "b.safetensors"', "go with a teacher"),
        ('[[step]]\ndo = "distil"\nwidth = 0.5', "are of a derived student"),
        ('[[step]]\ndo = "factorize"\nfactorize-to = "ratio=0.5"', "has no goal 'ratio'"),
        ('[[step]]\ndo = "sparsify"\nmethod = "movement"\npattern = "2:4"', "knows no 2:4"),
    ],
)  # fmt: skip
def test_a_bad_step_is_refused_with_its_number(tmp_path: Path, text: str, message: str) -> None:
    assert re.search(message, error_line(tmp_path, text)), error_line(tmp_path, text)


def test_an_error_names_the_line_of_its_step(tmp_path: Path) -> None:
    text = 'model = "net.py:build"\n\n[[step]]\ndo = "prune"\n\n[[step]]\ndo = "qat"\nepoch = 3\n'
    assert error_line(tmp_path, text).startswith(f"{tmp_path / 'edgeopt.toml'}:6: step 2 (qat): epoch: unknown key")
    inline = 'step = [{do = "prune"}, {do = "purne"}]'
    assert f"{tmp_path / 'edgeopt.toml'}:1: step 2: can't do 'purne'" in error_line(tmp_path, inline)


@pytest.mark.parametrize("kind", STEPS)
def test_samples_are_values_and_defaults_are_told_truly(kind: str) -> None:
    import tomllib

    from edgeopt.step_keys import step_of

    for known in STEP_KEYS[kind]:
        sample = tomllib.loads(f"x = {known.key.sample}")["x"]
        known.key.parse(sample, HERE)
    told = {known.field: known.key.help for known in STEP_KEYS[kind] if "Default: " in known.key.help}
    step = step_of(kind, {}, HERE)
    for field, text in told.items():
        value: object = step
        for part in field.split("."):
            value = getattr(value, part)
        if isinstance(value, int | float) and not isinstance(value, bool) and field not in SAID_IN_WORDS:
            match = re.search(r"Default: ([\d.e-]+)(%?)\.$", text)
            assert match, (field, text)
            assert float(match[1]) * (0.01 if match[2] else 1) == value, (field, text)


def test_a_teacher_from_a_folder_is_looked_for_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (step,) = loaded(tmp_path, '[[step]]\ndo = "distil"\nteacher = "hf:bert"').step
    assert isinstance(step, Distil)
    assert step.teacher == f"hf:{tmp_path / 'bert'}"


def test_flags_make_a_step_and_name_themselves_in_errors() -> None:
    step = step_from_flags("prune", {"prune_to": "macs=0.5x", "remove": ["heads,blocks"], "lr": None, "protect": []})
    assert step == Prune(remove=("heads", "blocks"))
    with pytest.raises(ConfigError, match="--prune-to: 'half' is no goal"):
        step_from_flags("prune", {"prune_to": "half"})
