import tracemalloc

import numpy as np
import pytest

from edgeopt.errors import DataError
from edgeopt.runtimes.base import Session
from edgeopt.types import Sample, Signature, SignatureTensor
from edgeopt.validation.evaluate import evaluate
from edgeopt.validation.metrics import load_metric

X = SignatureTensor("x", "x", (1, 4), "float32", "float32")
SIGNATURE = Signature(
    (X,), (SignatureTensor("y", "y", (1, 4), "float32", "float32"), SignatureTensor("n", "n", (1,), "int64", "int64"))
)


class Fake(Session):
    def __init__(self, function):
        super().__init__(SIGNATURE)
        self._function = function

    def run_native(self, inputs):
        y = self._function(inputs["x"])
        return {"y": y, "n": np.array([y.argmax()])}

    def close(self):
        pass


def samples(count, labelled=True):
    rng = np.random.default_rng(0)
    for i in range(count):
        x = rng.normal(size=(1, 4)).astype(np.float32)
        yield Sample({"x": x}, int(x.argmax()) if labelled else None, str(i))


def test_metric_and_fidelity_in_one_pass():
    worse = Fake(lambda x: x * np.array([1, 1, 1, 0], dtype=np.float32))
    result = evaluate(Fake(lambda x: x), worse, samples(100), load_metric("top1"))
    assert result.samples == 100
    assert result.metric == "top1"
    assert result.reference_metric == 1.0
    assert 0.5 < result.candidate_metric < 0.9
    assert [o.name for o in result.outputs] == ["y", "n"]
    assert result.agreement == result.outputs[0].agreement == result.outputs[1].agreement == result.candidate_metric
    assert result.sqnr_db == result.outputs[0].sqnr_db
    assert 3 < result.sqnr_db < 10


def test_without_labels():
    result = evaluate(Fake(lambda x: x), Fake(lambda x: x), samples(3, labelled=False), None)
    assert (result.metric, result.reference_metric, result.candidate_metric) == (None, None, None)
    assert result.agreement == 1.0


def test_no_samples():
    with pytest.raises(DataError, match="evaluation data: holds no samples"):
        evaluate(Fake(lambda x: x), Fake(lambda x: x), [], None)


def test_memory_does_not_grow_with_the_number_of_samples():
    def peak(count):
        tracemalloc.start()
        evaluate(Fake(lambda x: x), Fake(lambda x: x), samples(count), load_metric("top1"))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(5)
    assert peak(400) < peak(20) + 20_000
