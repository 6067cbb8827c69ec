"""Centerness, paired IoU and the losses of localisation-quality proposals."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from ovd.losses.proposals import box_iou_loss, centerness, paired_iou, quality_loss


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((50.0, 30.0), 1.0),  # the middle
        ((25.0, 30.0), math.sqrt(25 / 75)),
        ((50.0, 20.0), math.sqrt(10 / 30)),
        ((90.0, 40.0), math.sqrt(10 / 90 * 10 / 30)),
        ((0.0, 30.0), 0.0),  # on the border
        ((120.0, 30.0), 0.0),  # outside to one side
        ((-10.0, -10.0), 0.0),  # outside to both, where the product of two negative ratios is positive
    ],
)
def test_centerness_has_its_hand_values(point: tuple, expected: float) -> None:
    value = centerness(torch.tensor([point]), torch.tensor([[0.0, 10.0, 100.0, 50.0]]))
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_an_empty_box_has_no_centerness() -> None:
    assert centerness(torch.tensor([[5.0, 5.0]]), torch.tensor([[5.0, 5.0, 5.0, 5.0]])).item() == 0.0


def test_paired_iou_is_torchvisions_diagonal() -> None:
    torch.manual_seed(0)
    corners, sides = torch.rand(2, 20, 2) * 50, torch.rand(2, 20, 2) * 60
    first, second = torch.cat([corners, corners + sides], dim=2)
    torch.testing.assert_close(paired_iou(first, second), box_iou(first, second).diagonal())
    empty = torch.zeros(1, 4)
    assert paired_iou(empty, empty).item() == 0.0


def test_losses_are_zero_at_their_targets_and_without_regions() -> None:
    targets, boxes = torch.tensor([0.2, 0.9]), torch.tensor([[0.0, 0, 10, 20], [5, 5, 9, 30]])
    assert quality_loss(targets.logit(), targets, 2).item() == pytest.approx(0, abs=1e-6)
    assert box_iou_loss(boxes, boxes, 2).item() == pytest.approx(0, abs=1e-6)
    logits, none = torch.zeros(0, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    (quality_loss(logits, torch.zeros(0), 8) + box_iou_loss(none, torch.zeros(0, 4), 8)).backward()
    assert logits.grad is not None and none.grad is not None


def test_losses_are_sums_over_the_size_of_a_full_sample() -> None:
    assert quality_loss(torch.zeros(2), torch.tensor([0.1, 0.8]), 8).item() == pytest.approx((0.4 + 0.3) / 8)
    half = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 20]])
    assert box_iou_loss(*half, 4).item() == pytest.approx(0.5 / 4)
