"""Background photographs for composed scenes: object-free regions of the pictures inside the scikit-image wheel.

Every photograph belongs to one split only. Photographs showing an object of the miniature's classes (cat, coins,
camera, motorcycle, spoon) are left out or cropped around it, so that a scene has no unlabelled object. Landscapes
that a full miniature has in `photographs/` join the train scenes. Nothing is downloaded.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pretrain.atomic import write_atomically

_PHOTOGRAPH = "photograph-"  # marks the backgrounds that come from `photographs/`


@dataclass(frozen=True)
class Background:
    """A region (x0, y0, x1, y1; None: all) of a file in scikit-image's data folder, its author and licence."""

    name: str
    file: str
    split: str
    author: str
    licence: str
    region: tuple[int, int, int, int] | None = None


BACKGROUNDS = (
    Background("gravel", "gravel.png", "train", "CC0Textures (Gravel04)", "CC0-1.0"),
    Background("brick", "brick.png", "train", "CC0Textures (Bricks25)", "CC0-1.0"),
    Background("hubble", "hubble_deep_field.jpg", "train", "NASA, ESA (Hubble eXtreme Deep Field)", "public domain"),
    Background("tissue", "ihc.png", "train", "Center for Microscopy and Molecular Imaging", "no known restrictions"),
    Background("rocket", "rocket.jpg", "train", "SpaceX", "public domain"),
    Background("cell", "cell.png", "val", "Paul Müller and others", "CC0-1.0"),
    Background("astronaut", "astronaut.png", "val", "NASA", "public domain"),
    Background("grass", "grass.png", "test", "linolafett", "CC0-1.0"),
    Background("retina", "retina.jpg", "test", "Mikael Häggström", "CC0-1.0", (250, 250, 1160, 1160)),
    Background("lawn", "camera.png", "test", "Lav Varshney", "CC0-1.0", (395, 130, 512, 512)),
    Background("table", "coffee.png", "test", "Rachel Michetti", "CC0-1.0", (484, 0, 600, 400)),
)


def background_licences() -> list[str]:
    """Return Markdown table rows (part, source, author, licence, count) that name every background's origin."""
    return [
        f"| {b.split} background | scikit-image data/{b.file} | {b.author} | {b.licence} | 1 |" for b in BACKGROUNDS
    ]


def write_backgrounds(root: Path) -> dict[str, list[str]]:
    """Write `backgrounds/<split>/<name>.jpg` below root; what is already there is kept.

    Every `photographs/*.jpg` below root becomes a train background; those without their photograph are removed.

    Returns:
        Paths relative to root, by split, in the order of `BACKGROUNDS`, then the photographs by name.

    Raises:
        FileNotFoundError: the installed scikit-image lacks one of the pictures.
    """
    import skimage

    source = Path(skimage.__file__).parent / "data"
    paths: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for b in BACKGROUNDS:
        relative = f"backgrounds/{b.split}/{b.name}.jpg"
        paths[b.split].append(relative)
        target = root / relative
        if target.exists():
            continue
        if not (source / b.file).is_file():
            raise FileNotFoundError(f"scikit-image has no data/{b.file}: install scikit-image >= 0.22 from its wheel")
        with Image.open(source / b.file) as opened:
            picture = opened.convert("RGB")
        if b.region:
            picture = picture.crop(b.region)
        write_jpeg(picture, target, quality=95)
    paths["train"] += _copy_photographs(root)
    return paths


def _copy_photographs(root: Path) -> list[str]:
    folder = root / "backgrounds" / "train"
    photographs = {f"{_PHOTOGRAPH}{p.name}": p for p in sorted((root / "photographs").glob("*.jpg"))}
    for old in folder.glob(f"{_PHOTOGRAPH}*.jpg"):
        if old.name not in photographs:
            old.unlink()
    for name, source in photographs.items():
        if not (folder / name).exists():
            write_atomically(folder / name, source.read_bytes())
    return [f"backgrounds/train/{name}" for name in photographs]


def write_jpeg(image: Image.Image, target: Path, quality: int) -> None:
    """Write a JPEG so that it is either complete or absent."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    write_atomically(target, buffer.getvalue())


def draw_background(photos: list[Image.Image], size: int, rng: np.random.Generator) -> Image.Image:
    """Make a background of size x size pixels out of a few photographs.

    A random crop, flip, tint, hue, light and blur; three times in ten two crops meet at a slanted horizon. Few
    photographs thus give many backgrounds, so that a detector cannot learn them by heart.
    """
    first = _vary(photos[rng.integers(len(photos))], size, rng)
    if rng.random() < 0.3:
        second = _vary(photos[rng.integers(len(photos))], size, rng)
        height, slope = rng.uniform(0.3, 0.7) * size, rng.uniform(-0.3, 0.3)
        y, x = np.mgrid[:size, :size]
        below = Image.fromarray(((y > height + slope * (x - size / 2)) * 255).astype(np.uint8))
        first.paste(second, (0, 0), below)
    return first


def _vary(photo: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    shorter = min(photo.size)
    side = int(rng.uniform(0.45, 1.0) * shorter)
    x, y = (int(rng.integers(0, length - side + 1)) for length in photo.size)
    image = photo.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.6:
        # Two random ends of a colour ramp: the grey textures get a colour, coloured photographs another one.
        dark, light = rng.integers(0, 110, 3), rng.integers(120, 256, 3)
        tinted = ImageOps.colorize(image.convert("L"), tuple(map(int, dark)), tuple(map(int, light)))
        image = Image.blend(image, tinted, float(rng.uniform(0.4, 1.0)))
    else:
        hue, saturation, value = image.convert("HSV").split()
        shift = int(rng.integers(256))
        hue = hue.point([(i + shift) % 256 for i in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.6, 1.3)))
    image = ImageEnhance.Contrast(image).enhance(float(rng.uniform(0.6, 1.2)))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.0))))
    return image
