"""The best and the worst detections as crops of their pictures, the detection's box and the annotated one drawn in.

Which detections are good or bad follows `findings`; words are in the captions, not in the pixels.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ovd.data.images import read_image
from ovd.data.lvis import picture_path
from ovd.report.findings import Findings

SIDE = 168  # pixels of a crop's longer side on the page
_MARGIN = 0.35  # of the box's longer side, around it
FOUND, TRUTH = (255, 150, 0), (90, 200, 255)  # orange: the detection's box, blue: the annotated one


@dataclass(frozen=True)
class Example:
    """One thing to look at; boxes are x, y, width, height in pixels.

    Attributes:
        image_id: of the annotation file.
        box: of the detection; None for a missed object.
        word: what the detection says.
        score: in 0-1.
        truth_box: of the annotated object; None for a detection that lies on none.
        truth: the annotated word.
    """

    image_id: int
    box: tuple[float, ...] | None
    word: str | None
    score: float | None
    truth_box: tuple[float, ...] | None
    truth: str | None


def examples(findings: Findings, each: int = 10) -> dict[str, list[Example]]:
    """Return {"right", "wrong word", "nowhere", "missed"}: at most `each`, the surest (missed: the largest) first, one
    of a word (missed and wrong word: of an annotated word)."""
    truth, table = findings.ground_truth, findings.detections
    rows, classes = findings.objects(), findings.winning_class()
    won = rows[classes[rows] >= 0]
    won = won[np.argsort(-table.scores[findings.winner[won]], kind="stable")]
    right = [r for r in won if classes[r] == truth.category[r]]
    wrong = [r for r in won if classes[r] != truth.category[r]]
    wrong = list({findings.winner[r]: r for r in reversed(wrong)}.values())[::-1]  # a detection once
    missed = rows[classes[rows] < 0]
    missed = missed[np.argsort(-truth.boxes[missed, 2:].prod(axis=1), kind="stable")]
    nowhere = np.flatnonzero(findings.nowhere)
    nowhere = nowhere[np.argsort(-table.scores[nowhere], kind="stable")]

    def detection(row: int) -> tuple:
        return tuple(table.boxes[row]), truth.names[table.category_ids[row]], float(table.scores[row])

    def on_object(row: int) -> Example:
        picture = int(truth.image_ids[truth.image[row]])
        found = detection(findings.winner[row]) if findings.winner[row] >= 0 else (None, None, None)
        return Example(picture, *found, tuple(truth.boxes[row]), truth.names[truth.category[row]])

    def on_nothing(row: int) -> Example:
        return Example(int(truth.image_ids[table.image_ids[row]]), *detection(row), None, None)

    return {
        "right": _varied(right, truth.category, on_object, each),
        "wrong word": _varied(wrong, truth.category, on_object, each),
        "nowhere": _varied(nowhere, table.category_ids, on_nothing, each),
        "missed": _varied(missed, truth.category, on_object, each),
    }


def _varied(rows: list[int], category: np.ndarray, make: Callable[[int], Example], each: int) -> list[Example]:
    """The first row of every class, in order."""
    first: dict[int, int] = {}
    for row in rows:
        if len(first) == each:
            break
        first.setdefault(int(category[row]), row)
    return [make(row) for row in first.values()]


def crop_png(example: Example, image: dict, root: Path) -> bytes:
    """The part of the picture around both boxes, at most `SIDE` pixels a side, with them drawn.

    Args:
        image: its entry in the annotation file.
        root: folder that its name is relative to.

    Raises:
        ValueError: a picture that cannot be read (`ImageError`), or one without a name.
    """
    pixels = read_image(picture_path(image, root))
    height, width = pixels.shape[:2]
    boxes = [(np.asarray(b, float), c) for b, c in ((example.truth_box, TRUTH), (example.box, FOUND)) if b]
    corners, colours = np.stack([np.concatenate([b[:2], b[:2] + b[2:]]) for b, _ in boxes]), [c for _, c in boxes]
    margin = _MARGIN * max(np.ptp(corners[:, [0, 2]]), np.ptp(corners[:, [1, 3]]), 8.0)
    # Whole pixels, at least one of them inside the picture whatever the box says.
    left, top = (int(np.clip(corners[:, i].min() - margin, 0, n - 1)) for i, n in ((0, width), (1, height)))
    right, bottom = (
        int(np.clip(np.ceil(corners[:, i].max() + margin), low + 1, n))
        for i, low, n in ((2, left, width), (3, top, height))
    )
    part = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    scale = SIDE / max(part.size)
    shown = part.resize([max(1, round(side * scale)) for side in part.size], Image.Resampling.BILINEAR)
    for box, colour in zip(corners, colours, strict=True):
        _draw_box(shown, (box - [left, top, left, top]) * scale, colour)
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _draw_box(image: Image.Image, box: np.ndarray, colour: tuple[int, int, int]) -> None:
    """A frame with a dark edge on either side, so that it shows on any ground; the frame stays inside the image."""
    width, height = image.size
    limits = [width - 1, height - 1, width - 1, height - 1]
    x1, y1, x2, y2 = (int(v) for v in np.clip(np.round(box), 1, np.maximum(np.asarray(limits) - 1, 1)))
    pen = ImageDraw.Draw(image)
    pen.rectangle((x1 - 1, y1 - 1, max(x1, x2) + 1, max(y1, y2) + 1), outline=(20, 20, 20), width=4)
    pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
