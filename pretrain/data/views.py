"""What the loader makes of one pair: which images and which texts, under which keys of the batch.

An objective says which views it trains on (`Objective.views`); this file knows the plain ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from PIL import Image

from pretrain.config import DataConfig, PhaseConfig
from pretrain.data.jpeg import JpegPicture
from pretrain.data.text_augment import training_caption
from pretrain.data.transforms import TrainingView

# An RGBA cut-out or an RGB photograph of any size, and the sample's generator, to uint8 (3, S, S).
ImageView = Callable[[Image.Image | JpegPicture, np.random.Generator], torch.Tensor]
# A row, and the sample's generator, to a text.
CaptionView = Callable[[dict, np.random.Generator], str]


@dataclass(frozen=True)
class Views:
    """Functions by batch key. They draw in this order, images first, from one generator a sample.

    Attributes:
        images: the batch has (B, 3, S, S) uint8 under each key.
        captions: the batch has (B, L) int64 tokens under each key.
    """

    images: dict[str, ImageView]
    captions: dict[str, CaptionView] = field(default_factory=dict)

    def __call__(self, image: Image.Image | JpegPicture, row: dict, rng: np.random.Generator) -> dict:
        """One sample: tensors and texts by key."""
        images = {key: view(image, rng) for key, view in self.images.items()}
        return images | {key: view(row, rng) for key, view in self.captions.items()}


def plain_views(data: DataConfig, phase: PhaseConfig, backgrounds: Sequence[Image.Image] = ()) -> Views:
    """One augmented "image" at the phase's size, and the "tokens" of one caption."""
    return Views(
        {"image": TrainingView(phase.image_size, phase.augmentation or data.augmentation, backgrounds)},
        {"tokens": partial(training_caption, config=data.caption)},
    )
