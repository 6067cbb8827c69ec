"""Large pictures in overlapping tiles: where the tiles are, and how what they find becomes one answer.

The whole picture is looked at too, so that objects larger than a tile are found; what a tile's border has cut gives way
to the same object found whole. Nothing here runs a model: see `OpenVocabularyDetector.predict(tile=…)`.
"""

import math
from collections.abc import Sequence

import numpy as np

from ovd.detections import Detections

Window = tuple[int, int, int, int]  # x1 y1 x2 y2 in whole pixels of the picture

_SMALLEST_TILE = 32
_MOST_TILES = 10_000  # a picture of 50,000 x 50,000 pixels in tiles of 640; more is a mistake, and takes hours
_TOUCHES = 2.0  # pixels between a box and a tile's border below which the border may have cut it
_COVERED = 0.5  # share of a cut box inside another box of its class from which both are one object


def tile_windows(height: int, width: int, tile: int, overlap: float = 0.25) -> list[Window]:
    """Place square tiles over a picture, evenly, so that neighbours share at least `overlap` of a side.

    Args:
        height, width: of the picture, in pixels.
        tile: side of a tile in pixels; where the picture is narrower, tiles are too.
        overlap: share of the side, 0 to below 1. An object up to overlap * tile pixels large lies whole in some tile.

    Returns:
        The whole picture first, then the tiles by rows; the whole picture alone where it is no larger than a tile.

    Raises:
        ValueError: the tile or the overlap is out of range.
    """
    if tile < _SMALLEST_TILE:
        raise ValueError(f"tile is {tile} pixels, but at least {_SMALLEST_TILE} are needed to see anything")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}, but it is a share of the tile's side from 0 to below 1, e.g. 0.25")
    windows = [(0, 0, width, height)]
    if max(height, width) <= tile:
        return windows
    down, across = _count(height, tile, overlap), _count(width, tile, overlap)
    if down * across > _MOST_TILES:
        raise ValueError(
            f"tiles of {tile} pixels with overlap {overlap} would be {down * across:,} for a picture of {width} x "
            f"{height}, and {_MOST_TILES:,} are the most: use larger tiles or less overlap"
        )
    for y in _starts(height, tile, down):
        for x in _starts(width, tile, across):
            windows.append((x, y, min(x + tile, width), min(y + tile, height)))
    return windows


def _count(length: int, tile: int, overlap: float) -> int:
    step = max(1, math.floor(tile * (1 - overlap)))
    return 1 if length <= tile else math.ceil((length - tile) / step) + 1


def _starts(length: int, tile: int, count: int) -> list[int]:
    return [round(i * (length - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]


def merge_windows(
    found: Sequence[Detections],
    windows: Sequence[Window],
    image_size: tuple[int, int],
    nms_threshold: float = 0.5,
    max_detections: int = 100,
) -> Detections:
    """Bring the detections of windows into the picture and keep one for each object.

    Boxes that touch a window's border inside the picture may be cut. They are looked at last, whatever their score,
    and are dropped also where half of them lies in a kept box of their class.

    Args:
        found: what was found in each window, in pixels of the window.
        windows: as from `tile_windows`.
        image_size: (height, width) of the picture.
        nms_threshold: intersection over union above which the weaker one of a class is dropped.
        max_detections: best detections kept.

    Returns:
        Detections in pixels of the picture, best first.
    """
    height, width = image_size
    owners = np.concatenate([np.full(len(d), i) for i, d in enumerate(found)]).astype(int)
    places = np.concatenate([np.arange(len(d)) for d in found]).astype(int)
    offsets = np.array([[w[0], w[1], w[0], w[1]] for w in windows], np.float32)
    boxes = np.concatenate([d.boxes for d in found]) + offsets[owners]
    scores = np.concatenate([d.scores for d in found])
    labels = np.concatenate([d.labels for d in found])
    kept = _keep_whole(boxes, scores, labels, _cut(boxes, np.array(windows)[owners], image_size), nms_threshold)
    kept = kept[np.argsort(-scores[kept], kind="stable")][:max_detections]
    masks = None
    if all(d.masks is not None for d in found):
        # Only now in the size of the picture: before, there were many times more of them.
        masks = np.zeros((len(kept), height, width), bool)
        for row, i in enumerate(kept):
            x1, y1, x2, y2 = windows[owners[i]]
            masks[row, y1:y2, x1:x2] = found[owners[i]].masks[places[i]]
    names = [found[owners[i]].names[places[i]] for i in kept]
    return Detections(boxes[kept], scores[kept], labels[kept], names, image_size, masks)


def _cut(boxes: np.ndarray, windows: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """(N,) bool: the box touches a border of its window that is none of the picture."""
    height, width = image_size
    inner = np.stack([windows[:, 0] > 0, windows[:, 1] > 0, windows[:, 2] < width, windows[:, 3] < height], axis=1)
    return (inner & (np.abs(boxes - windows) < _TOUCHES)).any(axis=1)


def _keep_whole(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, cut: np.ndarray, nms_threshold: float
) -> np.ndarray:
    """Indices of the detections that greedy suppression within each class keeps."""
    kept = []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for label in np.unique(labels):
        chosen: list[int] = []
        members = np.flatnonzero(labels == label)
        for i in members[np.lexsort((-scores[members], cut[members]))]:
            others = boxes[chosen]
            sides = np.minimum(boxes[i, 2:], others[:, 2:]) - np.maximum(boxes[i, :2], others[:, :2])
            shared = sides.clip(min=0).prod(axis=1)
            repeats = shared > nms_threshold * (areas[i] + areas[chosen] - shared)
            if cut[i]:
                repeats |= shared >= _COVERED * areas[i]
            if not repeats.any():
                chosen.append(int(i))
        kept += chosen
    return np.array(sorted(kept), dtype=int)
