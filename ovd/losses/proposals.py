"""Losses of proposals that are ranked by how well they are localised, not by object against background.

Source: OLN (Kim et al., "Learning Open-World Object Proposals", 2022, section 3) with FCOS's centerness (equation 3),
as in the F-VLM and DITO family. Matching and sampling are in `ovd/modeling/proposals.py`.
"""

import torch
from torch import Tensor


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of points in boxes (FCOS, equation 3).

    Args:
        points: (N, 2) x, y in pixels.
        boxes: (N, 4) xyxy in pixels; box i belongs to point i.

    Returns:
        (N,) in 0..1: 1 in the middle of the box, 0 on its border and outside.
    """
    to_left_top, to_right_bottom = points - boxes[:, :2], boxes[:, 2:] - points
    near = torch.minimum(to_left_top, to_right_bottom).clamp(min=0)
    far = torch.maximum(to_left_top, to_right_bottom).clamp(min=torch.finfo(boxes.dtype).tiny)
    return (near / far).prod(dim=1).sqrt()


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of box i with box i: two (N, 4) xyxy -> (N,), with a gradient; 0 for two empty boxes."""
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    shared = sides.clamp(min=0).prod(dim=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1) for boxes in (first, second)]
    union = areas[0] + areas[1] - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def quality_loss(logits: Tensor, targets: Tensor, normalizer: float) -> Tensor:
    """Sum over N points of |sigmoid(logit) - target|, divided by `normalizer`; 0 with a gradient when there are none.

    Args:
        logits: (N,) localisation quality before the sigmoid.
        targets: (N,) in 0..1, centerness or IoU.
        normalizer: what a full sample would count, so that a picture with few objects weighs little (DITO).
    """
    return (logits.float().sigmoid() - targets.float()).abs().sum() / normalizer


def box_iou_loss(boxes: Tensor, targets: Tensor, normalizer: float) -> Tensor:
    """Sum over N boxes of 1 - IoU with (N, 4) xyxy targets, divided by `normalizer`; 0 with a gradient for N = 0."""
    return (1.0 - paired_iou(boxes.float(), targets.float())).sum() / normalizer
