"""The self-supervised terms that clip-rocket compares (arXiv 2305.08675), each with the projectors it trains: BarLIP,
SiamLIP, BYOLIP, SwALIP and SwALIPV1. The losses themselves are in `pretrain.losses`.

All take the pooled features of the towers, of the clean pair and of n augmented image and text views, and average over
the clean pair and the n x n augmented pairs (SwALIP: over the augmented ones, which alone have an opposite).

Layers, widths and norms are those of the authors' code. Different from it: the clean and the augmented views share a
term's projectors (so did the published ResNet-50 runs; ViT-S/16 ones had a set for each), BYOLIP's averaged text tower
has no text dropout, and SwALIPV1, which was published on the clean pair alone (num_augmented=0 is that), also counts
augmented pairs where there are some.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from torch import nn

from pretrain.losses.assignment import prototype_loss, swapped_pairs_loss
from pretrain.losses.gather import gather_features
from pretrain.losses.redundancy import redundancy_loss
from pretrain.losses.siamese import siamese_loss
from pretrain.modeling.clip import set_context_length, set_image_size
from pretrain.modeling.ema import MovingAverage
from pretrain.modeling.projector import Projector
from pretrain.modeling.tower_features import image_features, text_features

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class TermSizes:
    """Widths of the terms' projectors, as published."""

    redundancy_hidden: int = 3000  # BarLIP
    redundancy_outputs: int = 8192
    siamese_hidden: int = 2048  # SiamLIP and BYOLIP: of the projectors and of the predictors
    siamese_outputs: int = 128
    assignment_hidden: int = 2048  # SwALIPV1
    assignment_outputs: int = 128
    prototypes: int = 3000  # SwALIPV1


@dataclass
class ViewFeatures:
    """What the terms are made of; the first of each list is the clean view, the others are the augmented ones.

    Attributes:
        images: pooled tower features (b, W).
        texts: pooled tower features (b, V).
        augmented: normalised embeddings of the augmented views only: images, then texts, (b, E) each.
        scale: inverse temperature of those embeddings.
        average: pooled features of the same views from BYOLIP's averaged towers, images, then texts.
    """

    images: list[torch.Tensor]
    texts: list[torch.Tensor]
    augmented: tuple[list[torch.Tensor], list[torch.Tensor]]
    scale: torch.Tensor
    average: tuple[list[torch.Tensor], list[torch.Tensor]] = field(default_factory=lambda: ([], []))


def mean_over_pairs(loss: Callable[[int, int], torch.Tensor], views: int) -> torch.Tensor:
    """The mean of `loss(image view, text view)` over the clean pair (0, 0) and all pairs of the augmented views."""
    augmented = range(1, views)
    pairs = [(0, 0), *((i, j) for i in augmented for j in augmented)]
    return torch.stack([loss(i, j) for i, j in pairs]).mean()


class BarLIP(nn.Module):
    """0.025 times Barlow Twins' loss between an image's and a text's projection, lambda 5e-3.

    Projectors have three layers and a batch norm with scale and shift.
    """

    scale = 0.025

    def __init__(self, widths: tuple[int, int], sizes: TermSizes):
        super().__init__()
        shape = (sizes.redundancy_hidden, sizes.redundancy_outputs, 3, "affine", gather_features)
        self.image, self.text = (Projector(width, *shape) for width in widths)

    def forward(self, views: ViewFeatures) -> torch.Tensor:
        """A scalar, the whole batch's."""
        images, texts = [self.image(v) for v in views.images], [self.text(v) for v in views.texts]
        return self.scale * mean_over_pairs(lambda i, j: redundancy_loss(images[i], texts[j], gather=True), len(images))


class SiamLIP(nn.Module):
    """SimSiam's loss: each modality's prediction against the other's projection, whose gradient is stopped.

    Projectors have two layers and a batch norm without scale and shift, predictors two layers.
    """

    def __init__(self, widths: tuple[int, int], sizes: TermSizes):
        super().__init__()
        hidden, outputs = sizes.siamese_hidden, sizes.siamese_outputs
        shape = (hidden, outputs, 2, "plain", gather_features)
        self.projectors = nn.ModuleList(Projector(width, *shape) for width in widths)
        self.predictors = nn.ModuleList(Projector(outputs, hidden, outputs, 2, "none", gather_features) for _ in widths)

    def forward(self, views: ViewFeatures) -> torch.Tensor:
        """A scalar, this process's rows'."""
        projections = self._project(self.projectors, (views.images, views.texts))
        images, texts = (
            [predictor(v) for v in of_views] for predictor, of_views in zip(self.predictors, projections, strict=True)
        )
        to_images, to_texts = self._targets(views, projections)
        return mean_over_pairs(lambda i, j: siamese_loss(images[i], texts[j], to_images[i], to_texts[j]), len(images))

    def _project(
        self, projectors: nn.ModuleList, features: Sequence[Sequence[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        return [[projector(v) for v in views] for projector, views in zip(projectors, features, strict=True)]

    def _targets(self, views: ViewFeatures, projections: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        return projections


class BYOLIP(SiamLIP):
    """SiamLIP with the targets of a moving average (decay 0.99) of the towers and projectors, as in BYOL (arXiv
    2006.07733)."""

    def __init__(self, widths: tuple[int, int], sizes: TermSizes, model: CustomTextCLIP):
        super().__init__(widths, sizes)
        self.average = MovingAverage(self._followed(model), decay=0.99, warmup=False)

    def _followed(self, model: CustomTextCLIP) -> nn.ModuleDict:
        return nn.ModuleDict({"towers": model, "projectors": self.projectors})

    @torch.no_grad()
    def average_features(self, images: torch.Tensor, tokens: torch.Tensor, resampling: torch.Tensor | None) -> Pair:
        """Pooled features of the averaged towers, for images (B, 3, S, S) and tokens (B, L) of one strength."""
        towers = self.average.module["towers"]
        return image_features(towers, images, resampling), text_features(towers, tokens)

    @torch.no_grad()
    def _targets(self, views: ViewFeatures, projections: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        # The batch's statistics, as in BYOL; what this does to the running ones, the next update overwrites.
        projectors = self.average.module["projectors"].train()
        return self._project(projectors, views.average)

    def enter_phase(self, image_size: int, context_length: int) -> None:
        """Give the averaged towers the sizes of the trained ones."""
        set_image_size(self.average.module["towers"], image_size)
        set_context_length(self.average.module["towers"], context_length)

    def after_step(self, model: CustomTextCLIP) -> None:
        """Follow the trained towers and projectors."""
        self.average.update(self._followed(model))


class SwALIP(nn.Module):
    """Swapped assignments among the augmented views, the other modality's embeddings as prototypes."""

    def forward(self, views: ViewFeatures) -> torch.Tensor:
        """A scalar, this process's rows'."""
        return swapped_pairs_loss(*views.augmented, views.scale, gather=True)


class SwALIPV1(nn.Module):
    """Assignments of projections (two layers) to learned prototypes that both modalities share; these stay as they are
    for the first 100 steps, and the temperature, 0.1, always."""

    frozen_steps = 100

    def __init__(self, widths: tuple[int, int], sizes: TermSizes):
        super().__init__()
        shape = (sizes.assignment_hidden, sizes.assignment_outputs, 2, "none", gather_features)
        self.image, self.text = (Projector(width, *shape) for width in widths)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(sizes.prototypes, sizes.assignment_outputs), dim=1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, views: ViewFeatures) -> torch.Tensor:
        """A scalar, this process's rows'."""
        # A choice on the device: no gradient while they are frozen. Weight decay changes their lengths only.
        prototypes = torch.where(self.steps < self.frozen_steps, self.prototypes.detach(), self.prototypes)
        prototypes = F.normalize(prototypes.float(), dim=1)
        images = [F.normalize(self.image(v).float(), dim=1) for v in views.images]
        texts = [F.normalize(self.text(v).float(), dim=1) for v in views.texts]
        return mean_over_pairs(lambda i, j: prototype_loss(images[i], texts[j], prototypes, gather=True), len(images))

    def after_step(self, model: CustomTextCLIP) -> None:
        """Count."""
        self.steps += 1


TERMS = {"barlip": BarLIP, "siamlip": SiamLIP, "byolip": BYOLIP, "swalip": SwALIP, "swalip_v1": SwALIPV1}


def build_term(name: str, model: CustomTextCLIP, widths: tuple[int, int], sizes: TermSizes) -> nn.Module:
    """A term by name, for towers with pooled features of these widths.

    Raises:
        KeyError: for a name that is not in `TERMS`.
    """
    kind = TERMS[name]
    if kind is SwALIP:
        return kind()
    return kind(widths, sizes, model) if kind is BYOLIP else kind(widths, sizes)
