"""Losses by name, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeopt.errors import DataError, UsageError
from edgeopt.training.losses import cross_entropy, distillation, load_loss


def test_default_follows_the_labels() -> None:
    assert load_loss(None, False, 0.5, 2.0).task is None
    assert load_loss(None, True, 0.5, 2.0).task is cross_entropy


def test_mixture_is_weighted() -> None:
    scores, teacher, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    mixed = load_loss("cross-entropy", True, 0.3, 2.0)([scores], labels, [teacher])
    expected = 0.3 * cross_entropy([scores], labels) + 0.7 * distillation([scores], [teacher], 2.0, {0})
    torch.testing.assert_close(mixed, expected)


def test_distillation_is_zero_for_the_teacher_itself_and_positive_elsewhere() -> None:
    scores, pictures = torch.randn(4, 5), torch.randn(4, 3, 8, 8)
    assert float(distillation([scores, pictures], [scores, pictures], 2.0, {0})) == pytest.approx(0, abs=1e-6)
    assert float(distillation([scores, pictures], [scores + torch.randn(4, 5), pictures], 2.0, {0})) > 0.01


def test_only_what_is_known_to_be_class_scores_is_distilled_by_shares() -> None:
    outputs, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    drifted = outputs + 3  # no softmax tells the difference
    unknown = load_loss("distillation", False, 0.5, 2.0)
    assert float(unknown([drifted], None, [outputs])) > 1
    assert float(unknown([drifted], torch.randn(4, 5), [outputs])) > 1
    assert float(unknown([drifted], labels, [outputs])) == pytest.approx(0, abs=1e-6)
    declared = load_loss("distillation", False, 0.5, 2.0, class_count=5)
    assert float(declared([drifted], None, [outputs])) == pytest.approx(0, abs=1e-6)
    assert float(declared([drifted[:, :4]], None, [outputs[:, :4]])) > 1


def test_distillation_of_a_single_number_has_a_unit() -> None:
    assert float(distillation([torch.tensor([[3.3]])], [torch.tensor([[3.0]])], 2.0, ())) == pytest.approx(0.01)


def test_a_model_that_ends_in_softmax_gives_the_same_losses() -> None:
    scores, teacher, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(cross_entropy([scores.softmax(-1)], labels), cross_entropy([scores], labels))
    torch.testing.assert_close(
        distillation([scores.softmax(-1)], [teacher.softmax(-1)], 2.0, {0}),
        distillation([scores], [teacher], 2.0, {0}),
    )


def test_negative_labels_are_skipped() -> None:
    scores = torch.randn(2, 3, 5)
    labels = torch.tensor([[0, -1, 2], [-1, -1, 4]])
    kept = labels >= 0
    torch.testing.assert_close(cross_entropy([scores], labels), cross_entropy([scores[kept]], labels[kept]))


def test_a_batch_without_a_label_that_counts_says_nothing() -> None:
    scores = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy([scores], torch.full((2, 3), -100))
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0
    assert scores.grad is not None
    assert not bool(scores.grad.any())


def test_one_network_may_end_in_softmax_and_the_other_not() -> None:
    scores, teacher = torch.randn(4, 5), torch.randn(4, 5)
    wanted = distillation([scores], [teacher], 2.0, {0})
    torch.testing.assert_close(distillation([scores], [teacher.softmax(-1)], 2.0, {0}), wanted)
    torch.testing.assert_close(distillation([scores.softmax(-1)], [teacher], 2.0, {0}), wanted)


def test_padding_is_not_distilled_but_samples_without_a_class_are() -> None:
    loss = load_loss("distillation", True, 0.5, 2.0)
    scores, teacher, labels = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.tensor([[0, 1, -100], [-100, 2, 4]])
    kept = labels >= 0
    torch.testing.assert_close(
        loss([scores], labels, [teacher]), distillation([scores[kept]], [teacher[kept]], 2.0, {0})
    )
    assert float(loss([scores], torch.full((2, 3), -100), [teacher])) == 0
    flat, wanted = scores[:, 0], teacher[:, 0]
    torch.testing.assert_close(loss([flat], torch.tensor([-1, 3]), [wanted]), distillation([flat], [wanted], 2.0, {0}))


def test_user_function(tmp_path: Path) -> None:
    file = tmp_path / "loss.py"
    file.write_text("def l1(outputs, labels):\n    return (outputs - labels).abs().mean()\n")
    loss = load_loss(f"{file}:l1", True, 1.0, 2.0)
    assert float(loss([torch.ones(2, 3)], torch.zeros(2, 3), [])) == 1.0


@pytest.mark.parametrize(
    ("name", "labelled", "message"),
    [
        ("cross-entropi", True, "did you mean 'cross-entropy'"),
        ("mse", False, "needs labels"),
        ("nowhere.py:loss", True, "no such file"),
    ],
)
def test_refusals(name: str, labelled: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_loss(name, labelled, 0.5, 2.0)


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="class indices"):
        cross_entropy([torch.randn(2, 3)], torch.randn(2, 3))
    with pytest.raises(DataError, match="has the label 7, and the model has 3 classes, 0 to 2"):
        cross_entropy([torch.randn(2, 3)], torch.tensor([0, 7]))
    with pytest.raises(DataError, match="without labels"):
        load_loss("cross-entropy", True, 1.0, 2.0)([torch.randn(2, 3)], None, [])
