"""Repairs of TOSA programs in text form, and what the TOSA runtime refuses; nothing is converted here."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.errors import ConversionError, UsageError
from edgeopt.formats.tosa import read
from edgeopt.runtimes.tosa import TosaRuntime
from edgeopt.runtimes.tosa_mlir import foreign, io_names, repaired
from edgeopt.types import Signature, SignatureTensor

HEAD = (
    '  func.func @main(%arg0: tensor<1x4xf32> {tf_saved_model.index_path = ["x"]} loc("main"(#loc)), '
    '%arg1: tensor<1xi8> {tf_saved_model.index_path = ["y"]}) -> (tensor<1x4xi8> {tf_saved_model.index_path = '
    '["logits"]}) attributes {tf.entry_function = {inputs = "a,b", outputs = "head"}} {'
)
BARE = (
    "  func.func @main(%arg0: tensor<1x4xf32>) -> tensor<1x4xi8> attributes "
    '{tf.entry_function = {inputs = "a", outputs = "head"}} {'
)

QUANTIZE = """\
    %5 = tosa.cast %4 : (tensor<1x4xf32>) -> tensor<1x4xi32> loc(#loc7)
    %6 = tosa.add %5, %1 : (tensor<1x4xi32>, tensor<1x1xi32>) -> tensor<1x4xi32> loc(#loc7)
    %7 = tosa.cast %6 : (tensor<1x4xi32>) -> tensor<1x4xi8> loc(#loc7)
"""

LEFT_OVER = """\
#loc = loc("m.tflite":0:0)
    %c = stablehlo.constant dense<2> : tensor<i32> loc(#loc27)
    %86 = "tfl.cumsum"(%85, %c) <{exclusive = false}> : (tensor<4xf32>, tensor<i32>) -> tensor<4xf32> loc(#loc3)
#loc3 = loc("head.sum:1"(#loc))
"""


def test_names_of_the_signature_come_first() -> None:
    assert io_names(HEAD) == (["x", "y"], ["logits"])


def test_without_a_signature_tensors_have_names() -> None:
    assert io_names(BARE) == (["a"], ["head"])


def test_a_program_without_main_function() -> None:
    with pytest.raises(ValueError, match="no main function"):
        io_names("module {}")


def test_quantize_saturates_instead_of_wrapping() -> None:
    lines = repaired(QUANTIZE).splitlines()
    assert '"tosa.const"() <{values = dense<-128> : tensor<1x1xi32>}>' in lines[2]
    assert '"tosa.const"() <{values = dense<127> : tensor<1x1xi32>}>' in lines[3]
    assert lines[4].strip().startswith("%q7_raised = tosa.maximum %6, %q7_low : (tensor<1x4xi32>, tensor<1x1xi32>)")
    assert lines[6] == "    %7 = tosa.cast %q7_clamped : (tensor<1x4xi32>) -> tensor<1x4xi8> loc(#loc7)"


def test_a_cast_of_the_models_own_still_wraps() -> None:
    own = "    %7 = tosa.cast %6 : (tensor<1x4xi32>) -> tensor<1x4xi8>"
    assert repaired(own) == own


def test_constants_become_tosas_own() -> None:
    assert '    %c = "tosa.const"() <{values = dense<2> : tensor<i32>}> : () -> tensor<i32>' in repaired(LEFT_OVER)


def test_what_is_not_tosa_is_named() -> None:
    found = foreign(LEFT_OVER)
    assert found is not None
    assert (found.kind, found.tensor) == ("CUMSUM", "head.sum:1")
    assert foreign(QUANTIZE) is None


def tensor(shape: tuple[int | str, ...]) -> SignatureTensor:
    return SignatureTensor("x", "x", shape, "int8", "float32")


def test_a_dynamic_input_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.tosa"
    path.write_bytes(b"")
    with pytest.raises(ConversionError, match="input 'x' has the dynamic dimension 'batch'"):
        TosaRuntime().open(path, Signature((tensor(("batch", 4)),), ()))


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pte"
    with pytest.raises(ConversionError, match="has no TOSA form"):
        TosaRuntime().open(path, Signature((tensor((1, 4)),), ()))


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0TOSA", b"\x10\0\0\0TOSA" + bytes(40), b"\0" * 64])
def test_damaged_flatbuffers_are_not_run(content: bytes) -> None:
    with pytest.raises(UsageError):
        read(content, "m.tosa")
