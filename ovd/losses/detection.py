"""Classification loss of the region head: softmax cross-entropy over the base classes and the background.

Source: F-VLM's published configuration (background weight 0.9). Box and mask losses are Detectron2's own.
"""

import torch.nn.functional as F
from torch import Tensor


def region_classification_loss(logits: Tensor, gt_classes: Tensor, background_weight: float = 0.9) -> Tensor:
    """Softmax cross-entropy, averaged over the R regions, background regions weighted by `background_weight`.

    The sum is divided by R, not by the sum of the weights, so that the loss of a foreground region does not depend on
    the weight; with weight 1 it is Detectron2's own loss.

    Args:
        logits: (R, C + 1), the background in the last column (Detectron2's convention).
        gt_classes: (R,) long, 0..C-1 for objects, C for background.
        background_weight: factor on the loss of background regions, at least 0.

    Returns:
        Scalar float32; 0 with a gradient when there are no regions.
    """
    if background_weight < 0:
        raise ValueError(f"background_weight is {background_weight}, but a loss weight is at least 0; choose 0 or more")
    if gt_classes.numel() == 0:
        return logits.float().sum() * 0.0
    background = logits.shape[1] - 1
    if int(gt_classes.max()) > background:
        raise ValueError(
            f"an annotation has class {int(gt_classes.max())}, but the vocabulary has {background} classes; set the "
            "vocabulary of the training categories, in the order of their ids"
        )
    losses = F.cross_entropy(logits.float(), gt_classes, reduction="none")
    weights = (gt_classes == background).to(losses.dtype) * (background_weight - 1.0) + 1.0
    return (losses * weights).sum() / gt_classes.numel()
