"""Selection with fixed shapes gives what Detectron2 and the detector's own selection give."""

import numpy as np
import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from ovd.export.detector import fuse
from ovd.export.selection import NOTHING, apart_by_class, pool_regions, suppress, top
from ovd.modeling.score_fusion import fuse_scores
from ovd.modeling.selection import class_nms


def random_boxes(count: int, extent: float = 300.0) -> torch.Tensor:
    corner = torch.rand(count, 2) * extent * 0.8
    return torch.cat([corner, corner + torch.rand(count, 2) * extent * 0.2], dim=1)


@pytest.mark.parametrize("num_classes", [1, 3, 1203])
def test_one_nms_over_the_lattice_keeps_what_nms_in_each_class_keeps(num_classes) -> None:
    torch.manual_seed(0)
    boxes, scores = random_boxes(400), torch.rand(400)
    classes = torch.randint(num_classes, (400,))
    expected = set(class_nms(boxes, scores, classes, 0.5).tolist())
    kept = suppress(apart_by_class(boxes, classes, 301.0), scores, 0.5)
    assert set((kept > NOTHING).nonzero()[:, 0].tolist()) == expected
    assert len(expected) < 400 or num_classes > 3


def test_the_lattice_stays_small_for_large_class_numbers() -> None:
    boxes = apart_by_class(random_boxes(100), torch.arange(100) * 1000, 301.0)
    assert boxes.max() <= 301 * (100**0.5 + 1)


def test_top_fills_with_nothing_where_there_are_fewer() -> None:
    best, index = top(torch.tensor([1.0, 3.0, 2.0]), 5)
    assert best.tolist() == [3.0, 2.0, 1.0, NOTHING, NOTHING]
    assert index.tolist() == [1, 2, 0, 0, 0]


def test_pooling_from_every_level_and_choosing_is_detectron2s_pooling() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(1, 4, side, side) for side in (80, 40, 20, 10)]
    pooler = ROIPooler(7, (1 / 4, 1 / 8, 1 / 16, 1 / 32), sampling_ratio=2, pooler_type="ROIAlignV2")
    boxes = torch.cat([random_boxes(20), torch.tensor([[0.0, 0, 320, 320], [5, 5, 5, 5]])])
    torch.testing.assert_close(pool_regions(pooler, maps, boxes), pooler(maps, [Boxes(boxes)]))


@pytest.mark.parametrize("renormalise", [True, False])
def test_fusion_without_checks_is_the_fusion_with_them(renormalise) -> None:
    torch.manual_seed(0)
    z, p = torch.rand(6, 5).softmax(dim=1), torch.rand(6, 4).softmax(dim=1)
    is_base = torch.tensor([True, False, True, False])
    expected = fuse_scores(z, torch.nn.functional.pad(p, (1, 0)), is_base, 0.3, 0.6, renormalise)
    np.testing.assert_allclose(fuse(z, p, is_base, 0.3, 0.6, renormalise).numpy(), expected.numpy(), rtol=1e-6)
