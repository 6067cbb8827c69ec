"""How noisy batches of a data set are: how much a trained model believes in pairs that are not pairs.

OTTER's analysis (arXiv 2112.09445, section 1 and its `dataset_analysis.py`): in a random batch, the softmax over the
texts for each image. The larger the batch, the more texts match an image that is not theirs; contrastive training
calls them wrong all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore
from pretrain.evaluation.encoder import Encoder, evaluation_mode
from pretrain.losses.contrastive import similarity


@dataclass(frozen=True)
class BatchNoise:
    """Means over batches; probabilities are in 0–1."""

    diagonal_mean: float  # of an image's own text
    off_diagonal_max: float  # of the likeliest other text, mean over images
    off_diagonal_mean: float  # of another text
    confusable: float  # how many image-text pairs of a batch that are none have at least `threshold`
    threshold: float
    logit_scale: float
    pairs: int  # in a batch
    batches: int
    broken: int = 0  # images that could not be read

    def to_dict(self) -> dict[str, float | int]:
        """For result files."""
        return dict(vars(self))


def noise_of_batch(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: float, threshold: float = 0.2
) -> tuple[float, float, float, int]:
    """One batch's diagonal mean, mean over rows of the largest other entry, mean other entry, and count of the others
    that reach the threshold, in the softmax over texts.

    Args:
        image_features: (B, D), normalised, B at least 2.
        text_features: (B, D), normalised; row i is image i's.
        logit_scale: the inverse temperature.
        threshold: a probability.
    """
    probabilities = similarity(image_features, text_features, logit_scale).softmax(1)
    is_pair = torch.eye(len(probabilities), dtype=torch.bool, device=probabilities.device)
    others = probabilities.masked_fill(is_pair, 0)
    count = len(others) * (len(others) - 1)
    return (
        float(probabilities.diagonal().mean()), float(others.amax(1).mean()), float(others.double().sum() / count),
        int(((others >= threshold) & ~is_pair).sum()),
    )  # fmt: skip


def analyse_batches(
    encoder: Encoder, images: Sequence[str], captions: Sequence[str], store: ImageStore, pairs: int = 512,
    batches: int = 10, logit_scale: float | None = None, threshold: float = 0.2, seed: int = 0,
) -> BatchNoise:  # fmt: skip
    """Batches drawn at random from the pairs, without replacement.

    Args:
        images: names that `store` reads; one that cannot be read is left out, counted, and the next takes its place.
        captions: one for each image.
        pairs: of a batch, at least 2.
        batches: at most so many; 0: as many as there are.
        logit_scale: the inverse temperature; None: the model's own.

    Raises:
        ConfigError: if there are not enough pairs for one batch.
        ValueError: if not one image can be read.
    """
    if pairs < 2 or len(images) < pairs:
        raise ConfigError(f"{len(images)} pairs make no batch of {pairs}: choose 2 to {len(images)} (--pairs)")
    broken = len(encoder.broken)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    if batches:  # some more, in case that images are broken
        order = order[: pairs * (batches + 1)]
    with evaluation_mode(encoder.model):
        parts = list(encoder.images([images[i] for i in order], store))
        places, image_ND = torch.cat([p for p, _ in parts]).tolist(), torch.cat([f for _, f in parts])
        count = min(len(places) // pairs, batches or len(places))
        if not count:
            raise ConfigError(f"only {len(places)} of {len(order)} images could be read, too few for {pairs} pairs")
        with encoder.bar(count * pairs, "caption") as bar:
            text_ND = encoder.texts([captions[order[i]] for i in places[: count * pairs]], bar)
        scale = float(encoder.model.logit_scale.exp()) if logit_scale is None else logit_scale
        found = [
            noise_of_batch(image_ND[start : start + pairs], text_ND[start : start + pairs], scale, threshold)
            for start in range(0, count * pairs, pairs)
        ]
    means = [sum(values) / count for values in zip(*found, strict=True)]
    return BatchNoise(*means, threshold, scale, pairs, count, len(encoder.broken) - broken)
