"""Weak and strong image views as clip-rocket draws them ("Improved baselines for vision-language pre-training", arXiv
2305.08675): a random resized crop, then colour jitter, grey, blur, solarisation and a flip, each with a probability.

A cut-out is put on a background as in ordinary training (`transforms`), and the crop is one of that composition, drawn
at its own resolution. Pixels stay uint8 RGB. Different from the authors' code: normalisation is the objective's (CLIP's
values for ImageNet's), and before a crop is resized it is reduced by a whole factor where it is over twice as large.
Texts are `text_views`'.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional

from pretrain.config import AugmentationConfig, ConfigError
from pretrain.data.jpeg import JpegPicture
from pretrain.data.transforms import TrainingView, to_tensor

_SOLARIZE_THRESHOLD = 128  # BYOL's and torchvision's custom: half of the range


@dataclass
class ViewStrength:
    """One kind of view; the defaults are the weak one: a crop of half of the image or more, nothing else."""

    crop_scale: list[float] = field(default_factory=lambda: [0.5, 1.0])  # share of the area
    flip_probability: float = 0.0
    jitter_probability: float = 0.0
    jitter: list[float] = field(default_factory=lambda: [0.4, 0.4, 0.4, 0.1])  # brightness, contrast, saturation, hue
    grey_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])  # pixels; published for 224-px images
    solarize_probability: float = 0.0


def strong_view() -> ViewStrength:
    """The published strong view."""
    return ViewStrength(
        crop_scale=[0.08, 1.0], flip_probability=0.5, jitter_probability=0.8, grey_probability=0.2, blur_probability=0.5
    )


def asymmetric(strength: ViewStrength, number: int) -> ViewStrength:
    """The published variant "as in BYOL" of augmented view `number`, from 1: half of the saturation jitter (0.2); odd
    views always blurred and never solarised, even ones seldom blurred (.1) and sometimes solarised (.2)."""
    brightness, contrast, saturation, hue = strength.jitter
    blur, solarize = (1.0, 0.0) if number % 2 else (0.1, 0.2)
    jitter = [brightness, contrast, saturation / 2, hue]
    return replace(strength, jitter=jitter, blur_probability=blur, solarize_probability=solarize)


def check_strength(strength: ViewStrength, where: str) -> None:
    """Raise ConfigError for a value that no view can be drawn with; `where` is the field's name."""
    scale, sigma = strength.crop_scale, strength.blur_sigma
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigError(
            f"{where}.crop_scale is {scale}: give two shares of the area, [low, high] with 0 < low <= high <= 1"
        )
    if len(strength.jitter) != 4 or min(strength.jitter) < 0 or strength.jitter[3] > 0.5:
        raise ConfigError(
            f"{where}.jitter is {strength.jitter}: give brightness, contrast, saturation and hue, none negative and "
            "hue at most 0.5"
        )
    for name in ("flip", "jitter", "grey", "blur", "solarize"):
        if not 0 <= (value := getattr(strength, f"{name}_probability")) <= 1:
            raise ConfigError(f"{where}.{name}_probability is {value}: it must be in 0 to 1")
    if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1]:
        raise ConfigError(f"{where}.blur_sigma is {sigma}: give two widths in pixels, [low, high], 0 < low <= high")


def crop_box(width: int, height: int, scale: Sequence[float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The region of a random resized crop, by torchvision's rule: an area in `scale`, an aspect in 3/4 to 4/3, and the
    largest central region after ten draws that do not fit.

    Returns:
        left, top, right, bottom in pixels, inside the image.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class StrengthView(TrainingView):
    """Make one view of `size` pixels.

    Args:
        size: side in pixels.
        strength: what is drawn.
        config: how cut-outs are placed (scale, rotation, backgrounds); its other fields do not count here.
        backgrounds: photographs to put behind cut-outs.
    """

    def __init__(
        self, size: int, strength: ViewStrength, config: AugmentationConfig, backgrounds: Sequence[Image.Image] = ()
    ):
        super().__init__(size, config, backgrounds)
        self.strength = strength

    def __call__(self, image: Image.Image | JpegPicture, rng: np.random.Generator) -> torch.Tensor:
        """uint8 (3, size, size) from an RGBA cut-out or an RGB photograph of any size; OSError for a damaged JPEG."""
        if image.mode == "RGBA":
            view = self._crop_of_placed(image, rng)
        else:
            photo = image if image.mode == "RGB" else image.convert("RGB")
            box = crop_box(photo.width, photo.height, self.strength.crop_scale, rng)
            # The authors' filter, for both strengths.
            view = photo.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        return to_tensor(self._distort(view, rng))

    def _crop_of_placed(self, cutout: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A crop of a square picture of the cut-out on a background, as sharp as if that were drawn large enough.

        The background is drawn for the crop: a region of a region of a photograph is one, too.
        """
        config, size = self.config, self.size
        fine = 1 << 16  # the square's side while only geometry is drawn
        box = np.array(crop_box(fine, fine, self.strength.crop_scale, rng)) / fine  # of the unit square
        scale = rng.uniform(*config.cutout_scale) / max(cutout.size)  # of the square's side, for a pixel of the cut-out
        angle = math.radians(rng.uniform(-config.rotation, config.rotation))
        slack = max(0.0, 1 - scale * max(cutout.size)) / 2
        centre = 0.5 + rng.uniform(-slack, slack, 2)
        zoom = size / (box[2:] - box[:2])  # pixels of the view for the square's side, across and down
        # Anti-aliasing first, by whole-image reduction, never enlarging; the affine step then shrinks by a third at
        # most (a crop's two sides differ by that).
        reduction = min(1.0, scale * float(zoom.max()))
        fitted = cutout.resize([max(1, round(side * reduction)) for side in cutout.size], Image.Resampling.BILINEAR)
        # From a pixel of the view to the square, then back through shift, rotation and scale to a pixel of `fitted`.
        to_fitted = np.array([fitted.width / cutout.width, fitted.height / cutout.height]) / scale
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = to_fitted[:, None] * np.array([[cos, sin], [-sin, cos]]) / zoom[None, :]
        offset = to_fitted * (np.array([[cos, sin], [-sin, cos]]) @ (box[:2] - centre)) + np.array(fitted.size) / 2
        (a, b), (d, e) = matrix
        # Premultiplied alpha ("RGBa"): transparent pixels must not bleed their colour into the edge.
        moved = fitted.convert("RGBa").transform(
            (size, size), Image.Transform.AFFINE, (a, b, offset[0], d, e, offset[1]), Image.Resampling.BILINEAR
        )
        background = self._background(rng).convert("RGBA")
        return Image.alpha_composite(background, moved.convert("RGBA")).convert("RGB")

    def _distort(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        strength = self.strength
        if rng.random() < strength.jitter_probability:
            image = self._jitter(image, rng)
        if rng.random() < strength.grey_probability:
            image = image.convert("L").convert("RGB")
        if rng.random() < strength.blur_probability:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*strength.blur_sigma)))
        if rng.random() < strength.solarize_probability:
            image = ImageOps.solarize(image, _SOLARIZE_THRESHOLD)
        if rng.random() < strength.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def _jitter(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """torchvision's ColorJitter, drawn from the sample's generator: four changes in a random order."""
        brightness, contrast, saturation, hue = self.strength.jitter
        factors = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
        factors.append(rng.uniform(-hue, hue))
        changes = (
            functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation,
            functional.adjust_hue,
        )  # fmt: skip
        for index in rng.permutation(4):
            image = changes[index](image, factors[index])
        return image
