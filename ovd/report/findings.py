"""Which word wins on every annotated object, and which detections lie on none: what average precision does not tell.

A word wins on an object when it has the highest score among the detections, of any class, that overlap the object by
an IoU of 0.5 or more. Drawing is in `pictures`.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ovd.evaluation.tables import FREQUENCIES, DetectionTable, GroundTruth, is_member

LEAST_IOU = 0.5
NOWHERE_IOU = 0.1  # a detection that overlaps every object less than this lies on none


@dataclass(frozen=True)
class Findings:
    """Rows are those of the ground truth (G objects) and of the detections (N).

    Attributes:
        winner: (G,) row of the winning detection, -1 where no detection overlaps the object enough.
        nowhere: (N,) whether a detection lies on no object, in a picture where its class was checked.
    """

    ground_truth: GroundTruth
    detections: DetectionTable
    winner: np.ndarray
    nowhere: np.ndarray

    def winning_class(self) -> np.ndarray:
        """(G,) place of the winner's class, -1 without a winner."""
        found = self.winner >= 0
        classes = np.full(len(self.winner), -1, np.int64)
        classes[found] = self.detections.category_ids[self.winner[found]]
        return classes

    def objects(self) -> np.ndarray:
        """Rows of the objects that count, in order: not crowds."""
        return np.flatnonzero(~self.ground_truth.crowd)


@dataclass(frozen=True)
class Confusion:
    """`count` of the `objects` annotated as `truth` were won by `winner`, with this mean score."""

    truth: str
    winner: str
    truth_frequency: str
    winner_frequency: str
    count: int
    objects: int
    score: float


def find(ground_truth: GroundTruth, detections: DetectionTable) -> Findings:
    """Decide the winners, picture by picture.

    Args:
        ground_truth: boxes of `tables.read_lvis`.
        detections: boxes of `tables.read_results`, their ids places in the ground truth's.
    """
    winner = np.full(len(ground_truth.image), -1, np.int64)
    nearest = np.zeros(len(detections))
    order = np.argsort(detections.image_ids, kind="stable")
    starts = np.searchsorted(detections.image_ids[order], np.arange(len(ground_truth.image_ids) + 1))
    by_image = np.argsort(ground_truth.image, kind="stable")
    object_starts = np.searchsorted(ground_truth.image[by_image], np.arange(len(ground_truth.image_ids) + 1))
    for image in range(len(ground_truth.image_ids)):
        rows = order[starts[image] : starts[image + 1]]
        objects = by_image[object_starts[image] : object_starts[image + 1]]
        if not len(rows) or not len(objects):
            continue
        iou = box_iou(detections.boxes[rows], ground_truth.boxes[objects])
        nearest[rows] = iou.max(axis=1)
        scores = np.where(iou >= LEAST_IOU, detections.scores[rows][:, None], -np.inf)
        best = scores.argmax(axis=0)
        won = np.isfinite(scores[best, np.arange(len(objects))])
        winner[objects[won]] = rows[best[won]]
    nowhere = nearest < NOWHERE_IOU
    if ground_truth.checked is not None:
        keys = ground_truth.keys(detections.image_ids, detections.category_ids)
        nowhere &= is_member(keys, ground_truth.checked)
        nowhere &= ~is_member(keys, ground_truth.not_exhaustive)
    return Findings(ground_truth, detections, winner, nowhere)


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU (N, M) of boxes (N, 4) and (M, 4), x, y, width, height in pixels."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    union = a[:, 2:].prod(axis=1)[:, None] + b[:, 2:].prod(axis=1)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def outcomes(findings: Findings) -> dict[str, dict[str, int]]:
    """By frequency of the annotated class: objects, and how many were won by the right word, by another word of each
    frequency, and by none; the last four sum to the first with the keys right, r, c, f, none."""
    truth, classes = findings.ground_truth, findings.winning_class()
    frequencies = truth.frequencies
    table: dict[str, dict[str, int]] = {}
    for frequency in FREQUENCIES:
        rows = findings.objects()
        rows = rows[frequencies[truth.category[rows]] == frequency]
        if not len(rows):
            continue
        right = classes[rows] == truth.category[rows]
        other = rows[~right & (classes[rows] >= 0)]
        table[frequency] = {
            "objects": len(rows),
            "right": int(right.sum()),
            **{f: int((frequencies[classes[other]] == f).sum()) for f in FREQUENCIES},
            "none": int((classes[rows] < 0).sum()),
        }
    return table


def confusions(findings: Findings, limit: int = 25) -> list[Confusion]:
    """The pairs of another word winning, most frequent first, then by mean score; at most `limit`."""
    truth, classes = findings.ground_truth, findings.winning_class()
    rows = findings.objects()
    objects = Counter(truth.category[rows].tolist())
    wrong = rows[(classes[rows] >= 0) & (classes[rows] != truth.category[rows])]
    pairs: dict[tuple[int, int], list[float]] = {}
    for row in wrong:
        pair = (int(truth.category[row]), int(classes[row]))
        pairs.setdefault(pair, []).append(float(findings.detections.scores[findings.winner[row]]))
    found = [
        Confusion(truth.names[t], truth.names[w], str(truth.frequencies[t]), str(truth.frequencies[w]), len(scores),
                  objects[t], float(np.mean(scores)))
        for (t, w), scores in pairs.items()
    ]  # fmt: skip
    return sorted(found, key=lambda c: (-c.count, -c.score, c.truth, c.winner))[:limit]
