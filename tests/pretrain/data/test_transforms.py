"""Image views against PIL, torchvision and hand-made cases."""

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
import torchvision.transforms.functional as tvf
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image

from pretrain.config import AugmentationConfig, DataConfig, PhaseConfig
from pretrain.data.folder import ImageStore
from pretrain.data.transforms import TrainingView, evaluation_view, normalise, to_tensor
from pretrain.data.views import plain_views

STILL = AugmentationConfig(
    flip=False,
    cutout_scale=[1.0, 1.0],
    rotation=0.0,
    colour=0.0,
    grey_probability=0.0,
    photo_background_probability=1.0,
)


def noise(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA").convert(mode)


def test_normalise_equals_torchvision():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    theirs = tvf.normalize(images.float() / 255, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    torch.testing.assert_close(normalise(images), theirs)
    halves = tvf.normalize(images.float() / 255, [0.5] * 3, [0.25] * 3)
    torch.testing.assert_close(normalise(images, [0.5] * 3, [0.25] * 3), halves)


def test_evaluation_view_is_anti_aliased_and_takes_the_whole_image():
    photo = noise("RGB", 90, 60)
    view = evaluation_view(photo, 20)
    assert view.dtype == torch.uint8 and view.shape == (3, 20, 20)
    # An independent anti-aliased bicubic: torch's, on floats; the difference is PIL's rounding between two passes.
    theirs = torch.nn.functional.interpolate(
        to_tensor(photo)[None].float(), (20, 20), mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 255)
    assert (view.float() - theirs).abs().max() <= 2
    aliased = torch.nn.functional.interpolate(to_tensor(photo)[None].float(), (20, 20), mode="bicubic")[0]
    assert (view.float() - aliased).abs().mean() > 20  # without anti-aliasing it would be another image


def test_evaluation_view_puts_cutouts_on_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # red, but transparent
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    view = evaluation_view(image, 8)
    assert view[:, 4, 0].tolist() == [0, 0, 0] and view[:, 4, 7].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "L"])
@pytest.mark.parametrize("size", [(1, 1), (300, 2), (2, 300), (40, 30), (32, 32)])
@pytest.mark.parametrize("side", [16, 64])
def test_training_views_are_squares_of_bytes(mode, size, side):
    view = TrainingView(side, AugmentationConfig(), [noise("RGB", 50, 40), noise("RGB", 1, 1)])
    for seed in range(6):
        out = view(noise(mode, *size), np.random.default_rng(seed))
        assert out.shape == (3, side, side) and out.dtype == torch.uint8 and out.is_contiguous()


def test_a_training_view_is_a_function_of_image_and_seed():
    view, image = TrainingView(32, AugmentationConfig()), noise("RGBA", 40, 40)
    first, again, other = (view(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_augmentation_a_cutout_is_its_resized_self_on_the_background():
    cutout = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    cutout.paste((250, 10, 10, 255), (16, 0, 48, 64))  # its middle half
    out = TrainingView(32, STILL, [Image.new("RGB", (50, 50), (10, 20, 200))])(cutout, np.random.default_rng(0))
    assert out[:, :, 10:22].float().mean((1, 2)).tolist() == [250, 10, 10]
    assert out[:, :, :6].float().mean((1, 2)).tolist() == [10, 20, 200]


def test_transparent_pixels_do_not_bleed_their_colour():
    cutout = Image.new("RGBA", (40, 40), (0, 255, 0, 0))  # transparent green around opaque red
    cutout.paste((255, 0, 0, 255), (10, 10, 30, 30))
    config = AugmentationConfig(**{**vars(STILL), "rotation": 30.0, "cutout_scale": [0.5, 0.9]})
    view = TrainingView(24, config, [Image.new("RGB", (50, 50), (0, 0, 255))])
    assert max(int(view(cutout, np.random.default_rng(s))[1].max()) for s in range(10)) <= 2


def test_a_jpeg_that_is_not_decoded_yet_gives_the_view_of_the_decoded_one(tmp_path):
    smooth = noise("RGB", 40, 30).resize((400, 300), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "x.jpg", quality=95)
    store, view = ImageStore(tmp_path), TrainingView(32, AugmentationConfig())
    for seed in range(20):  # the same draws, to the last
        lazy, whole = (view(read("x.jpg"), np.random.default_rng(seed)) for read in (store.open, store.read))
        assert (lazy.float() - whole.float()).abs().mean() < 2


def test_flip_mirrors_half_of_the_time():
    photo = Image.new("RGB", (20, 20), "black")
    photo.paste("white", (0, 0, 10, 20))
    config = AugmentationConfig(**{**vars(STILL), "flip": True, "crop_scale": [1.0, 1.0]})
    lefts = [
        float(TrainingView(8, config)(photo, np.random.default_rng(s))[:, :, 0].float().mean()) for s in range(100)
    ]
    assert 30 < sum(value > 127 for value in lefts) < 70


def test_grey_images_have_equal_channels():
    config = AugmentationConfig(**{**vars(STILL), "grey_probability": 1.0})
    out = TrainingView(16, config)(noise("RGB", 30, 30), np.random.default_rng(0))
    assert torch.equal(out[0], out[1]) and torch.equal(out[1], out[2])


def test_a_cutout_stays_inside_and_keeps_its_aspect():
    cutout = Image.new("RGBA", (80, 20), (255, 255, 255, 255))
    config = AugmentationConfig(**{**vars(STILL), "cutout_scale": [0.5, 0.5]})
    view = TrainingView(64, config, [Image.new("RGB", (9, 9), "black")])
    for seed in range(10):
        seen = np.argwhere(view(cutout, np.random.default_rng(seed))[0].numpy() > 127)
        height, width = seen.max(0) - seen.min(0) + 1
        assert abs(width - 32) <= 1 and abs(height - 8) <= 1


def test_a_cutout_larger_than_the_image_shows_parts_from_all_over_it_and_no_background():
    """A ramp from 0 to 255 in both directions, three times as large as the view: each view is a third of it."""
    ramp = np.zeros((90, 90, 4), np.uint8)
    ramp[..., 0], ramp[..., 1], ramp[..., 3] = np.linspace(0, 255, 90), np.linspace(0, 255, 90)[:, None], 255
    config = AugmentationConfig(**{**vars(STILL), "cutout_scale": [3.0, 3.0], "photo_background_probability": 0.0})
    view = TrainingView(30, config)
    views = [view(Image.fromarray(ramp, "RGBA"), np.random.default_rng(i)).float() for i in range(60)]
    spans = torch.stack([v[0].amax() - v[0].amin() for v in views])
    assert torch.all((spans - 85).abs() < 6)  # a third of the range, in every view
    assert all(v[2].amax() == 0 for v in views)  # the drawing has no blue: nothing else is seen
    left = torch.stack([v[0].amin() for v in views])
    assert left.min() < 20 and left.max() > 150


def test_a_phase_can_augment_in_its_own_way():
    data, still = DataConfig(), PhaseConfig(image_size=30, augmentation=STILL)
    cutout, rng = noise("RGBA", 40, 40), np.random.default_rng
    own = plain_views(data, still).images["image"](cutout, rng(0))
    assert torch.equal(own, TrainingView(30, STILL)(cutout, rng(0)))
    runs = plain_views(data, PhaseConfig(image_size=30)).images["image"](cutout, rng(0))
    assert torch.equal(runs, TrainingView(30, data.augmentation)(cutout, rng(0))) and not torch.equal(runs, own)


class Offsets:
    """A generator whose integers are given: the k-th is the k-th share of its range."""

    def __init__(self, *shares):
        self.shares, self.ranges = list(shares), []

    def integers(self, count):
        self.ranges.append(count)
        return int(self.shares[len(self.ranges) - 1] * (count - 1))


def photograph(width, height):
    """Smooth, so that a shift shows and rounding does not."""
    y, x = np.mgrid[:height, :width]
    channels = [128 + 100 * np.sin(x / 37), 128 + 100 * np.cos(y / 23), 128 + 100 * np.sin((x + 2 * y) / 51)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.mark.parametrize("shares", [(0, 0), (1, 1), (0, 1), (0.4, 0.7)])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (256, 256), (300, 1200), (200, 100)])
def test_a_cut_is_torchvisions_resize_and_crop_at_the_same_offsets(size, shares):
    config = AugmentationConfig(**{**vars(STILL), "crop_short_side": 256})
    photo, offsets = photograph(*size), Offsets(*shares)
    cut = TrainingView(224, config)._cut(photo, 256, offsets)
    resized = tv.Resize(256, tvf.InterpolationMode.BICUBIC)(photo)
    # Offsets that RandomCrop can draw, no more and no less: 0 to the resized side minus 224.
    assert offsets.ranges == [resized.height - 224 + 1, resized.width - 224 + 1]
    top, left = (int(share * (count - 1)) for share, count in zip(shares, offsets.ranges, strict=True))
    expected = np.asarray(tvf.crop(resized, top, left, 224, 224)).astype(int)
    assert np.abs(np.asarray(cut) - expected).max() <= 1


def test_a_cut_has_the_aspect_and_area_of_torchvisions(monkeypatch):
    """On 640 x 480 pictures, by the regions that are read: aspect 1, 0.574 of the area; crops are not."""
    boxes, photo = [], photograph(640, 480)
    original = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *a, box=None, **o: (boxes.append(box), original(self, *a, box=box, **o))[1]
    )
    for short_side in (256, 0):
        view = TrainingView(224, AugmentationConfig(flip=False, crop_scale=[0.766, 0.766], crop_short_side=short_side))
        for seed in range(20):
            view(photo, np.random.default_rng(seed))
    sides = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes])
    aspect, area = sides[:, 0] / sides[:, 1], sides.prod(axis=1) / (640 * 480)
    resized = tv.Resize(256)(photo)
    assert area[:20] == pytest.approx(224 * 224 / (resized.width * resized.height), rel=1e-6)
    assert area[:20] == pytest.approx(0.574, abs=1e-3) and aspect[:20] == pytest.approx(1, abs=2e-3)
    assert aspect[20:].min() < 0.95 and aspect[20:].max() > 1.2


def test_a_cut_moves_over_all_of_the_picture_with_the_seed():
    view = TrainingView(224, AugmentationConfig(**{**vars(STILL), "crop_short_side": 256}))
    y, x = np.mgrid[:256, :256]
    photo = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))  # a pixel's colour is its place
    found = [view(photo, np.random.default_rng(seed))[:2, 0, 0].tolist() for seed in range(400)]
    lefts, tops = zip(*found, strict=True)
    assert set(lefts) == set(tops) == set(range(256 - 224 + 1))
