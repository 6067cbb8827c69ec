"""Alignment of a student's tokens with a frozen teacher's (UTA, arXiv 2405.19009): the negative cosine, averaged.

loss = - mean over tokens t of <s_t / |s_t|, f_t / |f_t|>, from -1 (same directions) to 1. Which tokens are compared is
for the objective to say. Nothing is compared across images, so that several processes need no exchange.

Legend: B images, T tokens of each, E dimensions of the joint space.
"""

import torch
import torch.nn.functional as F


def token_cosines(student_BTE: torch.Tensor, teacher_BTE: torch.Tensor) -> torch.Tensor:
    """Cosine of every token with the teacher's at the same place, in float32 at least.

    Args:
        student_BTE: tokens (B, T, E), of any length.
        teacher_BTE: the same of the teacher; no gradient flows into it.

    Returns:
        (B, T) in -1–1; 0 for a token that is 0.

    Raises:
        ValueError: for tokens of unequal shapes.
    """
    if student_BTE.shape != teacher_BTE.shape:
        raise ValueError(
            f"student tokens {tuple(student_BTE.shape)} and teacher tokens {tuple(teacher_BTE.shape)} do not "
            "correspond: both need the same patches and the same joint space"
        )
    with torch.autocast(student_BTE.device.type, enabled=False):
        wide = torch.promote_types(student_BTE.dtype, torch.float32)
        return F.cosine_similarity(student_BTE.to(wide), teacher_BTE.detach().to(wide), dim=-1)


def token_alignment(student_BTE: torch.Tensor, teacher_BTE: torch.Tensor) -> torch.Tensor:
    """Mean negative cosine over the tokens of each image; arguments and errors as `token_cosines`.

    Returns:
        (B,) in -1–1; the batch's loss is the mean.
    """
    return -token_cosines(student_BTE, teacher_BTE).mean(1)
