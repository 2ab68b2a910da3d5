import numpy as np
import pytest

from edgeopt.calibration.health import InputHealth, check_inputs
from edgeopt.errors import DataError
from edgeopt.types import Sample, TensorSpec

IMAGE = (TensorSpec("image", (1, 3, 8, 8), "float32", "NCHW"),)
TEXT = (TensorSpec("input_ids", (1, 16), "int64"), TensorSpec("attention_mask", (1, 16), "int64"))


def images(make, count=40, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [
        Sample({"image": np.asarray(make(rng)).astype(dtype).reshape(1, 3, 8, 8)}, None, f"{i}.png")
        for i in range(count)
    ]


def normal(rng):
    return rng.normal(size=192)


def constant(value, size=192):
    def make(rng):
        del rng
        return np.full(size, value)

    return make


def codes(samples, inputs=IMAGE):
    return [(f.code, f.where) for f in check_inputs(iter(samples), inputs, len(samples))]


def test_normalised_pictures_are_fine():
    assert codes(images(normal)) == []
    assert codes(images(lambda rng: rng.uniform(0, 1, 192))) == []
    assert codes(images(normal, dtype=np.float16)) == []


def test_too_few_samples():
    assert codes(images(normal, count=31)) == [("too-few-samples", "calibration data")]


def test_no_samples_at_all():
    with pytest.raises(DataError, match="calibration data: holds no samples"):
        check_inputs([], IMAGE, 0)


def test_constant_input():
    assert ("constant-input", "image") in codes(images(constant(0.5)))
    assert ("constant-input", "image") in codes(images(lambda rng: np.full(192, rng.uniform())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rng: rng.integers(0, 256, 192), "whole numbers 0..255, which looks like pixels"),
        (lambda rng: rng.uniform(0, 255, 192), "which looks like pixels"),
        (lambda rng: rng.normal(0, 1e5, 192), "raw units"),
    ],
)
def test_unnormalised_input(make, message):
    (finding,) = check_inputs(images(make), IMAGE, 40)
    assert finding.code == "unnormalised-input"
    assert message in finding.message


def test_saturated_input():
    (finding,) = check_inputs(images(lambda rng: np.clip(rng.normal(1.5, 1, 192), -1, 1)), IMAGE, 40)
    assert finding.code == "saturated-input"
    assert "69% of its values lie exactly on its extreme 1" in finding.message


def test_halves_that_differ():
    first = images(normal, 20)
    moved = first + images(lambda rng: rng.normal(5, 1, 192), 20)
    wider = first + images(lambda rng: rng.normal(0, 4, 192), 20)
    assert codes(moved) == [("input-halves-differ", "image")]
    assert codes(wider) == [("input-halves-differ", "image")]
    assert codes(moved[::2] + moved[1::2]) == []


def test_halves_of_varied_but_unsorted_data_are_fine():
    assert codes(images(lambda rng: rng.normal(rng.normal(), rng.uniform(0.3, 1.5), 192))) == []


def test_repeated_samples():
    twice = images(normal, count=20) * 2
    (finding,) = check_inputs(twice, IMAGE, 40)
    assert finding.code == "repeated-samples"
    assert finding.message.startswith("20 of 40")


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "Inf")])
def test_what_is_not_finite_names_tensor_and_sample(value, word):
    samples = images(normal)
    broken = samples[7].inputs["image"]
    broken[0, 1, 2, 3] = value
    with pytest.raises(DataError, match=rf"input 'image' of sample '7.png': holds {word}"):
        check_inputs(samples, IMAGE, 40)


def test_empty_and_missing_inputs():
    with pytest.raises(DataError, match="input 'image' of sample 'x': is empty"):
        check_inputs([Sample({"image": np.zeros((1, 0))}, None, "x")], IMAGE, 1)
    with pytest.raises(DataError, match="sample 'x': lacks the input 'image'"):
        check_inputs([Sample({"picture": np.zeros(1)}, None, "x")], IMAGE, 1)


def texts(make, count=40):
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        ids = np.asarray(make(rng), dtype=np.int64).reshape(1, 16)
        samples.append(Sample({"input_ids": ids, "attention_mask": np.ones_like(ids)}, None, str(i)))
    return samples


def test_token_ids():
    assert codes(texts(lambda rng: rng.integers(5, 3000, 16)), TEXT) == []
    assert codes(texts(lambda rng: [101, *rng.integers(5, 3000, 5), *[0] * 10]), TEXT) == []


def test_token_ids_that_are_all_padding():
    assert ("constant-tokens", "input_ids") in codes(texts(constant(0, 16)), TEXT)
    assert ("constant-tokens", "input_ids") in codes(texts(constant(7, 16)), TEXT)
    nearly = [*texts(lambda rng: rng.integers(5, 3000, 16), 20), *texts(constant(2, 16), 20)]
    assert ("constant-tokens", "input_ids") in codes(nearly, TEXT)


def test_segment_ids_may_be_zero():
    spec = (TensorSpec("token_type_ids", (1, 4), "int64"),)
    samples = [Sample({"token_type_ids": np.zeros((1, 4), np.int64)}, None, str(i)) for i in range(40)]
    assert codes(samples, spec) == [("repeated-samples", "calibration data")]


def test_health_can_share_a_pass_over_the_data():
    health = InputHealth(IMAGE, 40)
    for sample in images(normal):
        health.update(sample)
    assert health.findings() == ()
