"""Collect a detector's outputs as columns, in one process or many: 24 bytes a detection, and its mask's run lengths.

As dictionaries a detection takes 0.4 kB, with a mask 0.9 kB: 5 GB for the 19,809 pictures of LVIS val. What the columns
hold is what the detector gave, float32, so the results form and the metrics made of them are those of `to_coco`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.utils import comm

from ovd.detections import Detections, coco_results
from ovd.evaluation.packed_masks import PackedMasks
from ovd.evaluation.tables import DetectionTable

# Sent at once from each other process, for what is under way to stay small: 30 MB of masks at 300 a picture.
_PICTURES_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class PictureColumns:
    """The N detections of one picture.

    boxes (N, 4) float32 x1 y1 x2 y2 in pixels; scores (N,) float32; labels (N,) int32; image_size (height, width);
    text: run lengths of all masks, one after another, or None; lengths (N,) int32 the bytes of each, or None.
    """

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    image_size: tuple[int, int]
    text: bytes | None
    lengths: np.ndarray | None

    @classmethod
    def of(cls, image_id: int, detections: Detections) -> "PictureColumns":
        """Copy what is kept of a picture's detections, so that the detector's own memory can go."""
        codes = detections.run_lengths()
        return cls(
            image_id=int(image_id),
            boxes=np.array(detections.boxes, np.float32),
            scores=np.array(detections.scores, np.float32),
            labels=np.array(detections.labels, np.int32),
            image_size=detections.image_size,
            text=None if codes is None else b"".join(codes),
            lengths=None if codes is None else np.asarray([len(code) for code in codes], np.int32),
        )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns, without the few hundred that the picture's Python objects take."""
        masks = 0 if self.text is None else len(self.text) + self.lengths.nbytes
        return self.boxes.nbytes + self.scores.nbytes + self.labels.nbytes + masks

    def to_coco(self, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the picture's detections as `Detections.to_coco` does."""
        codes = None
        if self.text is not None:
            ends = np.cumsum(self.lengths).tolist()
            codes = [self.text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        ids = [int(category_ids[label]) for label in self.labels.tolist()]
        return coco_results(self.image_id, ids, self.scores, self.boxes, self.image_size, codes)


class DetectionColumns:
    """The detections of a data set, picture by picture, in the order they came.

    Args:
        category_ids: category id of each label.
    """

    def __init__(self, category_ids: Sequence[int], pictures: Sequence[PictureColumns] = ()) -> None:
        self.category_ids = list(category_ids)
        self.pictures = list(pictures)

    def add(self, image_id: int, detections: Detections) -> None:
        """Keep a picture's detections.

        Raises:
            ValueError: a label has no entry in `category_ids`.
        """
        detections.check_labels(len(self.category_ids))
        self.pictures.append(PictureColumns.of(image_id, detections))

    def __len__(self) -> int:
        """Return the number of detections."""
        return sum(map(len, self.pictures))

    @property
    def nbytes(self) -> int:
        """Bytes of all columns; see `PictureColumns.nbytes`."""
        return sum(picture.nbytes for picture in self.pictures)

    @property
    def has_masks(self) -> bool:
        """Whether masks came with any picture."""
        return any(picture.text is not None for picture in self.pictures)

    def gathered(self) -> "DetectionColumns | None":
        """Return those of all processes, by rank, on the first process and None on the others; every process calls."""
        rounds = -(-max(comm.all_gather(len(self.pictures))) // _PICTURES_AT_ONCE)
        parts: list[list[PictureColumns]] = [[] for _ in range(comm.get_world_size())]
        for first in range(0, rounds * _PICTURES_AT_ONCE, _PICTURES_AT_ONCE):
            # The first process has its own already: sent, they would be copied.
            mine = [] if comm.is_main_process() else self.pictures[first : first + _PICTURES_AT_ONCE]
            for part, piece in zip(parts, comm.gather(mine, dst=0), strict=False):
                part += piece
        if not comm.is_main_process():
            return None
        parts[0] = self.pictures
        return DetectionColumns(self.category_ids, [picture for part in parts for picture in part])

    def results(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the results form picture by picture."""
        return (picture.to_coco(self.category_ids) for picture in self.pictures)

    def table(self) -> DetectionTable:
        """Return what evaluation reads: 56 bytes a detection, masks shared with the pictures; masks None unless every
        picture with detections has them."""
        counts = [len(picture) for picture in self.pictures]
        boxes = np.concatenate([np.zeros((0, 4)), *(p.boxes for p in self.pictures)], dtype=np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        labels = np.concatenate([np.zeros(0, np.int32), *(p.labels for p in self.pictures)])
        scores = np.concatenate([np.zeros(0), *(p.scores for p in self.pictures)], dtype=np.float64)
        all_masks = self.has_masks and all(p.text is not None for p in self.pictures if len(p))
        return DetectionTable(
            image_ids=np.repeat(np.asarray([p.image_id for p in self.pictures], np.int64), counts),
            category_ids=np.asarray(self.category_ids, np.int64)[labels],
            scores=scores,
            boxes=boxes,
            masks=self._masks(counts) if all_masks else None,
        )

    def _masks(self, counts: Sequence[int]) -> PackedMasks:
        lengths = [np.zeros(0, np.int32) if p.lengths is None else p.lengths for p in self.pictures]
        starts = [np.cumsum(length, dtype=np.int64) - length for length in lengths]
        return PackedMasks(
            texts=[p.text or b"" for p in self.pictures],
            sizes=np.asarray([p.image_size for p in self.pictures], np.int64).reshape(-1, 2),
            picture=np.repeat(np.arange(len(self.pictures), dtype=np.int32), counts),
            start=np.concatenate([np.zeros(0, np.int64), *starts]),
            length=np.concatenate([np.zeros(0, np.int32), *lengths]),
        )
