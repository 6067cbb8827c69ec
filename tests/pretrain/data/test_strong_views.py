"""Weak and strong image views: drawn from the seed, as often and as strongly as published, and sharp."""

import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageStat
from torchvision.transforms import RandomResizedCrop

from pretrain.config import AugmentationConfig, ConfigError
from pretrain.data import strong_views
from pretrain.data.strong_views import StrengthView, ViewStrength, asymmetric, check_strength, crop_box, strong_view
from pretrain.data.transforms import to_tensor

NOTHING = ViewStrength(crop_scale=[1.0, 1.0])
STILL = AugmentationConfig(cutout_scale=[1.0, 1.0], rotation=0.0, photo_background_probability=0.0)


def photograph(width: int = 90, height: int = 60) -> Image.Image:
    """Smooth colours, different everywhere."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def cutout(size: int = 400) -> Image.Image:
    """A red disc with a green quarter at the upper right, on nothing."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    pen.ellipse((0, 0, size - 1, size - 1), fill=(220, 30, 30))
    pen.pieslice((0, 0, size - 1, size - 1), -90, 0, fill=(20, 150, 40))
    return image


@pytest.mark.parametrize("image", [photograph(), photograph().convert("L"), cutout()])
@pytest.mark.parametrize("strength", [ViewStrength(), strong_view()])
def test_a_view_depends_on_the_generator_alone(image, strength):
    view = pickle.loads(pickle.dumps(StrengthView(32, strength, AugmentationConfig(), [photograph()])))
    first, second, other = (view(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_whole_photograph_without_distortion_is_resized_only():
    view = StrengthView(30, ViewStrength(crop_scale=[0.999999, 1.0]), STILL)
    square = photograph(60, 60)
    drawn = view(square, np.random.default_rng(0))  # no aspect but 1 fits: the central region
    expected = to_tensor(square.resize((30, 30), Image.Resampling.BICUBIC))
    assert (drawn.int() - expected.int()).abs().max() <= 2


def test_crops_are_distributed_as_torchvisions():
    for scale in ([0.5, 1.0], [0.08, 1.0]):
        torch.manual_seed(0)
        rng, picture = np.random.default_rng(0), torch.zeros(1, 300, 500)
        mine = np.array([crop_box(500, 300, scale, rng) for _ in range(3000)])
        theirs = [RandomResizedCrop.get_params(picture, scale, (3 / 4, 4 / 3)) for _ in range(3000)]
        top, left, height, width = np.array(theirs).T
        reference = np.stack([left, top, left + width, top + height], axis=1)
        assert mine.min() >= 0 and mine[:, 2].max() <= 500 and mine[:, 3].max() <= 300
        for share in (0.1, 0.5, 0.9):
            # Quantiles of 3,000 draws of numbers up to 500 are known to a few pixels.
            difference = np.quantile(mine, share, axis=0) - np.quantile(reference, share, axis=0)
            assert np.abs(difference).max() < 25, (scale, share)


def test_operations_are_as_frequent_as_published(monkeypatch):
    """Each operation marks the image's size instead of changing it; 2,000 draws, so 0.05 is over four deviations."""
    view, counts, trials = (
        StrengthView(8, strong_view(), STILL),
        dict.fromkeys("jitter grey blur solarize flip".split(), 0),
        2000,
    )

    class Marked:
        def convert(self, mode):
            counts["grey"] += mode == "L"
            return self

        def filter(self, kernel):
            counts["blur"] += 0.1 <= kernel.radius <= 2.0
            return self

        def transpose(self, method):
            counts["flip"] += method == Image.Transpose.FLIP_LEFT_RIGHT
            return self

    def jitter(image, rng):
        counts["jitter"] += 1
        return image

    monkeypatch.setattr(view, "_jitter", jitter)
    rng = np.random.default_rng(0)
    for _ in range(trials):
        view._distort(Marked(), rng)
    expected = {"jitter": 0.8, "grey": 0.2, "blur": 0.5, "solarize": 0.0, "flip": 0.5}
    for name, share in expected.items():
        assert counts[name] / trials == pytest.approx(share, abs=0.05 if share else 0), name


def test_asymmetric_views_are_the_published_ones():
    """Probabilities of blur and solarisation, and a saturation jitter of 0.2; all else is the strong view's."""
    odd, even = (asdict(asymmetric(strong_view(), number)) for number in (1, 2))
    changed = {name for name, value in asdict(strong_view()).items() if odd[name] != value or even[name] != value}
    assert changed == {"jitter", "blur_probability", "solarize_probability"}
    assert odd["jitter"] == even["jitter"] == [0.4, 0.4, 0.2, 0.1]
    assert [(v["blur_probability"], v["solarize_probability"]) for v in (odd, even)] == [(1.0, 0.0), (0.1, 0.2)]


def test_the_weak_view_does_nothing_but_crop(monkeypatch):
    view = StrengthView(8, ViewStrength(), STILL)
    image, rng = photograph(), np.random.default_rng(0)
    assert all(view._distort(image, rng) is image for _ in range(200))


def test_jitter_has_torchvisions_ranges_and_all_orders(monkeypatch):
    orders, factors = set(), {name: [] for name in ("brightness", "contrast", "saturation", "hue")}

    def spy(name):
        def change(image, factor):
            factors[name].append(factor)
            order.append(name)
            return image

        return change

    for name in factors:
        monkeypatch.setattr(strong_views.functional, f"adjust_{name}", spy(name))
    view, rng = StrengthView(8, strong_view(), STILL), np.random.default_rng(0)
    for _ in range(500):
        order: list[str] = []
        view._jitter(photograph(), rng)
        orders.add(tuple(order))
    assert len(orders) == 24
    for name, values in factors.items():
        low, high = (-0.1, 0.1) if name == "hue" else (0.6, 1.4)
        assert low <= min(values) < low + 0.02 * (high - low) and high - 0.02 * (high - low) < max(values) <= high


def test_blur_grey_and_solarisation_are_pils():
    image, rng = photograph(), np.random.default_rng(0)
    grey = StrengthView(8, ViewStrength(grey_probability=1.0), STILL)._distort(image, rng)
    assert len({*ImageStat.Stat(grey).mean}) == 1
    blurred = StrengthView(8, ViewStrength(blur_probability=1.0, blur_sigma=[2.0, 2.0]), STILL)._distort(image, rng)
    assert ImageStat.Stat(blurred).mean == pytest.approx(ImageStat.Stat(image).mean, abs=1)
    dark = StrengthView(8, ViewStrength(solarize_probability=1.0), STILL)._distort(image, rng)
    assert max(high for _, high in dark.getextrema()) == 127


def test_a_whole_cutout_is_where_it_was_and_on_a_background():
    view = StrengthView(40, NOTHING, STILL)
    drawn = view(cutout(), np.random.default_rng(0))
    assert drawn[:, 30, 10].tolist() == pytest.approx([220, 30, 30], abs=2)  # lower left
    assert drawn[:, 10, 30].tolist() == pytest.approx([20, 150, 40], abs=2)  # upper right: not mirrored, not turned
    corners = [drawn[:, y, x].tolist() for y in (0, 39) for x in (0, 39)]
    assert corners.count(corners[0]) == 4 and corners[0] not in ([220, 30, 30], [20, 150, 40])


def test_a_crop_of_a_cutout_is_the_region_of_a_larger_picture(monkeypatch):
    """A quarter of the picture at 40 px shows what that quarter of the picture at 80 px shows, as sharply."""
    fine = 1 << 16
    whole = StrengthView(80, NOTHING, STILL)(cutout(), np.random.default_rng(0))
    for left, top in ((0, 0), (1, 0), (0, 1), (1, 1)):
        box = tuple(fine // 2 * v for v in (left, top, left + 1, top + 1))
        monkeypatch.setattr(strong_views, "crop_box", lambda *_, box=box: box)
        part = StrengthView(40, ViewStrength(), STILL)(cutout(), np.random.default_rng(0))
        inside = whole[:, 40 * top : 40 * top + 40, 40 * left : 40 * left + 40]
        y, x = torch.meshgrid(*(40.0 * v + torch.arange(40) + 0.5 - 40 for v in (top, left)), indexing="ij")
        disc = (x**2 + y**2).sqrt() < 36  # the backgrounds have colours of their own draw
        difference = (part.int() - inside.int()).abs().float()[:, disc]
        assert difference.mean() < 3, (left, top)


def test_an_enlarged_edge_is_not_blurred_by_drawing_it_small_first():
    """A 1/16 crop: the disc's edge is as narrow as if the cut-out had been cropped itself."""
    rng = np.random.default_rng(0)
    view = StrengthView(32, ViewStrength(crop_scale=[0.0625, 0.0625]), STILL)
    narrow = 0
    for _ in range(30):
        drawn = view(cutout(), rng).float()
        red_green = (drawn[0] - drawn[1])[:, 1:-1]
        steps = (red_green[:, 1:] - red_green[:, :-1]).abs()
        narrow = max(narrow, float(steps.max()))
    assert narrow > 150  # from red (190) to green (-130) within about two pixels


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (ViewStrength(crop_scale=[0.0, 1.0]), r"x.crop_scale is \[0.0, 1.0\]"),
        (ViewStrength(jitter=[0.4, 0.4, 0.4, 0.6]), "x.jitter is"),
        (ViewStrength(blur_probability=1.2), "x.blur_probability is 1.2"),
        (ViewStrength(blur_sigma=[2.0, 0.1]), "x.blur_sigma is"),
        (ViewStrength(crop_scale=[0.5]), r"x.crop_scale is \[0.5\]: give two shares"),
        (ViewStrength(blur_sigma=[1.0]), r"x.blur_sigma is \[1.0\]: give two widths"),
    ],
)
def test_strengths_that_cannot_be_drawn_are_named(strength, message):
    with pytest.raises(ConfigError, match=message):
        check_strength(strength, "x")
