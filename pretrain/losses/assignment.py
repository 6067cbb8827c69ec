"""Swapped assignments (SwAV, arXiv 2006.09882) between images and texts: clip-rocket's SwALIP, where the batch's own
embeddings of the other modality are the prototypes, and SwALIPV1 with learned ones (arXiv 2305.08675).

Assignments come from Sinkhorn's iterations in SwAV's order, prototypes first and samples last, so that every sample's
sum to exactly 1; they carry no gradient. (`sinkhorn` is OTTER's, with the other order.)

Legend: B pairs in the batch, b of them on this process, D dimensions, P prototypes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pretrain.losses.contrastive import similarity
from pretrain.losses.gather import gather_features


@torch.no_grad()
def assignments(
    similarities: torch.Tensor, epsilon: float = 0.05, iterations: int = 3, gather: bool = False
) -> torch.Tensor:
    """Which prototypes each row belongs to, when all rows together use all prototypes nearly equally.

    An iteration scales exp(similarities / epsilon) so that every prototype has the same mass, then so that every row
    has; both potentials are kept as logarithms, which no epsilon can overflow.

    Args:
        similarities: (b, P) cosines.
        epsilon: Sinkhorn's, in the unit of a cosine, above 0.
        iterations: Sinkhorn's, at least 1.
        gather: the rows are one process's of all.

    Returns:
        (b, P) in float32, or float64 for such similarities; rows sum to 1.

    Raises:
        ValueError: for an epsilon that is not positive or fewer than 1 iterations.
    """
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"epsilon {epsilon} and iterations {iterations}: they must be above 0 and at least 1")
    with torch.autocast(similarities.device.type, enabled=False):
        kernel = (similarities if similarities.dtype == torch.float64 else similarities.float()) / epsilon
        of_rows = kernel.new_zeros(len(kernel), 1)
        for _ in range(iterations):
            mass = (kernel + of_rows).logsumexp(0, keepdim=True)
            # The totals that SwAV divides by (1, 1 / P, 1 / b) are constants, which the rows' scaling takes away.
            of_prototypes = -(gather_features(mass).logsumexp(0, keepdim=True) if gather else mass)
            of_rows = -(kernel + of_prototypes).logsumexp(1, keepdim=True)
        return (kernel + of_prototypes + of_rows).exp()


def swapped_pairs_loss(
    images: Sequence[torch.Tensor],
    texts: Sequence[torch.Tensor],
    logit_scale: torch.Tensor | float,
    epsilon: float = 0.05,
    iterations: int = 3,
    gather: bool = False,
) -> torch.Tensor:
    """SwALIP: image view i against text view j predicts the assignment that the opposite pair (the other image view,
    the other text view) has, and the same from texts to images; mean over the four pairs and both directions.

    Args:
        images: two views, (b, D) each, normalised.
        texts: two views, (b, D) each, normalised.
        logit_scale: inverse temperature of the predictions.
        epsilon: of the assignments.
        iterations: of the assignments.
        gather: prototypes are the embeddings of all processes.

    Returns:
        A scalar, the mean over the rows given: its mean over processes is the whole batch's.

    Raises:
        ValueError: if there are not two views of each: then no pair is another's opposite.
    """
    if (len(images), len(texts)) != (2, 2):
        raise ValueError(f"{len(images)} image views and {len(texts)} text views: swapped assignments need two of each")
    parts = []
    for rows, columns in ((images, texts), (texts, images)):
        prototypes = [gather_features(view) if gather else view for view in columns]
        cosines = {(i, j): similarity(rows[i], prototypes[j], 1.0) for i in (0, 1) for j in (0, 1)}
        targets = {pair: assignments(value, epsilon, iterations, gather) for pair, value in cosines.items()}
        parts += [_cross_entropy(logit_scale * cosines[i, j], targets[1 - i, 1 - j]) for i, j in cosines]
    return torch.stack(parts).mean()


def prototype_loss(
    image_projections: torch.Tensor,
    text_projections: torch.Tensor,
    prototypes: torch.Tensor,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    gather: bool = False,
) -> torch.Tensor:
    """SwALIPV1: an image predicts its text's assignment to shared prototypes, and a text its image's.

    Args:
        image_projections: (b, D), normalised.
        text_projections: (b, D), normalised.
        prototypes: (P, D), normalised.
        temperature: of the predictions.
        epsilon: of the assignments.
        iterations: of the assignments.
        gather: the assignments are balanced over the rows of all processes.

    Returns:
        A scalar, the mean over the rows given: its mean over processes is the whole batch's.
    """
    images, texts = (similarity(p, prototypes, 1.0) for p in (image_projections, text_projections))
    of_images, of_texts = (assignments(cosines, epsilon, iterations, gather) for cosines in (images, texts))
    return (_cross_entropy(images / temperature, of_texts) + _cross_entropy(texts / temperature, of_images)) / 2


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()
