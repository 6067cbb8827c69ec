"""RO-ViT's focal contrastive loss (arXiv 2305.07011, section 3.3): a sigmoid for every pair, easy pairs weighted down.

With x the B x B scaled similarities, and p = sigmoid(x) on the diagonal, sigmoid(-x) elsewhere:
loss = - sum over all pairs of w (1 - p)^gamma log p, with w = 2 alpha on the diagonal and 2 (1 - alpha) elsewhere.
It is a sum, as in the authors' code: divide by B for a loss per pair of the batch.

Legend: B pairs in the batch, b of them on this process, D dimensions.
"""

import torch
import torch.nn.functional as F

from pretrain.losses.contrastive import over_chunks, similarity
from pretrain.losses.gather import gather_features, process_count, rank_offset


def focal_contrastive(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    alpha: float = 0.5,
    gamma: float = 1.0,
    chunk_size: int = 0,
    gather: bool = False,
) -> torch.Tensor:
    """Focal binary cross entropy of "this image and this text are a pair", summed over all images and texts.

    Args:
        image_features: (b, D), normalised.
        text_features: (b, D), normalised.
        logit_scale: the inverse temperature itself.
        alpha: in 0–1, the weight of true pairs against others; 0.5 weighs both 1.
        gamma: at least 0, how much easy pairs are weighted down; 0: plain binary cross entropy. The default is that of
            the authors' code.
        chunk_size: image rows at once, 0 for all; see `info_nce`.
        gather: pairs of all processes; every process returns the sum over the whole batch, and the mean of the
            processes' gradients is its gradient.

    Returns:
        A scalar, the sum over B * B pairs.

    Raises:
        ValueError: for alpha or gamma outside their range.
    """
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"alpha {alpha} and gamma {gamma}: alpha must be between 0 and 1, gamma at least 0")
    spread = gather and process_count() > 1
    columns = gather_features(text_features) if spread else text_features
    # Made on the host: XLA would compile another program for every process if the offset were a constant of it.
    targets = torch.arange(len(image_features)) + (rank_offset(len(image_features)) if spread else 0)
    rows = (image_features, targets.to(image_features.device))
    loss = torch.stack(over_chunks(_focal_sum, chunk_size, rows, columns, logit_scale, alpha, gamma)).sum()
    return gather_features(loss.reshape(1)).sum() if spread else loss


def _focal_sum(
    images: torch.Tensor,
    targets: torch.Tensor,
    columns: torch.Tensor,
    logit_scale: torch.Tensor | float,
    alpha: float,
    gamma: float,
) -> torch.Tensor:
    """The sum over c images and all columns; targets (c,) are the columns of the true texts."""
    logits = similarity(images, columns, logit_scale)
    is_pair = targets.unsqueeze(1) == torch.arange(len(columns), device=logits.device)
    wrong = torch.where(is_pair, -logits, logits)  # the logit of 1 - p
    weight = torch.where(is_pair, 2 * alpha, 2 * (1 - alpha))
    # exp(gamma * log(1 - p)) rather than a power: a power of 0 has no finite gradient for gamma below 1.
    return (weight * (gamma * F.logsigmoid(wrong)).exp() * F.softplus(wrong)).sum()
