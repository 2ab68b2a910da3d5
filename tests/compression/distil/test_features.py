"""Pairs of layers: how they are named, and how their outputs are made comparable."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from edgeopt.compression.distil.features import Pair, captured, fit_of, pairs_of
from edgeopt.errors import UsageError


def stack(*widths: int) -> nn.Module:
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten())


def test_pairs_are_paths_or_patterns() -> None:
    student, teacher = stack(1, 2, 3), stack(1, 4, 5, 6)
    assert pairs_of(["0.1"], student, teacher) == (Pair("0.1", "0.1"),)
    assert pairs_of(["0.0 = 0.2", "0.1=0.1"], student, teacher) == (Pair("0.0", "0.2"), Pair("0.1", "0.1"))
    assert pairs_of(["0.*=0.[02]"], student, teacher) == (Pair("0.0", "0.0"), Pair("0.1", "0.2"))


def test_a_star_stands_for_one_part_of_a_path() -> None:
    nested = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)))
    assert pairs_of(["*"], nested, nested) == (Pair("0", "0"), Pair("1", "1"))
    assert pairs_of(["*.0"], nested, nested) == (Pair("0.0", "0.0"), Pair("1.0", "1.0"))


def test_the_adapters_prefix_is_no_part_of_a_path() -> None:
    student = nn.Module()
    student.add_module("edgeopt_model", stack(1, 2))
    assert pairs_of(["0.0"], student, stack(1, 2)) == (Pair("edgeopt_model.0.0", "0.0"),)
    assert Pair("edgeopt_model.0.0", "0.0").name == "0.0=0.0"


@pytest.mark.parametrize(
    ("feature", "problem"),
    [
        ("0.7=0.0", r"features '0.7=0.0': the student has no layer '0.7'; did you mean '0.\d'"),
        ("0.0=1.7", r"the teacher has no layer '1.7'"),
        ("0.*", "names 2 layers of the student and 3 layers of the teacher"),
    ],
)
def test_wrong_names_are_told(feature: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        pairs_of([feature], stack(1, 2, 3), stack(1, 4, 5, 6))


def test_hooks_are_gone_after_a_run_and_tuples_give_their_first_tensor() -> None:
    network = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    x = torch.randn(2, 5, 3)
    with captured(network, ["0"]) as seen:
        outputs, _ = network(x)
    assert seen["0"] is outputs
    assert not network[0]._forward_hooks


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 8, 6, 6), (2, 8, 6, 6)),
        ((2, 8, 6, 6), (2, 16, 6, 6)),
        ((2, 8, 6, 6), (2, 16, 3, 3)),
        ((2, 8, 3, 4), (2, 8, 6, 6)),
        ((2, 6, 6, 8), (2, 6, 6, 16)),  # channels last
        ((2, 5, 8), (2, 5, 16)),
        ((2, 8, 5), (2, 16, 5)),
        ((2, 8), (2, 16)),
        ((2, 8, 4, 4, 4), (2, 4, 2, 2, 2)),
    ],
)
def test_features_are_made_alike(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    fit = fit_of(Pair("a", "b"), torch.Size(student), torch.Size(teacher))
    projection = fit.projection()
    mine, theirs = projection(fit.pooled(torch.randn(student))), fit.pooled(torch.randn(teacher))
    assert mine.shape == theirs.shape
    has_weights = any(True for _ in projection.parameters())
    assert has_weights is (sorted(set(student)) != sorted(set(teacher)) and fit.kind is not None)


@pytest.mark.parametrize("other", [(2, 8), (2, 7, 9, 1)])
def test_what_has_nothing_in_common_is_refused(other: tuple[int, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        fit_of(Pair("a", "b"), torch.Size((2, 5, 8)), torch.Size(other))
    line = caught.value.line()
    assert "'a=b'" in line
    assert "(2, 5, 8)" in line
    assert str(other) in line
