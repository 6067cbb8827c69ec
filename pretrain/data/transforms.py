"""Images in and out of the towers: augmentation, evaluation view, normalisation. RGB uint8 up to the device.

Random draws come from a NumPy generator that the caller seeds per sample, so a sample does not depend on which process
made it. Down-scaling is always anti-aliased (at RECLIP's sizes it matters more than anything else here).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image, ImageEnhance

from pretrain.config import AugmentationConfig
from pretrain.data.jpeg import JpegPicture

_EVALUATION_BACKGROUND = (255, 255, 255, 255)


def normalise(
    images: torch.Tensor, mean: Sequence[float] = OPENAI_DATASET_MEAN, std: Sequence[float] = OPENAI_DATASET_STD
) -> torch.Tensor:
    """uint8 images (B, 3, H, W) to float32 with zero mean and unit deviation; CLIP's values unless others are given."""
    # Made on the CPU: a tensor made on a GPU from Python numbers waits for all work queued before.
    mean_311, std_311 = (torch.tensor(v).to(images.device, non_blocking=True).view(3, 1, 1) for v in (mean, std))
    return (images / 255).sub_(mean_311).div_(std_311)  # in place: one float copy, not three


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB PIL image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def evaluation_view(image: Image.Image, size: int) -> torch.Tensor:
    """The whole image resized to a square (no crop: RECLIP's family evaluates so); cut-outs on white.

    Returns:
        uint8 (3, size, size).
    """
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, _EVALUATION_BACKGROUND), image)
    return to_tensor(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


class TrainingView:
    """Make one augmented training image of `size` pixels.

    Args:
        size: side in pixels.
        config: strengths.
        backgrounds: photographs to put behind cut-outs.
    """

    def __init__(self, size: int, config: AugmentationConfig, backgrounds: Sequence[Image.Image] = ()):
        self.size, self.config, self.backgrounds = size, config, backgrounds

    def __call__(self, image: Image.Image | JpegPicture, rng: np.random.Generator) -> torch.Tensor:
        """uint8 (3, size, size) from an RGBA cut-out or an RGB photograph of any size; OSError for a damaged JPEG."""
        if image.mode == "RGBA":
            placed = self._place(image, rng)
        else:
            photo = image if image.mode == "RGB" else image.convert("RGB")
            short_side = self.config.crop_short_side
            cut = self._cut(photo, short_side, rng) if short_side else self._crop(photo, self.config.crop_scale, rng)
            placed = self._flip(cut, rng)
        return to_tensor(self._colour(placed, rng))

    def _place(self, cutout: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Scale, rotate, flip and shift a cut-out onto a background."""
        size, config = self.size, self.config
        scale = rng.uniform(*config.cutout_scale) * size / max(cutout.size)
        angle = math.radians(rng.uniform(-config.rotation, config.rotation))
        flip = -1 if config.flip and rng.random() < 0.5 else 1
        slack = abs(size - scale * max(cutout.size)) / 2  # of a drawing larger than the image, the view moves over it
        centre_x, centre_y = size / 2 + rng.uniform(-slack, slack), size / 2 + rng.uniform(-slack, slack)
        # Anti-aliasing first, by whole-image reduction; the affine step then never shrinks by more than a little.
        fitted = cutout.resize([max(1, round(side * scale)) for side in cutout.size], Image.Resampling.BILINEAR)
        cos, sin = math.cos(angle), math.sin(angle)
        half_w, half_h = fitted.width / 2, fitted.height / 2
        inverse = (
            flip * cos, flip * sin, half_w - flip * (cos * centre_x + sin * centre_y),
            -sin, cos, half_h + sin * centre_x - cos * centre_y,
        )  # fmt: skip
        # Premultiplied alpha ("RGBa"): transparent pixels must not bleed their colour into the edge.
        moved = fitted.convert("RGBa").transform(
            (size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR
        )
        background = self._background(rng).convert("RGBA")
        return Image.alpha_composite(background, moved.convert("RGBA")).convert("RGB")

    def _background(self, rng: np.random.Generator) -> Image.Image:
        if self.backgrounds and rng.random() < self.config.photo_background_probability:
            photo = self.backgrounds[rng.integers(len(self.backgrounds))]
            return self._flip(self._crop(photo, (0.05, 0.6), rng), rng)
        return Image.new("RGB", (self.size, self.size), tuple(int(c) for c in rng.integers(0, 256, 3)))

    def _crop(self, photo: Image.Image | JpegPicture, area: Sequence[float], rng: np.random.Generator) -> Image.Image:
        """A random crop of the given share of the area and an aspect of 3/4 to 4/3, resized with anti-aliasing."""
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        pixels = photo.width * photo.height * rng.uniform(*area)
        width = min(photo.width, max(1, round(math.sqrt(pixels * aspect))))
        height = min(photo.height, max(1, round(math.sqrt(pixels / aspect))))
        left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
        box = (int(left), int(top), int(left) + width, int(top) + height)
        return photo.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)

    def _cut(self, photo: Image.Image | JpegPicture, short_side: int, rng: np.random.Generator) -> Image.Image:
        """A random square of `size` pixels of the photograph resized so that its short side is `short_side`, as
        torchvision's Resize (bicubic) and RandomCrop; only the square's part of the photograph is resized."""
        shortest = min(photo.width, photo.height)
        width, height = (int(short_side * side / shortest) for side in (photo.width, photo.height))
        top, left = (int(rng.integers(side - self.size + 1)) for side in (height, width))
        x, y = photo.width / width, photo.height / height  # pixels of the photograph for one of the resized one
        right, bottom = min(photo.width, (left + self.size) * x), min(photo.height, (top + self.size) * y)
        box = (left * x, top * y, right, bottom)
        return photo.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)

    def _flip(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        flip = self.config.flip and rng.random() < 0.5
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image

    def _colour(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        strength = self.config.colour
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            factor = 1 + rng.uniform(-strength, strength)
            if factor != 1:
                image = enhance(image).enhance(factor)
        if rng.random() < self.config.grey_probability:
            image = image.convert("L").convert("RGB")
        return image
