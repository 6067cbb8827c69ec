"""Contrastive losses whose targets are probabilities rather than the diagonal: label smoothing and distillation.

Legend: B pairs in the batch, b of them on this process (b = B for one), D dimensions of the joint space. Row i of the
features is one pair; row i of the targets says which of all B texts (or images) belong to it.
"""

import torch
import torch.nn.functional as F

from pretrain.losses.contrastive import similarity
from pretrain.losses.gather import gather_features, process_count, rank_offset


def true_pairs(rows: int, device: torch.device, gather: bool = False) -> torch.Tensor:
    """(b, B) bool, where the pairs are: on the diagonal for one process, `rank_offset` further right for others."""
    spread = gather and process_count() > 1
    # Made on the host: XLA would compile another program for every process if the offset were a constant of it.
    own = torch.arange(rows) + (rank_offset(rows) if spread else 0)
    columns = torch.arange(rows * (process_count() if spread else 1), device=device)
    return own.to(device).unsqueeze(1) == columns


def smoothed_targets(is_pair: torch.Tensor, smoothing: float) -> torch.Tensor:
    """1 - smoothing for the pair, the rest spread evenly over the B - 1 others (OTTER's baseline).

    PyTorch's `label_smoothing` spreads over all B: this is its smoothing * B / (B - 1).

    Args:
        is_pair: (b, B) bool, one True a row.
        smoothing: in 0–1.

    Returns:
        (b, B) float32, rows sum to 1.

    Raises:
        ValueError: for a smoothing outside its range, or without another column to spread it over.
    """
    columns = is_pair.shape[1]
    if not 0 <= smoothing < 1 or (smoothing and columns < 2):
        raise ValueError(f"label smoothing {smoothing} over {columns} texts: use 0 to 1 (excluded), and at least 2")
    return torch.where(is_pair, 1 - smoothing, smoothing / max(columns - 1, 1))


def soft_contrastive(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_targets: torch.Tensor,
    text_targets: torch.Tensor,
    divergence: bool = False,
    gather: bool = False,
) -> torch.Tensor:
    """Mean of the image-to-text and the text-to-image cross entropy against given probabilities.

    Both directions are averaged, as in `info_nce`, where OTTER's code adds them up: twice this.

    Args:
        image_features: (b, D), normalised.
        text_features: (b, D), normalised.
        logit_scale: the inverse temperature itself, not its logarithm.
        image_targets: (b, B) for each image the probabilities of all texts; rows sum to 1. Without gradient.
        text_targets: (b, B) for each text the probabilities of all images.
        divergence: the Kullback-Leibler divergence from the targets instead, which is the cross entropy less the
            targets' own entropy: 0 where the model says what the targets say, with the same gradient.
        gather: compare with the pairs of all processes, b on each. Every process then returns the loss of the whole
            batch, and the mean of the processes' gradients is its gradient.

    Returns:
        A scalar.

    Raises:
        ValueError: for targets that are not b by B.
    """
    spread = gather and process_count() > 1
    wanted = (len(image_features), len(image_features) * (process_count() if spread else 1))
    for targets in (image_targets, text_targets):
        if targets.shape != wanted:
            raise ValueError(f"targets have the shape {tuple(targets.shape)}: give {wanted}, own pairs by all pairs")
    texts = gather_features(text_features) if spread else text_features
    images = gather_features(image_features) if spread else image_features
    loss = (
        _of_rows(similarity(image_features, texts, logit_scale), image_targets, divergence)
        + _of_rows(similarity(text_features, images, logit_scale), text_targets, divergence)
    ) / 2
    return gather_features(loss.reshape(1)).mean() if spread else loss


def _of_rows(logits: torch.Tensor, targets: torch.Tensor, divergence: bool) -> torch.Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = logits.log_softmax(1)
        if divergence:
            return F.kl_div(log_probabilities, targets, reduction="batchmean")
        return -(targets * log_probabilities).sum(1).mean()
