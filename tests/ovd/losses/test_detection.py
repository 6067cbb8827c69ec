"""Region classification loss."""

import pytest
import torch
from detectron2.layers import cross_entropy

from ovd.losses.detection import region_classification_loss


def test_weight_one_is_detectron2s_loss() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(12, 5), torch.randint(0, 5, (12,))
    expected = cross_entropy(logits, classes, reduction="mean")
    torch.testing.assert_close(region_classification_loss(logits, classes, 1.0), expected)


def test_equals_an_explicit_sum_over_regions() -> None:
    torch.manual_seed(1)
    logits, classes = torch.randn(9, 4), torch.tensor([0, 3, 3, 1, 2, 3, 0, 3, 3])
    total = 0.0
    for row, target in zip(logits, classes, strict=True):
        loss = row.exp().sum().log() - row[target]
        total = total + (0.9 if target == 3 else 1.0) * loss
    torch.testing.assert_close(region_classification_loss(logits, classes, 0.9), total / 9)


def test_no_regions_give_zero_with_a_gradient() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = region_classification_loss(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and logits.grad is not None


def test_class_beyond_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match="class 7, but the vocabulary has 3"):
        region_classification_loss(torch.zeros(2, 4), torch.tensor([0, 7]))
