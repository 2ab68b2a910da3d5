import numpy as np
import pytest

from edgeopt.errors import UsageError
from edgeopt.sources.signature import check_specs, parse_input, synthesize
from edgeopt.types import Dim, TensorSpec


def test_reads_sizes_dynamic_dimensions_and_layout() -> None:
    assert parse_input("input_ids=int64[batch:1..8, seq:1..128]") == TensorSpec(
        "input_ids", (Dim("batch", 1, 8), Dim("seq", 1, 128)), "int64"
    )
    assert parse_input("x=float32[1,224,224,3]@NHWC") == TensorSpec("x", (1, 224, 224, 3), "float32", "NHWC")
    assert parse_input("scale=float32[]") == TensorSpec("scale", (), "float32")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x", "is not an input declaration"),
        ("x=float32[1,3", "is not an input declaration"),
        ("x=float64[1]", "unknown type 'float64'"),
        ("x=float32[0]", "'0' is no dimension"),
        ("x=float32[batch]", "'batch' is no dimension"),
        ("x=float32[1,]", "'' is no dimension"),
        ("x=float32[n:4..2]", "empty range"),
        ("x=float32[1,3,8,8]@NWHC", "unknown layout"),
        ("x=float32[1,3]@NCHW", "needs four dimensions"),
    ],
)
def test_a_wrong_declaration_is_one_clear_line(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem.replace("'", ".")) as caught:
        parse_input(text)
    assert "\n" not in caught.value.line()
    assert "--input" in caught.value.line()


def test_examples_fit_and_are_the_same_every_time() -> None:
    specs = tuple(
        parse_input(text)
        for text in ("ids=int64[batch:1..8,seq:4..12]", "attention_mask=int64[batch:1..8,seq:4..12]", "x=float32[3]")
    )
    first, second = synthesize(specs), synthesize(specs)
    assert first["ids"].shape == first["attention_mask"].shape == (2, 12)
    assert not first["ids"].any()
    assert first["attention_mask"].all()
    assert first["x"].dtype == np.float32
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_one_dimension_name_means_one_range() -> None:
    specs = (TensorSpec("a", (Dim("n", 1, 4),), "float32"), TensorSpec("b", (Dim("n", 1, 8),), "float32"))
    with pytest.raises(UsageError, match="different bounds"):
        check_specs(specs)
    with pytest.raises(UsageError, match="declared twice"):
        check_specs((specs[0], specs[0]))
