"""Photographs of forests from the air with a box around every tree: a small real set to fine-tune on.

Pictures and boxes ship inside the Python package `deepforest` (Weinstein et al., "DeepForest: A Python package for RGB
deep learning tree crown delineation", Methods in Ecology and Evolution 2020); airborne photographs of the National
Ecological Observatory Network, about 0.1 m a pixel. They are cut into tiles, so that trees are large enough for the
miniature's detector. One place trains, a second one tests, and so does a third in another state: what is learned must
carry over.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from pretrain.atomic import write_atomically
from pretrain.data.pypi_archives import PyPIPackage, fetch_wheel

PACKAGE = PyPIPackage("deepforest", "2.1.0", "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54")
TILE = 200  # pixels, the longest side of a tile: enlarged to 320, trees are as large as the objects of the miniature
KEPT = 0.4  # share of a tree's box that a tile must show, for the tree to be one of its objects
SMALLEST = 4  # pixels, of what is left of a box
CATEGORY = {"id": 1, "name": "tree", "synonyms": ["tree"]}


@dataclass(frozen=True)
class Place:
    """One photograph of the package.

    Attributes:
        split: name of the annotation file that its tiles go to.
        name: of the photograph and its boxes inside the package, without ending.
    """

    split: str
    name: str
    where: str


PLACES = (
    Place("train", "2019_YELL_2_528000_4978000_image_crop2", "Yellowstone, Wyoming"),
    Place("test", "2019_YELL_2_541000_4977000_image_crop", "Yellowstone, 13 km further east"),
    Place("elsewhere", "OSBS_029", "Ordway-Swisher, Florida"),
)


def build_trees(root: str | Path, fetched: str | Path | None = None) -> dict[str, dict[str, int]]:
    """Write tiles and one COCO file a split; what is there is written again alike.

    Args:
        root: folder for {train,test,elsewhere}.json, the tiles in folders of these names, whole/*.png (the photographs
            as they came) and LICENSE.txt; made when missing.
        fetched: folder for the package (default: `root`/packages).

    Returns:
        By split, how many "tiles" and "trees".

    Raises:
        FetchError: the package cannot be fetched, or is not what was pinned.
    """
    root = Path(root)
    counts = {}
    with zipfile.ZipFile(fetch_wheel(PACKAGE, Path(fetched or root / "packages"))) as wheel:
        licence = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
        write_atomically(root / "LICENSE.txt", wheel.read(licence).decode())
        for place in PLACES:
            photo = Image.open(io.BytesIO(wheel.read(f"deepforest/data/{place.name}.png"))).convert("RGB")
            boxes = read_voc_boxes(wheel.read(f"deepforest/data/{place.name}.xml"))
            (root / "whole").mkdir(exist_ok=True)
            photo.save(root / "whole" / f"{place.split}.png")
            content = cut_into_tiles(photo, boxes, root / place.split)
            write_atomically(root / f"{place.split}.json", json.dumps(content))
            counts[place.split] = {"tiles": len(content["images"]), "trees": len(content["annotations"])}
    return counts


def read_voc_boxes(xml: bytes | str) -> np.ndarray:
    """Boxes (N, 4) as x1 y1 x2 y2 in pixels, of all objects of a Pascal VOC annotation."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    found = ElementTree.fromstring(xml).iter("bndbox")
    return np.array([[float(box.findtext(corner)) for corner in corners] for box in found]).reshape(-1, 4)


def tiles(width: int, height: int, side: int) -> Iterator[tuple[int, int, int, int]]:
    """Divide a picture evenly, without overlap, into x1 y1 x2 y2 windows of at most `side` pixels."""
    across, down = ceil(width / side), ceil(height / side)
    for row in range(down):
        for column in range(across):
            yield (
                column * width // across,
                row * height // down,
                (column + 1) * width // across,
                (row + 1) * height // down,
            )


def clip_boxes(boxes: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    """What a window shows of boxes (N, 4), in its own pixels; boxes of which it shows too little are left out."""
    corner = np.array(window[:2] * 2)
    shown = np.clip(boxes, corner, np.array(window[2:] * 2))
    sides, whole = shown[:, 2:] - shown[:, :2], boxes[:, 2:] - boxes[:, :2]
    kept = (sides.prod(1) >= KEPT * whole.prod(1)) & (sides.min(1, initial=np.inf) >= SMALLEST)
    return shown[kept] - corner


def cut_into_tiles(photo: Image.Image, boxes: np.ndarray, folder: Path) -> dict:
    """Write a photograph's tiles into a folder; return a COCO file's content, its file names relative to the parent."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict = {"images": [], "annotations": [], "categories": [CATEGORY]}
    for number, window in enumerate(tiles(*photo.size, TILE), start=1):
        tile, name = photo.crop(window), f"{folder.name}/{number:03d}.png"
        tile.save(folder.parent / name)
        content["images"].append({"id": number, "file_name": name, "width": tile.width, "height": tile.height})
        for x1, y1, x2, y2 in clip_boxes(boxes, window).tolist():
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1, "image_id": number, "category_id": CATEGORY["id"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0,
                }
            )  # fmt: skip
    return content
