"""Region classification losses."""

import math

import pytest
import torch
from detectron2.layers import cross_entropy
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers

from ovd.losses.detection import independent_classification_loss, region_classification_loss


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


def independent_cases() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(7, 6), torch.tensor([0, 5, 3, 5, 1, 1, 5])


def test_independent_loss_is_detectron2s_when_all_counts() -> None:
    logits, classes = independent_cases()
    theirs = FastRCNNOutputLayers(4, box2box_transform=Box2BoxTransform((1.0,) * 4), num_classes=5, use_sigmoid_ce=True)
    expected = theirs.sigmoid_cross_entropy_loss(logits, classes)
    torch.testing.assert_close(independent_classification_loss(logits, classes, None, 1.0), expected)


@pytest.mark.parametrize("for_each_region", [False, True])
def test_independent_loss_equals_an_explicit_sum_over_counted_classes(for_each_region: bool) -> None:
    logits, classes = independent_cases()
    counted = torch.rand(7, 5) > 0.5
    counted = counted if for_each_region else counted[0]
    total = 0.0
    for region, target in enumerate(classes.tolist()):
        for c in range(5):
            own = c == target
            if own or bool(counted[region, c] if for_each_region else counted[c]):
                p = 1 / (1 + math.exp(-logits[region, c]))
                total += (0.9 if target == 5 else 1.0) * -math.log(p if own else 1 - p)
    assert independent_classification_loss(logits, classes, counted, 0.9).item() == pytest.approx(total / 7, rel=1e-5)


def test_a_class_that_does_not_count_gets_no_gradient() -> None:
    logits, classes = independent_cases()
    logits.requires_grad_()
    independent_classification_loss(logits, classes, torch.tensor([True, True, False, True, False])).backward()
    assert (logits.grad[:, [2, 4, 5]] == 0).all() and (logits.grad[:, [0, 1, 3]] != 0).all()


def test_no_regions_give_zero_with_a_gradient_in_the_independent_loss() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = independent_classification_loss(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and logits.grad is not None
