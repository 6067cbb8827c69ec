"""What a detector says about one picture: boxes, scores, names and masks, as numpy arrays.

The coordinates are pixels of the original upright picture. Nothing here runs a model; drawing is in
`ovd.visualization`, other tools' formats are in `ovd.conversions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_codec


@dataclass(eq=False)
class Detections:
    """The N detections of one picture.

    Args:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the original upright picture, x1 <= x2 and y1 <= y2.
        scores: (N,) float32.
        labels: (N,) int64, index of the word in the vocabulary.
        names: N strings, the word itself for each detection.
        image_size: (height, width) in pixels.
        masks: (N, height, width) bool, or None when the detector makes no masks.

    Raises:
        ValueError: the lengths or shapes disagree, a value is not finite, or a box is turned inside out.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    image_size: tuple[int, int]
    masks: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.boxes = np.asarray(self.boxes, dtype=np.float32)
        if self.boxes.size == 0:
            self.boxes = self.boxes.reshape(0, 4)
        self.scores = np.asarray(self.scores, dtype=np.float32)
        self.labels = np.asarray(self.labels, dtype=np.int64)
        self.names = list(self.names)
        self.image_size = (int(self.image_size[0]), int(self.image_size[1]))
        if self.masks is not None:
            self.masks = np.asarray(self.masks, dtype=bool)
            if self.masks.size == 0:
                self.masks = self.masks.reshape(len(self.masks), *self.image_size)
        self._check()

    def _check(self) -> None:
        n = len(self.boxes)
        if self.boxes.shape != (n, 4):
            raise ValueError(f"boxes must have shape (N, 4), got {self.boxes.shape}; give x1 y1 x2 y2 per detection")
        for field in ("scores", "labels"):
            shape = getattr(self, field).shape
            if shape != (n,):
                raise ValueError(f"{field} must have shape ({n},) like the {n} boxes, got {shape}; give one per box")
        if len(self.names) != n:
            raise ValueError(f"there are {len(self.names)} names for {n} boxes; give the name of each detection")
        if min(self.image_size) < 1:
            raise ValueError(f"image_size (height, width) is {self.image_size}; both must be at least 1 pixel")
        if self.masks is not None and self.masks.shape != (n, *self.image_size):
            raise ValueError(
                f"masks must have shape {(n, *self.image_size)} (N, height, width), got {self.masks.shape}; "
                "paste them into the original picture first"
            )
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise ValueError("a box or a score is not a finite number; drop such detections before making Detections")
        if (self.boxes[:, :2] > self.boxes[:, 2:]).any():
            worst = self.boxes[(self.boxes[:, :2] > self.boxes[:, 2:]).any(axis=1)][0].tolist()
            raise ValueError(f"box {worst} has x1 > x2 or y1 > y2; boxes are x1 y1 x2 y2, not x y width height")

    @classmethod
    def from_instances(cls, instances: Any, names: Sequence[str] | None = None) -> "Detections":
        """Make Detections of a Detectron2 `Instances` whose boxes are in original pixels.

        Args:
            instances: with `pred_boxes`, `scores`, `pred_classes` and, if there are masks, `pred_masks` (N, H, W).
            names: the vocabulary, indexed by class; None writes the class number as the name.
        """
        instances = instances.to("cpu")
        labels = instances.pred_classes.numpy()
        if names is not None and len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
            raise ValueError(
                f"a detection has class {labels.max()} but the vocabulary has {len(names)} words; "
                "give the vocabulary the detector ran with"
            )
        return cls(
            boxes=instances.pred_boxes.tensor.detach().float().numpy(),
            scores=instances.scores.detach().float().numpy(),
            labels=labels,
            names=[str(label) if names is None else names[label] for label in labels],
            image_size=instances.image_size,
            masks=instances.pred_masks.detach().numpy() if instances.has("pred_masks") else None,
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Any) -> "Detections":
        """Return the detections that an int, a slice, an index array or a (N,) bool array selects."""
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range for {len(self)} detections")
            index = [int(index)]
        elif not isinstance(index, slice):
            index = np.asarray(index)
            if index.dtype == bool and index.shape != (len(self),):
                raise IndexError(f"a bool index needs shape ({len(self)},), got {index.shape}")
            index = index if index.size else index.astype(np.int64)
        rows = np.arange(len(self))[index]
        return Detections(
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            names=[self.names[row] for row in rows],
            image_size=self.image_size,
            masks=None if self.masks is None else self.masks[rows],
        )

    def filter(self, score: float) -> "Detections":
        """Return the detections with at least this score, in their order."""
        return self[self.scores >= score]

    def top(self, k: int) -> "Detections":
        """Return the k best detections, best first; equal scores keep their order.

        Raises:
            ValueError: k is negative.
        """
        if k < 0:
            raise ValueError(f"k is {k}; ask for 0 or more detections")
        return self[np.argsort(-self.scores, kind="stable")[:k]]

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return the COCO and LVIS results form, one dict per detection.

        Args:
            image_id: the picture's id in the ground truth.
            category_ids: category id of each label; None writes the label itself as the category id.

        Returns:
            Dicts with image_id, category_id, bbox (x, y, width, height), score and, if there are masks, segmentation
            (compressed run lengths, `counts` as str so that json can write it).

        Raises:
            ValueError: a label has no entry in `category_ids`.
        """
        if category_ids is not None:
            self.check_labels(len(category_ids))
        labels = self.labels.tolist()
        ids = labels if category_ids is None else [int(category_ids[label]) for label in labels]
        return coco_results(image_id, ids, self.scores, self.boxes, self.image_size, self.run_lengths())

    def check_labels(self, count: int) -> None:
        """Raise a ValueError unless every label is one of `count` category ids' places."""
        if not len(self):
            return
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= count:
            raise ValueError(
                f"labels run from {low} to {high} but there are {count} category ids; "
                "give one id per word of the vocabulary"
            )

    def run_lengths(self) -> list[bytes] | None:
        """Return the N masks as compressed run lengths (pycocotools' `counts`), or None where there are no masks."""
        if self.masks is None:
            return None
        return [mask_codec.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"] for mask in self.masks]

    def plot(self, image: np.ndarray, **options: Any) -> np.ndarray:
        """Return the picture with the detections drawn on it.

        Args:
            image: (height, width, 3) uint8 RGB, the picture the detections belong to.
            options: see `ovd.visualization.draw_detections`.
        """
        from ovd.visualization import draw_detections

        return draw_detections(image, self, **options)

    def to_supervision(self) -> Any:
        """Return `supervision.Detections` with xyxy, confidence, class_id, mask and data["class_name"].

        Raises:
            ImportError: supervision is not installed.
        """
        from ovd.conversions import to_supervision

        return to_supervision(self)

    def to_fiftyone(self) -> Any:
        """Return `fiftyone.Detections`: label, bounding_box (x, y, width, height in 0..1), confidence, mask in the box.

        Raises:
            ImportError: fiftyone is not installed.
        """
        from ovd.conversions import to_fiftyone

        return to_fiftyone(self)

    def to_labelme(self, image_path: str) -> dict[str, Any]:
        """Return the content of a labelme file: polygons where there are masks, rectangles elsewhere.

        Args:
            image_path: of the picture, as labelme is to find it from its own file.
        """
        from ovd.conversions import to_labelme

        return to_labelme(self, image_path)

    def to_yolo(self, segments: bool = False, scores: bool = False) -> str:
        """Return a YOLO label file: a line "class x y width height" (centre, all in 0..1) a detection.

        Args:
            segments: "class x1 y1 x2 y2 …" outlines of the masks instead of boxes.
            scores: add the score to each line, as predictions have it and labels for training do not.

        Raises:
            ValueError: segments were asked for and there are no masks.
        """
        from ovd.conversions import to_yolo

        return to_yolo(self, segments, scores)


def coco_results(
    image_id: int,
    category_ids: Sequence[int],
    scores: np.ndarray,
    boxes: np.ndarray,
    image_size: tuple[int, int],
    run_lengths: Sequence[bytes] | None,
) -> list[dict[str, Any]]:
    """Return `Detections.to_coco`'s form of one picture's columns.

    Args:
        category_ids: N ids.
        scores: (N,).
        boxes: (N, 4) x1 y1 x2 y2 in pixels.
        image_size: (height, width) of the picture in pixels.
        run_lengths: of N masks, see `Detections.run_lengths`.
    """
    corners = boxes.astype(np.float64)  # before the sides are subtracted, so that no digit is lost
    extents = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    rows = zip(category_ids, extents.tolist(), scores.astype(np.float64).tolist(), strict=True)
    results = [{"image_id": int(image_id), "category_id": k, "bbox": box, "score": score} for k, box, score in rows]
    for result, counts in zip(results, run_lengths or (), strict=run_lengths is not None):
        result["segmentation"] = {"size": list(image_size), "counts": counts.decode("ascii")}
    return results
