"""Detections in the formats of other tools: supervision, FiftyOne, labelme and YOLO.

Sources: supervision.Detections; FiftyOne's `Detection` label; labelme's JSON (version 5); Ultralytics' label format.
COCO's form is `Detections.to_coco`. Files are written by `ovd/results_writer.py`.
"""

from typing import Any

import numpy as np

from ovd.detections import Detections

_LABELME_VERSION = "5.5.0"
_TOLERANCE = 0.4  # pixels that an outline may differ from the mask's
_ENLARGED = 5


def to_supervision(detections: Detections) -> Any:
    """See `Detections.to_supervision`."""
    try:
        import supervision
    except ImportError as error:
        raise ImportError("supervision is not installed; run: pip install supervision") from error
    return supervision.Detections(
        xyxy=detections.boxes.copy(),
        mask=None if detections.masks is None else detections.masks.copy(),
        confidence=detections.scores.copy(),
        class_id=detections.labels.copy(),
        data={"class_name": np.array(detections.names, dtype=str)},
    )


def to_fiftyone(detections: Detections) -> Any:
    """See `Detections.to_fiftyone`."""
    try:
        import fiftyone
    except ImportError as error:
        raise ImportError("fiftyone is not installed; run: pip install fiftyone") from error
    height, width = detections.image_size
    found = []
    for i, (x1, y1, x2, y2) in enumerate(detections.boxes.astype(float).tolist()):
        fields: dict[str, Any] = {
            "label": detections.names[i],
            "bounding_box": [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height],
            "confidence": float(detections.scores[i]),
        }
        if detections.masks is not None:
            left, top, right, bottom = _pixel_box(detections.boxes[i], detections.image_size)
            fields["mask"] = detections.masks[i, top:bottom, left:right].copy()
        found.append(fiftyone.Detection(**fields))
    return fiftyone.Detections(detections=found)


def _pixel_box(box: np.ndarray, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole pixels that a box covers, at least one, inside the picture."""
    height, width = image_size
    left, top = min(max(int(np.floor(box[0])), 0), width - 1), min(max(int(np.floor(box[1])), 0), height - 1)
    return left, top, max(left + 1, min(int(np.ceil(box[2])), width)), max(top + 1, min(int(np.ceil(box[3])), height))


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Outer outlines of a (H, W) bool mask, largest first: (K, 2) x y in pixels, K >= 3; holes are not told."""
    import cv2

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    corner = np.array([columns[0], rows[0]])
    mask = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    # Enlarged, so that the outline runs along the sides of pixels and one pixel has one.
    enlarged = np.kron(mask.astype(np.uint8), np.ones((_ENLARGED, _ENLARGED), np.uint8))
    found, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    found = sorted(found, key=cv2.contourArea, reverse=True)
    shapes = [cv2.approxPolyDP(c, _ENLARGED * _TOLERANCE, True)[:, 0].astype(float) for c in found]
    return [(shape + 0.5) / _ENLARGED + corner - 1 for shape in shapes if len(shape) >= 3]


def to_labelme(detections: Detections, image_path: str) -> dict[str, Any]:
    """See `Detections.to_labelme`."""
    height, width = detections.image_size
    shapes = []
    for i, box in enumerate(detections.boxes.astype(float)):
        parts = [] if detections.masks is None else outlines(detections.masks[i])
        common = {
            "label": detections.names[i],
            # Pieces of one object belong together by their number.
            "group_id": i if len(parts) > 1 else None,
            "description": f"{detections.scores[i]:.3f}",
            "flags": {},
        }
        if not parts:
            shapes.append({**common, "shape_type": "rectangle", "points": box.reshape(2, 2).tolist()})
        shapes += [{**common, "shape_type": "polygon", "points": part.tolist()} for part in parts]
    return {
        "version": _LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def to_yolo(detections: Detections, segments: bool = False, scores: bool = False) -> str:
    """See `Detections.to_yolo`."""
    if segments and detections.masks is None:
        raise ValueError("outlines were asked for, but this detector makes no masks; leave segments off")
    height, width = detections.image_size
    lines = []
    for i, (x1, y1, x2, y2) in enumerate(detections.boxes.astype(float).tolist()):
        numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
        if segments:
            corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])  # of a mask that is empty
            largest = next(iter(outlines(detections.masks[i])), corners)
            numbers = (largest / (width, height)).clip(0, 1).flatten().tolist()
        numbers += [float(detections.scores[i])] if scores else []
        lines.append(" ".join([str(detections.labels[i]), *(f"{value:.6f}" for value in numbers)]))
    return "".join(f"{line}\n" for line in lines)
