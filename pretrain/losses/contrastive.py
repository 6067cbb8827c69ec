"""The symmetric contrastive loss (InfoNCE) that RECLIP and CLIP train with, for features of one process.

Legend: B pairs in the batch, D dimensions of the joint space. Row i of both matrices is one pair.
"""

import torch
import torch.nn.functional as F


def similarity(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    """(B, B) scaled similarities, image rows and text columns, always in float32 (bfloat16 has 8 bits of mantissa)."""
    with torch.autocast(image_features.device.type, enabled=False):
        return logit_scale * image_features.float() @ text_features.float().T


def info_nce(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    """Mean of the image-to-text and the text-to-image cross entropy against the diagonal.

    Args:
        image_features: (B, D), normalised.
        text_features: (B, D), normalised.
        logit_scale: the inverse temperature itself, not its logarithm.

    Returns:
        A scalar; log(B) for features that carry no information.
    """
    logits = similarity(image_features, text_features, logit_scale)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
