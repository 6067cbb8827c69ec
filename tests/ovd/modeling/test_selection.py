"""Selection against Detectron2's own."""

import pytest
import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from torchvision.ops import nms

from ovd.modeling.selection import best_pairs, class_nms, select_best


def random_regions(regions: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes that overlap a lot, some beyond the picture of 100 x 120, and scores without ties."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(regions, 2, generator=generator) * 80 - 10
    boxes = torch.cat([corner, corner + 30 + 40 * torch.rand(regions, 2, generator=generator)], dim=1)
    scores = torch.randperm(regions * classes, generator=generator).reshape(regions, classes) / (regions * classes)
    return boxes, scores


def reference(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, nms: float, limit: int):
    with_background = torch.cat([scores, torch.zeros(len(scores), 1)], dim=1)
    return fast_rcnn_inference([boxes.clone()], [with_background], [(100, 120)], threshold, nms, limit)[0][0]


@pytest.mark.parametrize("regions", [1, 30, 200])
@pytest.mark.parametrize("classes", [1, 3, 150])
@pytest.mark.parametrize(("threshold", "limit"), [(0.0, 5), (0.0, 300), (0.6, 50), (0.0, -1), (2.0, 10)])
def test_selection_is_detectron2s(regions: int, classes: int, threshold: float, limit: int) -> None:
    boxes, scores = random_regions(regions, classes)
    expected = reference(boxes, scores, threshold, 0.5, limit)
    found = select_best(boxes, scores, (100, 120), threshold, 0.5, limit, max_candidates=10**6)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_more_candidates_are_taken_until_the_limit_is_reached() -> None:
    """One object that every region covers, in one class, and a second one far below."""
    boxes = torch.tensor([[10.0, 10, 50, 50]]).repeat(500, 1)
    boxes[-1] += 50
    scores = torch.linspace(1, 0.5, 500)[:, None]
    found = select_best(boxes, scores, (100, 120), 0.0, 0.5, limit=2)
    assert found.scores.tolist() == [1.0, 0.5]


def test_regions_that_are_not_finite_are_left_out_and_none_is_fine() -> None:
    boxes, scores = random_regions(10, 4)
    boxes[3, 0], scores[5, 2] = float("nan"), float("inf")
    keep = [i for i in range(10) if i not in (3, 5)]
    found = select_best(boxes, scores, (100, 120), 0.0, 0.5, 7)
    assert torch.equal(found.scores, select_best(boxes[keep], scores[keep], (100, 120), 0.0, 0.5, 7).scores)
    assert len(select_best(boxes[:0], scores[:0], (100, 120), 0.0, 0.5, 7)) == 0


def test_the_given_boxes_stay_as_they_are() -> None:
    boxes, scores = random_regions(10, 4)
    before = boxes.clone()
    select_best(boxes, scores, (20, 20), 0.0, 0.5, 7)
    assert torch.equal(boxes, before)


@pytest.mark.parametrize(("regions", "classes"), [(1, 1), (3, 64), (7, 65), (40, 200), (5, 1000), (100, 640)])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_best_pairs_are_topks(regions: int, classes: int, count: int) -> None:
    scores = random_regions(regions, classes + 1)[1][:, 1:]  # not contiguous, as behind a background column
    count = min(count, scores.numel())
    best, found_regions, found_classes = best_pairs(scores, count)
    expected = scores.flatten().topk(count)
    assert torch.equal(best, expected.values)
    assert torch.equal(found_regions * classes + found_classes, expected.indices)


def test_best_pairs_of_equal_scores_are_different_pairs() -> None:
    _, regions, classes = best_pairs(torch.ones(10, 700), 100)
    assert len(set(zip(regions.tolist(), classes.tolist(), strict=True))) == 100
    assert classes.max() < 700


@pytest.mark.parametrize("classes", [1, 7, 20_000])
def test_nms_within_classes_is_that_of_every_class_alone(classes: int) -> None:
    """Class 20,000 of pictures of 1,000 px would be 2e7 away in one float32 plane, where numbers are 2 px apart."""
    boxes, scores = random_regions(600, 1)
    labels = classes - 1 - torch.arange(600) % min(classes, 3)
    boxes = boxes * 10
    expected = []
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        expected.append(of_class[nms(boxes[of_class], scores[of_class, 0], 0.5)])
    expected = torch.cat(expected)
    expected = expected[scores[expected, 0].argsort(descending=True)]
    assert torch.equal(class_nms(boxes, scores[:, 0], labels, 0.5), expected)
