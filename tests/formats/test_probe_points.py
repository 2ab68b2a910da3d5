"""Which tensors of a graph are results of layers."""

from __future__ import annotations

from edgeopt.formats.probe_points import Operator, Role, find_points


def op(layer: str, role: Role, inputs: str, outputs: str, *, bare: bool = False) -> Operator:
    return Operator(layer, role.name, role, tuple(inputs.split()), tuple(outputs.split()), bare)


def found(operators: list[Operator], *outputs: str) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(p.operator.layer, p.tensor, p.inputs) for p in find_points(operators, outputs)]


def test_a_kernel_is_followed_through_its_bias_and_its_activation() -> None:
    operators = [
        op("fc", Role.KERNEL, "x", "product"),
        op("fc", Role.BIAS, "product", "sum"),
        op("act", Role.ACTIVATION, "sum", "clipped"),
        op("head", Role.KERNEL, "clipped", "y"),
    ]
    assert found(operators, "y") == [("fc", "clipped", ()), ("head", "y", (0,))]


def test_an_activation_behind_quantization_is_followed_too() -> None:
    operators = [
        op("conv", Role.KERNEL, "x", "raw"),
        op("", Role.PASSIVE, "raw", "q"),
        op("", Role.PASSIVE, "q", "dq"),
        op("act", Role.ACTIVATION, "dq", "clipped"),
        op("", Role.PASSIVE, "clipped", "y"),
    ]
    assert found(operators, "y") == [("conv", "clipped", ())]


def test_an_activation_that_shares_its_input_is_a_layer_of_its_own() -> None:
    operators = [
        op("conv", Role.KERNEL, "x", "raw"),
        op("act", Role.ACTIVATION, "raw", "clipped"),
        op("block", Role.COMPUTES, "raw clipped", "y"),
    ]
    assert found(operators, "y") == [("conv", "raw", ()), ("act", "clipped", (0,)), ("block", "y", (0, 1))]


def test_a_constant_that_another_layer_adds_is_no_bias() -> None:
    operators = [op("fc", Role.KERNEL, "x", "product"), op("shift", Role.BIAS, "product", "y")]
    assert found(operators, "y") == [("fc", "product", ())]


def test_only_what_leaves_a_layer_counts() -> None:
    operators = [
        op("fc", Role.KERNEL, "x", "a"),
        op("norm", Role.COMPUTES, "a", "mean"),
        op("norm", Role.COMPUTES, "a mean", "centred"),
        op("norm", Role.COMPUTES, "centred", "b"),
        op("head", Role.PASSIVE, "b", "c"),
        op("head", Role.KERNEL, "c", "y"),
    ]
    assert found(operators, "y") == [("fc", "a", ()), ("norm", "b", (0,)), ("head", "y", (1,))]


def test_what_only_moves_on_inside_a_layer_does_not_leave_it() -> None:
    operators = [
        op("attention", Role.COMPUTES, "x", "a"),
        op("attention", Role.PASSIVE, "a", "b"),
        op("attention", Role.KERNEL, "b", "y"),
    ]
    assert found(operators, "y") == [("attention", "y", ())]


def test_operators_without_a_layer_are_no_points_unless_they_are_kernels() -> None:
    operators = [op("", Role.COMPUTES, "x", "a"), op("", Role.KERNEL, "a", "y")]
    assert found(operators, "y") == [("", "y", ())]


def test_bare_integers_are_followed_to_the_reals_that_they_become() -> None:
    operators = [
        op("", Role.PASSIVE, "x", "xq scale"),
        op("fc", Role.COMPUTES, "scale", "scales"),
        op("fc", Role.KERNEL, "xq", "integers", bare=True),
        op("", Role.PASSIVE, "integers", "cast"),
        op("fc", Role.COMPUTES, "cast scales", "product"),
        op("fc", Role.BIAS, "product", "y"),
    ]
    assert found(operators, "y") == [("fc", "y", ())]


def test_the_scale_that_an_embedding_looks_up_is_no_embedding() -> None:
    operators = [
        op("words", Role.KERNEL, "ids", "steps", bare=True),
        op("words", Role.KERNEL, "ids", "scale"),
        op("words", Role.PASSIVE, "steps", "cast"),
        op("words", Role.COMPUTES, "cast scale", "y"),
    ]
    assert found(operators, "y") == [("words", "y", ())]


def test_inputs_pass_through_what_is_no_point() -> None:
    operators = [
        op("a", Role.KERNEL, "x", "a"),
        op("b", Role.KERNEL, "x", "b"),
        op("", Role.COMPUTES, "a b", "sum"),
        op("c", Role.KERNEL, "sum", "y"),
    ]
    assert found(operators, "y") == [("a", "a", ()), ("b", "b", ()), ("c", "y", (0, 1))]
