"""The grid's arithmetic and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeopt.calibration.ranges import Range
from edgeopt.training.fake_quant import ActivationQuantizer, Grid, WeightQuantizer, quantize_to_own_range


def reference(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 QuantizeLinear then DequantizeLinear, as the ONNX operators define them."""
    scale = np.float32((high - low) / 255)
    zero_point = np.clip(np.rint(-low / scale), 0, 255)
    return ((np.clip(np.rint(values / scale) + zero_point, 0, 255) - zero_point) * scale).astype(np.float32)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-2.5, 0.0)])
def test_activations_are_what_the_onnx_operators_give(learned: bool, low: float, high: float) -> None:
    values = np.random.default_rng(0).normal(size=4000).astype(np.float32) * 3
    quantizer = ActivationQuantizer(Grid(), learned=learned)
    quantizer.set_range(Range(low, high))
    found = quantizer(torch.from_numpy(values)).detach().numpy()
    np.testing.assert_allclose(found, reference(values, low, high), atol=1e-5)


def test_ties_go_to_the_even_integer() -> None:
    quantizer = ActivationQuantizer(Grid())
    quantizer.set_range(Range(0.0, 255.0))
    assert quantizer(torch.tensor([0.5, 1.5, 2.5, 3.5])).tolist() == [0.0, 2.0, 2.0, 4.0]


@pytest.mark.parametrize("learned", [False, True])
def test_gradient_passes_inside_the_range_only(learned: bool) -> None:
    quantizer = ActivationQuantizer(Grid(), learned=learned)
    quantizer.set_range(Range(0.0, 6.0))
    values = torch.tensor([-1.0, 2.0, 7.0], requires_grad=True)
    quantizer(values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 0.0]


def test_a_learned_bound_follows_what_it_clips() -> None:
    quantizer = ActivationQuantizer(Grid(), learned=True)
    quantizer.set_range(Range(0.0, 1.0))
    quantizer(torch.tensor([5.0, 6.0])).sum().backward()
    assert quantizer.high.grad is not None
    assert float(quantizer.high.grad) > 0


def test_symmetric_grid_keeps_zero_in_the_middle() -> None:
    quantizer = ActivationQuantizer(Grid(symmetric=True))
    quantizer.set_range(Range(-1.0, 0.5))
    assert quantizer.range() == Range(-1.0, 1.0)
    assert quantizer(torch.tensor([0.0, -1.0, 1.0, 2.0])).tolist() == pytest.approx([0.0, -1.0, 1.0, 1.0])


def test_ranges_of_its_own_for_each_sample() -> None:
    small, large = torch.linspace(0, 1, 50), torch.linspace(0, 100, 50)
    both = quantize_to_own_range(torch.stack([small, large]), Grid(), leading=1)
    torch.testing.assert_close(both[0], quantize_to_own_range(small, Grid()))
    assert float((quantize_to_own_range(torch.stack([small, large]), Grid())[0] - small).abs().max()) > 0.1


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("learned", [False, True])
def test_weights_lie_on_a_grid_that_its_own_maximum_gives(axis: int | None, learned: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3)
    quantizer = WeightQuantizer(weight, axis, learned=learned)
    if quantizer.scale is not None:
        with torch.no_grad():
            quantizer.scale.mul_(0.7)
    first = quantizer(weight).detach()
    # An exporter sees only the result, and takes max|w| / 127.
    again = WeightQuantizer(first, axis)(first)
    torch.testing.assert_close(again, first, rtol=1e-6, atol=1e-7)


def test_a_learned_weight_scale_never_leaves_the_last_steps_unused() -> None:
    weight = torch.tensor([[1.0, 0.5], [4.0, 2.0]])
    quantizer = WeightQuantizer(weight, 0, learned=True)
    assert quantizer.scale is not None
    with torch.no_grad():
        quantizer.scale.mul_(10)
    torch.testing.assert_close(quantizer(weight).abs().amax(1), torch.tensor([1.0, 4.0]))


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 3)
    for learned in (False, True):
        assert WeightQuantizer(weight, 0, learned=learned)(weight).abs().sum() == 0
