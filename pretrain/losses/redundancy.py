"""Redundancy reduction between an image's and a text's projection: Barlow Twins' loss (arXiv 2103.03230) on image–text
pairs, clip-rocket's BarLIP (arXiv 2305.08675).

Legend: B pairs in the batch, b of them on this process, D dimensions.
"""

import torch

from pretrain.losses.gather import gather_features


def cross_correlation(
    image_projections: torch.Tensor, text_projections: torch.Tensor, gather: bool = False
) -> torch.Tensor:
    """(D, D): mean over the batch of the products of an image's and its text's dimensions, in float32 at least.

    Correlations in the usual sense if every dimension of both has mean 0 and variance 1 over the batch, as a last batch
    norm makes it; clip-rocket's has a learned scale and shift after that, so its values may leave -1 to 1.

    Args:
        image_projections: (b, D).
        text_projections: (b, D).
        gather: over the pairs of all processes. Each then computes the whole matrix: rows travel, not matrices, because
            B is smaller than D as published.
    """
    images, texts = (p if p.dtype == torch.float64 else p.float() for p in (image_projections, text_projections))
    if gather:
        images, texts = gather_features(images), gather_features(texts)
    with torch.autocast(images.device.type, enabled=False):
        return images.T @ texts / len(images)


def redundancy_loss(
    image_projections: torch.Tensor,
    text_projections: torch.Tensor,
    off_diagonal: float = 5e-3,
    gather: bool = False,
) -> torch.Tensor:
    """sum over i of (C_ii - 1)² + off_diagonal * sum over i ≠ j of C_ij², with C the cross-correlation.

    Args:
        image_projections: (b, D), after a batch norm over the whole batch.
        text_projections: (b, D), likewise.
        off_diagonal: Barlow Twins' lambda.
        gather: C over all processes' pairs; every process returns the whole batch's loss.

    Returns:
        A scalar, 0 where the correlation is the identity. The published weight of it is 0.025.
    """
    correlation = cross_correlation(image_projections, text_projections, gather)
    diagonal = correlation.diagonal()
    others = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + off_diagonal * others
