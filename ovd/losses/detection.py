"""Classification losses of the region head: softmax with a background, or one sigmoid a class.

Source: F-VLM's published configuration (softmax, background weight 0.9); LVIS (Gupta et al., 2019, federated
annotations) and CenterNet2's federated loss for the sigmoid. Box and mask losses are Detectron2's own.
Shapes: R regions, C classes; logits are (R, C + 1) with the background in the last column (Detectron2's convention).
"""

import torch.nn.functional as F
from torch import Tensor


def region_classification_loss(logits: Tensor, gt_classes: Tensor, background_weight: float = 0.9) -> Tensor:
    """Softmax cross-entropy, averaged over the R regions, background regions weighted by `background_weight`.

    The sum is divided by R, not by the sum of the weights, so that the loss of a foreground region does not depend on
    the weight; with weight 1 it is Detectron2's own loss.

    Args:
        logits: (R, C + 1), the background in the last column.
        gt_classes: (R,) long, 0..C-1 for objects, C for background.
        background_weight: factor on the loss of background regions, at least 0.

    Returns:
        Scalar float32; 0 with a gradient when there are no regions.
    """
    _check_weight(background_weight)
    if gt_classes.numel() == 0:
        return logits.float().sum() * 0.0
    _check_classes(gt_classes, logits.shape[1] - 1)
    losses = F.cross_entropy(logits.float(), gt_classes, reduction="none")
    return _mean_over_regions(losses, gt_classes, logits.shape[1] - 1, background_weight)


def independent_classification_loss(
    logits: Tensor, gt_classes: Tensor, counted: Tensor | None = None, background_weight: float = 0.9
) -> Tensor:
    """Binary cross-entropy of every class on its own, summed over classes and averaged over the R regions.

    The background column takes no part: background is where every class says no. With weight 1 and all classes counted
    it is Detectron2's `sigmoid_cross_entropy_loss`.

    Args:
        logits: (R, C + 1), the last column unused.
        gt_classes: (R,) long, 0..C-1 for objects, C for background.
        counted: (C,) or (R, C) bool, the classes whose "no" counts (federated loss); a region's own class always does.
            None counts all.
        background_weight: factor on the loss of background regions, at least 0.

    Returns:
        Scalar float32; 0 with a gradient when there are no regions.
    """
    _check_weight(background_weight)
    classes = logits[:, :-1].float()
    if gt_classes.numel() == 0:
        return classes.sum() * 0.0
    _check_classes(gt_classes, classes.shape[1])
    target = F.one_hot(gt_classes, classes.shape[1] + 1)[:, :-1].to(classes.dtype)
    losses = F.binary_cross_entropy_with_logits(classes, target, reduction="none")
    if counted is not None:
        losses = losses * (counted | target.bool())
    return _mean_over_regions(losses.sum(dim=1), gt_classes, classes.shape[1], background_weight)


def _check_weight(background_weight: float) -> None:
    if background_weight < 0:
        raise ValueError(f"background_weight is {background_weight}, but a loss weight is at least 0; choose 0 or more")


def _check_classes(gt_classes: Tensor, num_classes: int) -> None:
    if int(gt_classes.max()) > num_classes:
        raise ValueError(
            f"an annotation has class {int(gt_classes.max())}, but the vocabulary has {num_classes} classes; set the "
            "vocabulary of the training categories, in the order of their ids"
        )


def _mean_over_regions(losses: Tensor, gt_classes: Tensor, background: int, background_weight: float) -> Tensor:
    weights = (gt_classes == background).to(losses.dtype) * (background_weight - 1.0) + 1.0
    return (losses * weights).sum() / gt_classes.numel()
