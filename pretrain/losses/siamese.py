"""Agreement without negatives: SimSiam's loss (arXiv 2011.10566) between an image's prediction and its text's
projection and the other way round, clip-rocket's SiamLIP (arXiv 2305.08675); BYOLIP where the targets are an average's.

Legend: b pairs on this process, D dimensions.
"""

import torch
import torch.nn.functional as F


def siamese_loss(
    image_predictions: torch.Tensor,
    text_predictions: torch.Tensor,
    image_targets: torch.Tensor,
    text_targets: torch.Tensor,
) -> torch.Tensor:
    """Mean over both directions and the rows of 2 - 2 cos(prediction, stop_gradient(the other modality's target)).

    Args:
        image_predictions: (b, D), of any length.
        text_predictions: (b, D).
        image_targets: (b, D); no gradient reaches them.
        text_targets: (b, D); no gradient reaches them.

    Returns:
        A scalar in 0–4, of the rows given: its mean over processes is the whole batch's.
    """
    from_images = _distance(image_predictions, text_targets)
    return (from_images + _distance(text_predictions, image_targets)) / 2


def _distance(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    predictions, targets = (v if v.dtype == torch.float64 else v.float() for v in (predictions, targets.detach()))
    return (2 - 2 * F.cosine_similarity(predictions, targets, dim=-1)).mean()
