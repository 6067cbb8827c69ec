"""clip-rocket's contrastive loss over clean and augmented pairs (arXiv 2305.08675): (G + n L) / (1 + n).

G is InfoNCE of the clean images and texts; L the mean, over all pairs of one of n augmented image views and one of n
augmented text views, of InfoNCE with smoothed labels. The published n is 2, so (G + 2 L) / 3. (The authors write
"global" and "local" for what is clean and augmented here.)

Legend: B pairs in the batch, b of them on this process, D dimensions of a joint space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain.losses.contrastive import info_nce, similarity
from pretrain.losses.gather import gather_features


def smoothed_info_nce(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    smoothing: float = 0.0,
    chunk_size: int = 0,
    gather: bool = False,
) -> torch.Tensor:
    """`info_nce` with the target 1 - smoothing + smoothing / B for the true pair and smoothing / B for every other.

    That is torch's `cross_entropy(label_smoothing=…)`, in both directions. Against the plain loss, every logarithm of
    a probability of the true pair gives smoothing of its weight to the row's mean; the normalisers cancel, and what is
    left, smoothing * (mean of true pairs' similarities - mean of all), needs no matrix.

    Args:
        image_features: (b, D), normalised.
        text_features: (b, D), normalised.
        logit_scale: the inverse temperature itself, not its logarithm.
        smoothing: in 0–1.
        chunk_size: as for `info_nce`.
        gather: as for `info_nce`.

    Returns:
        A scalar.
    """
    loss = info_nce(image_features, text_features, logit_scale, chunk_size, gather)
    if smoothing == 0:
        return loss
    true_pairs = (_precise(image_features) * _precise(text_features)).sum(1).mean().reshape(1)
    image_mean = _precise(image_features).mean(0, keepdim=True)
    text_mean = _precise(text_features).mean(0, keepdim=True)
    if gather:
        true_pairs, image_mean, text_mean = map(gather_features, (true_pairs, image_mean, text_mean))
    all_pairs = similarity(image_mean.mean(0, keepdim=True), text_mean.mean(0, keepdim=True), logit_scale)
    return loss + smoothing * (logit_scale * true_pairs.mean() - all_pairs.squeeze())


@dataclass(frozen=True)
class PairsLoss:
    """Parts of the loss, scalars."""

    loss: torch.Tensor
    clean: torch.Tensor  # G, the mean of both directions
    augmented: torch.Tensor | None  # L, the same; None without augmented views


def augmented_pairs_loss(
    clean: tuple[torch.Tensor, torch.Tensor],
    augmented_images: Sequence[torch.Tensor],
    augmented_texts: Sequence[torch.Tensor],
    clean_scale: torch.Tensor | float,
    augmented_scale: torch.Tensor | float,
    smoothing: float = 0.1,
    reduction: str = "avg",
    chunk_size: int = 0,
    gather: bool = False,
) -> PairsLoss:
    """(G + n L) / (1 + n), for n augmented views of each; G alone for none.

    Args:
        clean: images and texts (b, D), normalised.
        augmented_images: n times (b, E), normalised; E is the joint space of the augmented views.
        augmented_texts: n times (b, E).
        clean_scale: inverse temperature of G.
        augmented_scale: inverse temperature of L.
        smoothing: of the labels in L; G has none.
        reduction: avg: the mean of both directions; sum: their sum, twice that.
        chunk_size: as for `info_nce`.
        gather: as for `info_nce`.

    Raises:
        ValueError: for different numbers of image and text views, or another reduction.
    """
    views = len(augmented_images)
    if len(augmented_texts) != views:
        raise ValueError(f"{views} augmented image views and {len(augmented_texts)} text views: give as many of each")
    if reduction not in ("avg", "sum"):
        raise ValueError(f"reduction is {reduction!r}: use avg or sum")
    factor = 2 if reduction == "sum" else 1
    of_clean = info_nce(*clean, clean_scale, chunk_size, gather)
    if not views:
        return PairsLoss(factor * of_clean, of_clean, None)
    pairs = [(image, text) for image in augmented_images for text in augmented_texts]
    losses = [smoothed_info_nce(i, t, augmented_scale, smoothing, chunk_size, gather) for i, t in pairs]
    of_augmented = torch.stack(losses).mean()
    return PairsLoss(factor * (of_clean + views * of_augmented) / (1 + views), of_clean, of_augmented)


def _precise(features: torch.Tensor) -> torch.Tensor:
    return features if features.dtype == torch.float64 else features.float()
