"""Results of two files: which is which, and in which layout."""

from __future__ import annotations

import numpy as np
import pytest

from edgeopt.debugging.matching import Layouts, Trace, can_be_same, pair

RANDOM = np.random.default_rng(0)


def test_layers_are_matched_by_name_and_then_by_order() -> None:
    a = [Trace("stem", (1, 8, 4, 4)), Trace("block", (1, 8, 2, 2)), Trace("block", (1, 8, 2, 2)), Trace("gone", (1, 3))]
    b = [Trace("block", (1, 2, 2, 8)), Trace("stem", (1, 4, 4, 8)), Trace("block", (1, 2, 2, 8)), Trace("new", (1, 9))]
    found = pair(a, b)
    assert (found.pairs, found.matched_by) == (((0, 1), (1, 0), (2, 2)), "layer")


def test_a_result_that_only_one_file_has_is_left_out_by_its_size() -> None:
    a = [Trace("attention", (4, 16, 16)), Trace("attention", (4, 16, 8)), Trace("attention", (16, 32, 3))]
    b = [Trace("attention", (1, 4, 16, 16)), Trace("attention", (1, 48, 32))]
    assert pair(a, b).pairs == ((0, 0), (2, 1))


def test_files_without_common_names_are_matched_by_order_and_size() -> None:
    a = [Trace("", (1, 8, 4, 4)), Trace("", (1, 16, 4, 4)), Trace("", (1, 10))]
    b = [Trace("conv", (1, 4, 4, 8)), Trace("fc", (1, 10))]
    found = pair(a, b)
    assert (found.pairs, found.matched_by) == (((0, 0), (2, 1)), "order")


def test_results_without_a_name_are_matched_between_those_with_one() -> None:
    a = [Trace("stem", (1, 8)), Trace("query", (1, 6)), Trace("query", (1, 6)), Trace("norm", (1, 8)), Trace("x", (4,))]
    b = [
        Trace("stem", (1, 8)),
        Trace("", (6,)),
        Trace("", (6,)),
        Trace("", (9,)),
        Trace("norm", (1, 8)),
        Trace("y", (4,)),
    ]
    found = pair(a, b)
    assert (found.pairs, found.matched_by) == (((0, 0), (1, 1), (2, 2), (3, 4)), "layer")


def test_of_results_of_one_size_those_with_like_values_are_matched() -> None:
    random = np.random.default_rng(0)
    values = [random.standard_normal((1, 6, 8)) * scale for scale in (1.0, 5.0, 0.2, 3.0)]
    a = [Trace.of(name, array) for name, array in zip(("norm", "query", "key", "value"), values, strict=True)]
    moved = [array.reshape(1, 6, 2, 4).transpose(0, 2, 1, 3) for array in values[1:]]
    b = [Trace.of("", array) for array in moved]
    assert pair([Trace("stem", (3,)), *a], [Trace("stem", (3,)), *b]).pairs == ((0, 0), (2, 1), (3, 2), (4, 3))
    assert pair(a, b).pairs == ((1, 0), (2, 1), (3, 2))


def test_unnamed_results_are_no_common_layer() -> None:
    assert pair([Trace("", (2,)), Trace("x", (3,))], [Trace("", (2,)), Trace("y", (3,))]).matched_by == "order"


def test_nothing_in_common() -> None:
    assert pair([Trace("a", (2,))], [Trace("b", (3,))]).pairs == ()


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ((1, 8, 4, 4), (1, 4, 4, 8), True),
        ((1, 128, 256), (128, 256), True),
        ((2, 128, 256), (256, 256), True),
        ((1, 128, 256), (1, 4, 128, 64), True),
        ((), (1,), True),
        ((1, 8, 4, 4), (1, 8, 2, 2), False),
        ((6, 4), (3, 8), False),
        ((0, 3), (0, 3), True),
    ],
)
def test_shapes_of_one_tensor(a: tuple[int, ...], b: tuple[int, ...], same: bool) -> None:
    assert can_be_same(a, b) == can_be_same(b, a) == same


@pytest.mark.parametrize("shape", [(1, 8, 4, 6), (1, 4, 4, 4), (2, 4, 4, 4), (3, 5, 7, 7), (1, 8, 1, 1)])
def test_channel_last_comes_back_even_where_all_sizes_tie(shape: tuple[int, ...]) -> None:
    values = RANDOM.standard_normal(shape)
    noisy = values + 0.1 * RANDOM.standard_normal(shape)
    for first, second in ((values, noisy.transpose(0, 2, 3, 1)), (values.transpose(0, 2, 3, 1), noisy)):
        aligned = Layouts().aligned(0, first, second)
        assert aligned is not None
        assert np.abs(aligned[0] - aligned[1]).max() < 1


def test_heads_that_one_file_has_split_off_and_moved() -> None:
    values = RANDOM.standard_normal((1, 16, 32))
    heads = values.reshape(1, 16, 4, 8).transpose(0, 2, 1, 3)
    for pair_ in ((values, heads), (heads, values)):
        aligned = Layouts().aligned(0, *pair_)
        assert aligned is not None
        np.testing.assert_array_equal(*aligned)


def test_the_layout_of_the_first_sample_holds_for_all() -> None:
    layouts = Layouts()
    values = RANDOM.standard_normal((1, 4, 4, 4))
    layouts.aligned(0, values, values.transpose(0, 2, 3, 1))
    aligned = layouts.aligned(0, values, np.zeros((1, 4, 4, 4)))
    assert aligned is not None
    np.testing.assert_array_equal(aligned[0], values[0])
    marked = np.arange(64.0).reshape(1, 4, 4, 4)
    again = layouts.aligned(0, values, marked)
    assert again is not None
    np.testing.assert_array_equal(again[1], marked[0].transpose(2, 0, 1))


def test_arrays_that_do_not_fit() -> None:
    assert Layouts().aligned(0, np.zeros((2, 3)), np.zeros((2, 4))) is None
