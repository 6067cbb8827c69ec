"""The best detections of a picture after per-class NMS, at a cost that hardly depends on the number of classes.

Detectron2's `fast_rcnn_inference` runs NMS on every (region, class) pair above the threshold, with thousands of words
mostly on pairs that never reach the limit of detections. Greedy NMS only looks at better candidates, so that running
it on the best few gives exactly the first of its detections; more are taken only while the limit is not reached.
"""

import math

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms, nms

# Candidates tried first, per detection wanted; overlapping ones of a class are usually fewer than three quarters.
_FIRST = 4
_GROWTH = 4
_BLOCK = 64  # neighbouring classes whose maximum is looked at first
# Boxes, on a CPU; the time of one NMS grows with their square. From 1,001 on torchvision loops over the classes there.
_MOST_AT_ONCE = 2500


def select_best(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    score_threshold: float,
    nms_threshold: float,
    limit: int,
    max_candidates: int = 20_000,
) -> Instances:
    """Keep the best detections of a picture after NMS within each class.

    Args:
        boxes: (R, 4) class-agnostic boxes, xyxy pixels.
        scores: (R, C) scores of the classes, without background.
        image_size: (height, width); boxes are clipped to it.
        score_threshold: only higher scores count.
        nms_threshold: intersection over union above which the weaker detection of a class is dropped.
        limit: most detections; negative for all.
        max_candidates: best (region, class) pairs looked at, whatever the limit.

    Returns:
        Instances with `pred_boxes`, `scores` and `pred_classes`, best first; regions with values that are not finite
        are left out.
    """
    # The sum of a row is finite if all of it is, and needs one pass and no (R, C) mask.
    valid = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores.sum(dim=1))
    if not valid.all():
        boxes, scores = boxes[valid], scores[valid]
    clipped = Boxes(boxes.clone())
    clipped.clip(image_size)
    most = min(max_candidates, scores.numel())
    wanted = most if limit < 0 else limit
    count = most if limit < 0 else min(most, _FIRST * limit)
    while True:
        best, regions, classes = best_pairs(scores, count)
        above = best > score_threshold
        best, found, classes = best[above], clipped.tensor[regions[above]], classes[above]
        keep = class_nms(found, best, classes, nms_threshold)[:wanted]
        if len(keep) == wanted or count == most or len(best) < count:
            break
        count = min(most, _GROWTH * count)
    result = Instances(image_size)
    result.pred_boxes, result.scores, result.pred_classes = Boxes(found[keep]), best[keep], classes[keep]
    return result


def best_pairs(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest of (R, C) scores, best first: their values, regions and classes, (count,) each.

    Where there are many more, the highest lie in the `count` blocks of neighbouring classes with the highest maxima;
    finding those takes one plain pass over the scores, many times faster than `topk` over all of them.
    """
    num_regions, num_classes = scores.shape
    whole, rest = divmod(num_classes, _BLOCK)
    blocks_of_region = whole + bool(rest)
    if num_regions * blocks_of_region <= 2 * count:
        best, places = scores.flatten().topk(count)
        return best, places // num_classes, places % num_classes
    maxima = scores[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK)).amax(dim=2)
    if rest:
        maxima = torch.cat([maxima, scores[:, whole * _BLOCK :].amax(dim=1, keepdim=True)], dim=1)
    blocks = maxima.flatten().topk(count).indices[:, None]
    regions = blocks // blocks_of_region
    classes = blocks % blocks_of_region * _BLOCK + torch.arange(_BLOCK, device=scores.device)
    values = scores[regions, classes.clamp(max=num_classes - 1)].masked_fill(classes >= num_classes, -math.inf)
    best, places = values.flatten().topk(count)
    return best, regions[places // _BLOCK, 0], classes.flatten()[places]


def class_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that greedy NMS within each class keeps, best first.

    torchvision's `batched_nms` moves the classes apart in float32, where the corners of class 20,000 are rounded to
    whole pixels and other boxes are kept; only for many boxes on a CPU does it loop over the classes. In float64 they
    can be moved apart safely.
    """
    if len(boxes) == 0 or (boxes.device.type == "cpu" and len(boxes) > _MOST_AT_ONCE):
        return batched_nms(boxes, scores, classes, threshold)
    exact = boxes.double()
    apart = exact + classes[:, None] * (exact.max() - exact.min() + 1)
    return nms(apart, scores.double(), threshold)
