"""Layer paths and the patterns that name them."""

from __future__ import annotations

import pytest

from edgeopt.layer_names import layer_is_exempt, strip_wrapper
from edgeopt.types import WRAPPED_ATTRIBUTE


@pytest.mark.parametrize(
    ("layer", "patterns", "matches"),
    [
        ("features.0", ["features.0"], True),
        ("features.0.1", ["features.0"], True),
        ("features.01", ["features.0"], False),
        ("features.0", ["features.0.1"], False),
        ("features.0", ["head", "*.0"], True),
        (f"{WRAPPED_ATTRIBUTE}.head", ["head"], True),
        ("head", [], False),
    ],
)
def test_a_pattern_matches_a_layer_and_what_is_in_it(layer: str, patterns: list[str], matches: bool) -> None:
    assert layer_is_exempt(layer, patterns) is matches


def test_the_adapter_is_no_part_of_a_path() -> None:
    assert strip_wrapper(f"{WRAPPED_ATTRIBUTE}.head.0") == "head.0"
    assert strip_wrapper(WRAPPED_ATTRIBUTE) == ""
    assert strip_wrapper("head") == "head"
