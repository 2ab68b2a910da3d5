"""The published rules, on operators written by hand; whole packages are in tests/e2e/test_coreml.py."""

from __future__ import annotations

import pytest

from edgeopt.accelerators.neural_engine import _findings, _predicted
from edgeopt.accelerators.neural_engine_rules import refusal
from edgeopt.formats.coreml import ProgramOp
from edgeopt.formats.coreml_program import Block, Feature, Operation, Program, ValueType, Variable
from edgeopt.types import NeuralEngine, OpInfo, Placement

FIXED = (1, 8, 4, 4)


def op(kind: str, dtype: str = "fp16", shape: tuple[int | None, ...] = FIXED, computes: str | None = None) -> ProgramOp:
    operation = Operation(kind, {}, (Variable("v", ValueType(dtype, shape)),), ())
    return ProgramOp(OpInfo("features.0", kind, computes or dtype, None, 0), "v", "features.0", operation)


def program(shape: tuple[int | str, ...] = FIXED, version: int = 8) -> Program:
    features = (Feature("image", "float32", shape),)
    return Program(version, "CoreML7", features, (), Block((), (), ()), {}, {})


@pytest.mark.parametrize("kind", ["conv", "gelu", "layer_norm", "add", "softmax", "transpose"])
def test_fp16_operators_are_taken(kind: str) -> None:
    assert refusal(op(kind), program()) is None


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (op("lstm"), "recurrent"),
        (op("while_loop", "fp32"), "control flow"),
        (op("gather"), "by index"),
        (op("reduce_argmax", "int32"), "indices"),
        (op("conv", "fp32"), "fp32"),
        (op("greater", "bool"), "bool"),
        (op("reshape", shape=(1, 2, 3, 4, 5, 6)), "5 dimensions"),
        (op("linear", shape=(1, 20_000)), "16384"),
    ],
)
def test_what_runs_elsewhere_says_why(given: ProgramOp, reason: str) -> None:
    placed = _predicted(given, program())
    assert placed.on == "cpu"
    assert reason in (placed.reason or "")
    assert placed.layer == "features.0"


def test_a_free_size_names_the_input_to_fix() -> None:
    found = refusal(op("conv", shape=(None, 8, 4, 4)), program(("image_dim0", 3, 8, 8)))
    assert found is not None
    assert found[1] == "give the input 'image' a fixed shape"


@pytest.mark.parametrize(("version", "ios"), [(6, 15), (8, 17), (9, 18), (10, 26)])
def test_the_system_that_a_specification_needs(version: int, ios: int) -> None:
    assert program(version=version).minimum_ios == ios


def test_findings_of_an_int8_file_on_an_older_phone() -> None:
    ops = [op("conv", computes="int8")]
    placement = Placement("Neural Engine", "rules", True, (_predicted(ops[0], program()),))
    found = _findings(program(), ops, placement, NeuralEngine("A15 Bionic", 16, 15))
    assert {"system-version", "int8-rate", "compute-units"} <= {finding.code for finding in found}
    newer = _findings(program(), ops, placement, NeuralEngine("A18 Pro", 16, 18))
    assert not {"system-version", "int8-rate"} & {finding.code for finding in newer}
