"""The built-in examples and the example projects."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from edgeopt.config import load_config
from edgeopt.examples import EXAMPLES
from edgeopt.examples.digits import SIDE, held_out_set, training_set
from edgeopt.plan import with_example
from edgeopt.targets import load_target

PROJECTS = sorted((Path(__file__).parents[2] / "examples").glob("*/edgeopt.toml"))


def test_the_held_out_digits_are_not_trained_on() -> None:
    train, held_out = training_set(), held_out_set()
    assert len(train) + len(held_out) == 1797
    assert len(held_out) == 360
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in held_out.images) == 0


def test_a_digit_is_what_the_declared_preprocessing_says() -> None:
    image, label = training_set()[0]
    assert (image.shape, image.dtype) == ((1, SIDE, SIDE), np.float32)
    assert image.min() >= -1
    assert image.max() <= 1
    assert label in range(10)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_an_example_names_is_there(name: str) -> None:
    example = EXAMPLES[name]
    for spec in filter(None, (example.model, example.calibration, example.evaluation)):
        module, _, attribute = spec.partition(":")
        assert callable(getattr(import_module(module), attribute))


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_every_project_loads(path: Path) -> None:
    config = with_example(load_config(path, {}))
    assert config.model is not None
    for name in config.target:
        load_target(name)
