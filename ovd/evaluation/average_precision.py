"""Average precision and recall per class from matches, also with pictures counted several times or not at all.

Precision is the highest at a recall or above, read at recalls 0, 0.01, …, 1 (Lin et al. 2014), as in pycocotools and
lvis. Means over classes, names of metrics and confidence intervals are not computed here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovd.evaluation.matching import AREA_NAMES, THRESHOLDS, Matches, bit

_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class ClassScores:
    """Average precision and recall (T, K, A) by IoU threshold, class and size range; NaN where no object counts."""

    precision: np.ndarray
    recall: np.ndarray


def accumulate(
    matches: Matches, image_weights: np.ndarray | None = None, areas: Sequence[int] = tuple(range(len(AREA_NAMES)))
) -> ClassScores:
    """Return average precision and recall of every class.

    Args:
        image_weights: (I,) whole number of times each picture counts, None: once. The result is that of a data set with
            so many copies of the picture: where a picture counts w times its detections follow one another, and of w
            detections that hit, the last has the highest precision.
        areas: numbers of the size ranges to measure.
    """
    shape = (len(THRESHOLDS), matches.num_categories, len(areas))
    precision, recall = np.full(shape, np.nan), np.full(shape, np.nan)
    weight = None if image_weights is None else image_weights.astype(np.int64)[matches.image]
    object_weight = None if image_weights is None else image_weights[matches.object_image]
    class_start = np.searchsorted(matches.category, np.arange(matches.num_categories + 1))
    for place, area in enumerate(areas):
        counts = (matches.object_counts >> np.uint8(area)) & np.uint8(1)
        counts = counts if object_weight is None else counts * object_weight
        num_objects = np.bincount(matches.object_category, weights=counts, minlength=matches.num_categories)
        has = np.flatnonzero(num_objects)
        countable = (matches.countable >> np.uint8(area)) & np.uint8(1)
        base = _Base(matches, class_start, countable.astype(bool), weight)
        needed = _hits_needed(num_objects[has])
        for t in range(len(THRESHOLDS)):
            average, hits = base.average_precision(t, area, has, needed)
            precision[t, has, place] = average
            recall[t, has, place] = hits / num_objects[has]
    return ClassScores(precision, recall)


def mean(values: np.ndarray) -> float:
    """Return the mean of what could be measured, NaN where nothing could."""
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if measured.size else float("nan")


def _hits_needed(num_objects: np.ndarray) -> np.ndarray:
    """Return (classes, 101) the least number of hits, at least 1, whose share of the objects reaches each recall."""
    n = num_objects[:, None]
    needed = np.ceil(_RECALLS * n)
    # The rounding of the division decides, as in the reference packages, which compare hits / n with the recall.
    needed = np.where((needed - 1) / n >= _RECALLS, needed - 1, needed)
    needed = np.where(needed / n < _RECALLS, needed + 1, needed)
    return np.maximum(needed, 1).astype(np.int64)


class _Base:
    """Of one size range: how many detections count up to each one that overlaps an object, if none were matched."""

    def __init__(self, matches: Matches, class_start: np.ndarray, countable: np.ndarray, weight: np.ndarray | None):
        self.matches = matches
        self.weight = None if weight is None else weight[matches.event]
        running = np.cumsum(countable if weight is None else countable * weight, dtype=np.int64)
        before = np.concatenate([[0], running])[class_start]
        self.category = matches.category[matches.event]
        self.countable = countable[matches.event]
        self.counted = running[matches.event] - before[self.category]
        self.class_start = np.searchsorted(self.category, np.arange(matches.num_categories + 1))

    def average_precision(
        self, t: int, area: int, classes: np.ndarray, needed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return average precision and number of hits of each of the classes at one threshold; `needed`: their hits for
        each recall."""
        place, one = bit(t, area), np.uint64(1)
        true = ((self.matches.true >> place) & one).astype(bool)
        ignored = ((self.matches.ignored >> place) & one).astype(bool)
        # A match makes a detection count, or not count, whatever its own size and the completeness of the labels.
        change = (true & ~self.countable).astype(np.int64) - (ignored & self.countable)
        change = np.cumsum(change if self.weight is None else change * self.weight)
        before = np.concatenate([[0], change])[self.class_start]
        rows = np.flatnonzero(true if self.weight is None else true & (self.weight > 0))
        category = self.category[rows]
        running = np.cumsum(np.ones(len(rows), np.int64) if self.weight is None else self.weight[rows])
        num_classes = self.matches.num_categories
        edges = np.concatenate([[0], running])[np.searchsorted(category, np.arange(num_classes + 1))]
        hits = np.diff(edges)[classes]
        counted = self.counted[rows] + change[rows] - before[category]
        precision = (running - edges[category]) / (counted + np.spacing(1))
        # Running maximum from the right within each class: later-visited classes stand 2 higher than all before.
        shift = 2.0 * (num_classes - category)
        best = np.maximum.accumulate((precision + shift)[::-1])[::-1] - shift
        best = np.append(best, 0.0)  # a recall that is never reached has precision 0
        average = np.zeros(len(classes))
        some = np.flatnonzero(hits)
        reached = needed[some] <= hits[some, None]
        position = np.searchsorted(running, edges[classes[some], None] + needed[some])
        average[some] = best[np.where(reached, position, len(rows))].mean(axis=1)
        return average, hits
