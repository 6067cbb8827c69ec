"""Compose one detection scene: drawings pasted on a background, with boxes and masks of what stays visible.

A scene depends on its specification alone, so any number of processes makes the same scenes. Which classes appear where
is decided in `ovd.data.mini`.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as mask_tools

from ovd.data.backgrounds import draw_background, write_jpeg
from pretrain.atomic import write_atomically

SCENE_SIZE = 320  # pixels, square
LONG_SIDE = (36, 150)  # pixels, of an object
MAX_ANGLE = 15.0  # degrees
MIN_VISIBLE_SHARE = 0.3
MIN_VISIBLE_PIXELS = 40
_PLACEMENTS = 8  # positions tried for an object before it is left out
_OVERHANG = 0.15  # share of an object's side that may lie outside the picture


@dataclass(frozen=True)
class SceneSpec:
    """What a scene is made of: id (also the file name), random seed, objects (category id, drawing), photographs."""

    image_id: int
    seed: tuple[int, ...]
    objects: tuple[tuple[int, str], ...]
    photos: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """File name within its split's folder."""
        return f"{self.image_id:06d}.jpg"


@functools.lru_cache(maxsize=4096)  # about 100 kB a drawing; a process meets at most 1,600
def _drawing(path: str) -> Image.Image:
    with Image.open(path) as opened:
        return _trim(opened.convert("RGBA"))


@functools.lru_cache(maxsize=32)
def _photo(path: str) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _trim(drawing: Image.Image) -> Image.Image:
    """Crop to the opaque part (alpha > 127)."""
    box = drawing.getchannel("A").point([0] * 128 + [255] * 128).getbbox()
    if box is None:
        raise ValueError("a drawing without an opaque pixel cannot be an object: list it with cutout 0")
    return drawing.crop(box)


def _vary(drawing: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Flip, turn, scale and colour a drawing; returns uint8 RGBA (h, w, 4), its long side within `LONG_SIDE`."""
    if rng.random() < 0.5:
        drawing = ImageOps.mirror(drawing)
    angle = float(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    drawing = _trim(drawing.rotate(angle, Image.Resampling.BILINEAR, expand=True))
    scale = rng.integers(LONG_SIDE[0], LONG_SIDE[1] + 1) / max(drawing.size)
    width, height = (max(2, round(side * scale)) for side in drawing.size)
    pixels = np.asarray(drawing.resize((width, height), Image.Resampling.BICUBIC)).copy()
    gain, offset = rng.uniform(0.85, 1.15, 3) * rng.uniform(0.85, 1.15), rng.uniform(-15, 15)
    pixels[..., :3] = np.clip(pixels[..., :3] * gain + offset, 0, 255).astype(np.uint8)
    return pixels


def _position(side: int, size: int, rng: np.random.Generator) -> int:
    return int(rng.integers(-int(_OVERHANG * side), size - int((1 - _OVERHANG) * side) + 1))


def _overlap(size: int, x: int, y: int, width: int, height: int) -> tuple[slice, slice, slice, slice]:
    """Slices (canvas rows, canvas columns, object rows, object columns) of the part that lies on the canvas."""
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, size), min(y + height, size)
    return slice(y0, y1), slice(x0, x1), slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)


def _enough(visible: int, total: int) -> bool:
    return visible >= MIN_VISIBLE_PIXELS and visible >= MIN_VISIBLE_SHARE * total


def compose(spec: SceneSpec, root: Path, size: int = SCENE_SIZE) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """Compose a scene.

    Later objects lie over earlier ones. An object is only put where it and all objects below it stay visible enough
    (`MIN_VISIBLE_SHARE` of its own pixels and `MIN_VISIBLE_PIXELS`); if there is no such place it is left out, so a
    scene never holds an object without an annotation.

    Returns:
        The picture, RGB (size, size), and a list of (category id, visible mask bool (size, size)) in pasting order.
    """
    rng = np.random.default_rng(spec.seed)
    canvas = np.asarray(draw_background([_photo(str(root / p)) for p in spec.photos], size, rng)).astype(np.float32)
    owner = np.full((size, size), -1, np.int16)
    kept: list[int] = []  # category ids; the position is the number in `owner`
    totals: list[int] = []  # pixels of an object, hidden ones included
    for category_id, path in spec.objects:
        pixels = _vary(_drawing(str(root / path)), rng)
        height, width = pixels.shape[:2]
        solid = pixels[..., 3] > 127
        total = int(solid.sum())
        for _ in range(_PLACEMENTS):
            x, y = (_position(side, size, rng) for side in (width, height))
            rows, columns, own_rows, own_columns = _overlap(size, x, y, width, height)
            part = solid[own_rows, own_columns]
            hidden = np.bincount(owner[rows, columns][part] + 1, minlength=len(kept) + 1)[1:]
            visible = np.bincount(owner.ravel() + 1, minlength=len(kept) + 1)[1:] - hidden
            if _enough(int(part.sum()), total) and all(map(_enough, visible.tolist(), totals)):
                alpha = pixels[own_rows, own_columns, 3:].astype(np.float32) / 255
                below = canvas[rows, columns]
                canvas[rows, columns] = below + alpha * (pixels[own_rows, own_columns, :3] - below)
                owner[rows, columns][part] = len(kept)
                kept.append(category_id)
                totals.append(total)
                break
    picture = Image.fromarray(np.rint(canvas).astype(np.uint8))
    return picture, [(category_id, owner == i) for i, category_id in enumerate(kept)]


def annotate(category_id: int, mask: np.ndarray) -> dict[str, Any]:
    """Describe a visible mask, bool (H, W), in LVIS form: box xywh in pixels, area, compressed RLE with text counts."""
    rle = mask_tools.encode(np.asfortranarray(mask, dtype=np.uint8))
    box = [float(v) for v in mask_tools.toBbox(rle)]
    segmentation = {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}
    return {"category_id": category_id, "bbox": box, "area": float(mask.sum()), "segmentation": segmentation}


def write_scene(spec: SceneSpec, root: Path, folder: Path) -> dict[str, Any]:
    """Compose a scene and write its JPEG into folder; returns {"image": …, "annotations": […]}, federated ids apart."""
    picture, objects = compose(spec, root)
    write_jpeg(picture, folder / spec.file_name, quality=90)
    image = {"id": spec.image_id, "width": picture.width, "height": picture.height}
    return {"image": image, "annotations": [annotate(c, mask) for c, mask in objects]}


def write_chunk(job: tuple[Path, Path, Path, list[SceneSpec]]) -> int:
    """Write some scenes, then their annotations in one file, which marks them as done.

    Args:
        job: (root, folder of the pictures, file of the annotations, specifications).
    """
    root, folder, record, specs = job
    write_atomically(record, json.dumps([write_scene(spec, root, folder) for spec in specs]))
    return len(specs)
