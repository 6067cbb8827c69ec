"""Top-k, NMS and region pooling with shapes that do not depend on what is in the picture.

Source: Detectron2's `find_top_rpn_proposals` and `ROIPooler`, and `ovd.modeling.selection`. What those drop is kept
here with a score of `NOTHING`. Neither module's growing of the number of candidates is here: a graph has no loop.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

NOTHING = -1e9  # finite, because runtimes differ in what infinities do in top-k and NMS


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of (N,) scores and their indices; where N is smaller, `NOTHING` at index 0."""
    best, index = F.pad(scores, (0, count), value=NOTHING).topk(count)
    return best, torch.where(index < scores.shape[0], index, 0)


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """(N,) scores with `NOTHING` at the boxes that greedy NMS drops."""
    kept = torch.zeros_like(scores).scatter(0, nms(boxes, scores, threshold), 1.0)
    return torch.where(kept > 0, scores, NOTHING)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Move the corners of (N, 4) xyxy boxes into the picture."""
    x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def apart_by_class(boxes: Tensor, classes: Tensor, extent: float) -> Tensor:
    """Move boxes of different classes apart on a square lattice, so that one NMS does for all classes.

    In a row, class 1,203 would lie where float32 has lost a hundredth of a pixel. On the lattice, and with classes
    numbered by the first candidate that has them, coordinates stay below extent * sqrt(N).

    Args:
        boxes: (N, 4) within [0, extent).
        classes: (N,) int64.
        extent: pixels.
    """
    first = (classes[:, None] == classes[None, :]).to(torch.int64).argmax(dim=1)
    side = int(len(classes) ** 0.5) + 1
    shift = torch.stack([first % side, first // side], dim=1).to(boxes.dtype) * extent
    return boxes + torch.cat([shift, shift], dim=1)


class TensorProposals(nn.Module):
    """An RPN for one picture: features, size -> (K, 4) boxes in pixels, (K,) logits, `NOTHING` where there are fewer.

    Args:
        rpn: the trained proposal generator; its modules are shared.
    """

    def __init__(self, rpn: RPN) -> None:
        super().__init__()
        self.head, self.names = rpn.rpn_head, list(rpn.in_features)
        self.transform: Box2BoxTransform | Box2BoxTransformLinear = rpn.box2box_transform
        generator = rpn.anchor_generator
        self.strides, self.offset = generator.strides, generator.offset
        self.cells = nn.ParameterList(
            nn.Parameter(cell.clone(), requires_grad=False) for cell in generator.cell_anchors
        )
        self.before, self.after = rpn.pre_nms_topk[False], rpn.post_nms_topk[False]
        self.threshold, self.min_size = rpn.nms_thresholds[1], rpn.min_box_size

    def forward(self, features: dict[str, Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
        """The best proposals after NMS within each level, best first."""
        maps = [features[name] for name in self.names]
        logits, deltas = self.head(maps)
        boxes, scores = [], []
        for level in range(len(maps)):
            anchors = self._anchors(maps[level], level)
            best, index = top(logits[level][0].permute(1, 2, 0).flatten(), self.before)
            delta = deltas[level][0].reshape(-1, 4, *maps[level].shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4)
            found = clip(self.transform.apply_deltas(delta[index], anchors[index]), height, width)
            sides = found[:, 2:] - found[:, :2]
            # Not-a-number fails both comparisons.
            valid = (sides > self.min_size).all(dim=1) & (best > NOTHING)
            found, best = torch.where(valid[:, None], found, 0.0), torch.where(valid, best, NOTHING)
            boxes.append(found)
            scores.append(suppress(found, best, self.threshold))
        best, index = top(torch.cat(scores), self.after)
        return torch.cat(boxes)[index], best

    def _anchors(self, feature: Tensor, level: int) -> Tensor:
        """(h * w * A, 4) anchors of a level in pixels."""
        stride = self.strides[level]
        y, x = (
            (torch.arange(n, device=feature.device, dtype=torch.float32) + self.offset) * stride
            for n in feature.shape[-2:]
        )
        rows, columns = feature.shape[-2:]
        x, y = x[None, :].expand(rows, columns), y[:, None].expand(rows, columns)
        shifts = torch.stack([x, y, x, y], dim=-1)
        return (shifts[:, :, None] + self.cells[level]).reshape(-1, 4)


def pool_regions(pooler: ROIPooler, maps: list[Tensor], boxes: Tensor) -> Tensor:
    """What `ROIPooler` gives for the (K, 4) boxes of one picture, (K, channels, side, side).

    Every region is pooled from every level and the right one is chosen: more work, but shapes that do not depend on the
    boxes.
    """
    levels = assign_boxes_to_levels(
        [Boxes(boxes)], pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    )
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    result = None
    for level, (feature, one) in enumerate(zip(maps, pooler.level_poolers, strict=True)):
        pooled = roi_align(feature, rois, one.output_size, one.spatial_scale, one.sampling_ratio, one.aligned)
        result = pooled if result is None else torch.where((levels == level)[:, None, None, None], pooled, result)
    return result
