import pytest

from edgeopt.types import Gates, Measurement, OpTiming
from edgeopt.validation.evaluate import Evaluation
from edgeopt.validation.gates import accuracy_drop, judge, without_limit


def evaluation(reference=0.8323, candidate=0.8273, *, higher=True, agreement=0.98, sqnr_db=19.0):
    return Evaluation(100, "top1", higher, reference, candidate, (), agreement, sqnr_db)


def measured(name, value, subject="quantized"):
    return Measurement(name, subject, value, "", "measured-host", "litert")


ALL = (
    measured("latency_ms", 2.0),
    measured("latency_ms", 5.0, "float"),
    measured("speedup", 2.5),
    measured("size_bytes", 100),
    measured("size_bytes", 400, "float"),
    measured("peak_memory_bytes", 1000),
    measured("peak_memory_bytes", 4000, "float"),
)


def test_every_limit_becomes_one_check_in_order():
    gates = Gates(0.01, 0.9, 15, 1.0, 3.0, 200, 2000)
    checks = judge(gates, evaluation(), ALL, {})
    assert [(c.name, c.op, c.unit) for c in checks] == [
        ("accuracy_drop", "<=", "fraction"),
        ("agreement", ">=", "fraction"),
        ("sqnr_db", ">=", "dB"),
        ("speedup", ">=", "x"),
        ("latency_ms", "<=", "ms"),
        ("size_bytes", "<=", "bytes"),
        ("peak_memory_bytes", "<=", "bytes"),
    ]
    assert all(c.passed and c.advice is None for c in checks)
    assert [c.measured for c in checks[1:]] == [0.98, 19.0, 2.5, 2.0, 100, 1000]


def test_every_limit_can_fail():
    gates = Gates(0.001, 0.99, 20, 3.0, 1.0, 50, 500)
    assert not any(c.passed for c in judge(gates, evaluation(), ALL, {}))


def test_limits_that_are_not_set_are_not_checked():
    assert judge(Gates(), evaluation(), ALL, {}) == ()


def test_a_limit_that_is_met_exactly_passes_despite_rounding():
    assert 0.8323 - 0.8273 > 0.005
    (check,) = judge(Gates(max_accuracy_drop=0.005), evaluation(), (), {})
    assert check.passed
    (check,) = judge(Gates(max_accuracy_drop=0.0), evaluation(0.5, 0.5), (), {})
    assert check.passed


def test_a_share_of_the_metric_may_be_the_limit():
    (check,) = judge(Gates(min_accuracy_kept=0.97), evaluation(0.40, 0.39), (), {})
    assert (check.name, check.op, check.passed, round(check.measured, 4)) == ("accuracy_kept", ">=", True, 0.975)
    (check,) = judge(Gates(min_accuracy_kept=0.99), evaluation(0.40, 0.39), (), {"accuracy_kept": "train longer"})
    assert (check.passed, check.advice) == (False, "train longer")


@pytest.mark.parametrize("odd", [evaluation(0.0, 0.1), evaluation(None, None), evaluation(higher=False)])
def test_a_share_of_nothing_is_not_judged_unless_the_user_asked(odd):
    assert judge(Gates(min_accuracy_kept=0.97), odd, (), {}) == ()
    (check,) = judge(Gates(min_accuracy_kept=0.97), odd, (), {}, frozenset({"min_accuracy_kept"}))
    assert not check.passed


def test_accuracy_drop_knows_which_way_is_better():
    assert accuracy_drop(evaluation(0.9, 0.8)) == pytest.approx(0.1)
    assert accuracy_drop(evaluation(0.9, 0.8, higher=False)) == pytest.approx(-0.1)
    assert accuracy_drop(evaluation(None, None)) is None


def test_a_float_file_alone_is_judged_by_its_own_figures():
    (check,) = judge(Gates(max_latency_ms=4.0), None, (measured("latency_ms", 5.0, "float"),), {})
    assert (check.measured, check.passed) == (5.0, False)


GATE_FIELDS = ("max_accuracy_drop", "min_agreement", "min_sqnr_db", "min_speedup", "max_latency_ms", "max_size_bytes")


@pytest.mark.parametrize("field", GATE_FIELDS)
def test_default_limits_that_cannot_be_measured_are_left_out_and_required_ones_fail(field):
    gates = Gates(**{field: 1})
    assert judge(gates, None, (), {}) == ()
    (check,) = judge(gates, None, (), {}, frozenset({field}))
    assert check.measured is None
    assert not check.passed
    assert check.advice.startswith("could not be measured: ")


def test_a_required_limit_that_is_switched_off_is_not_checked():
    assert judge(Gates(), None, (), {}, frozenset({"min_speedup"})) == ()


def test_required_accuracy_without_labels_says_what_to_give():
    (check,) = judge(Gates(max_accuracy_drop=0.01), evaluation(None, None), (), {}, frozenset({"max_accuracy_drop"}))
    assert "give labelled data, or pairs of texts, with --evaluation" in check.advice


def test_a_failed_speedup_names_the_slowest_operators():
    timings = [
        OpTiming("a", "Conv", 0.1),
        OpTiming("b", "MatMul", 3.0),
        OpTiming("c", "Add", 0.2),
        OpTiming("d", "Mul", 1.0),
    ]
    (check,) = judge(Gates(min_speedup=3.0), None, ALL, {"speedup": "try dynamic"}, frozenset(), timings)
    assert check.advice == "try dynamic; slowest operators: b (MatMul, 3.00 ms), d (Mul, 1.00 ms), c (Add, 0.20 ms)"


def test_advice_of_the_target_is_given_on_failure_only():
    advice = {"size_bytes": "use int8"}
    assert judge(Gates(max_size_bytes=99), None, ALL, advice)[0].advice == "use int8"
    assert judge(Gates(max_size_bytes=100), None, ALL, advice)[0].advice is None


def test_what_has_no_limit_is_told_all_the_same() -> None:
    found = without_limit(Gates(min_speedup=2.0), evaluation(), ALL)
    assert "speedup" not in {check.name for check in found}
    assert {"accuracy_drop", "agreement", "sqnr_db", "latency_ms", "size_bytes"} <= {check.name for check in found}
    assert all(check.passed and check.limit is None and check.measured is not None for check in found)
    assert without_limit(Gates(), None, ()) == ()
