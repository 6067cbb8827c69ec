"""The best detections of a picture after per-class NMS, at a cost that hardly depends on the number of classes.

Detectron2's `fast_rcnn_inference` runs NMS on every (region, class) pair above the threshold, with thousands of words
mostly on pairs that never reach the limit of detections. Greedy NMS only looks at better candidates, so that running
it on the best few gives exactly the first of its detections; more are taken only while the limit is not reached.
"""

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

# Candidates tried first, per detection wanted; overlapping ones of a class are usually fewer than three quarters.
_FIRST = 4
_GROWTH = 4


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
    valid = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    if not valid.all():
        boxes, scores = boxes[valid], scores[valid]
    clipped = Boxes(boxes.clone())
    clipped.clip(image_size)
    num_classes, flat = scores.shape[1], scores.flatten()
    most = min(max_candidates, flat.numel())
    wanted = most if limit < 0 else limit
    count = most if limit < 0 else min(most, _FIRST * limit)
    while True:
        best, places = flat.topk(count)
        above = best > score_threshold
        best, places = best[above], places[above]
        found, classes = clipped.tensor[places // num_classes], places % num_classes
        keep = batched_nms(found, best, classes, nms_threshold)[:wanted]
        if len(keep) == wanted or count == most or len(best) < count:
            break
        count = min(most, _GROWTH * count)
    result = Instances(image_size)
    result.pred_boxes, result.scores, result.pred_classes = Boxes(found[keep]), best[keep], classes[keep]
    return result
