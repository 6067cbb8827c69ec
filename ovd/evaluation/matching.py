"""Pair detections with objects, greedily by score, for all IoU thresholds and object sizes at once.

The rule is pycocotools' and lvis' (Lin et al. 2014; Gupta et al. 2019): within a picture and class detections choose in
the order of their scores; each takes, among the objects that no better detection has taken, the one of highest IoU,
objects outside the size range last. One bit stands for one (threshold, size range), so a step is a few integer
operations over the k-th detections of all pictures and classes together. Precision is not computed here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_codec

from ovd.evaluation.tables import DetectionTable, GroundTruth, is_member, places

THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREA_NAMES = ("all", "s", "m", "l")
AREA_LIMITS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))  # square pixels, both ends included
_NUM_AREAS = len(AREA_NAMES)
_EVERY_THRESHOLD = np.uint64(sum(1 << (t * _NUM_AREAS) for t in range(len(THRESHOLDS))))
# Bits of the thresholds that an IoU passes, by their number: thresholds ascend, so the first n of them.
_PASSED = np.asarray([(1 << (n * _NUM_AREAS)) - 1 for n in range(len(THRESHOLDS) + 1)], np.uint64)
_PAIRS_AT_ONCE = 1_000_000  # of boxes compared; bounds the memory at about 100 MB


def bit(threshold: int, area: int) -> np.uint64:
    """Return the place of the bit of a threshold and a size range, both by their number."""
    return np.uint64(threshold * _NUM_AREAS + area)


@dataclass(frozen=True)
class Matches:
    """What every later number is computed from; N detections sorted by class, falling score, picture.

    image, category (N,): places. countable (N,): bits of the size ranges in which a detection without an object is a
    false alarm. event (M,): ascending rows of the detections that overlap some object; true, ignored (M,): bits at
    which such a detection found an object, found one that does not count. object_image, object_category (G,),
    object_counts (G,): bits of the size ranges in which an object counts. found (G,): bits at which it was taken.
    """

    num_images: int
    num_categories: int
    image: np.ndarray
    category: np.ndarray
    countable: np.ndarray
    event: np.ndarray
    true: np.ndarray
    ignored: np.ndarray
    object_image: np.ndarray
    object_category: np.ndarray
    object_counts: np.ndarray
    found: np.ndarray


def match(ground_truth: GroundTruth, detections: DetectionTable) -> Matches:
    """Match detections (ids already places, see `tables.read_results`) with objects; detections of pictures and
    classes that were not checked are left out."""
    if ground_truth.checked is not None:
        keys = ground_truth.keys(detections.image_ids, detections.category_ids)
        detections = detections.take(is_member(keys, ground_truth.checked))
    # Equal scores: lower picture first, then as given, as the reference packages' stable sorts leave them.
    order = np.lexsort((detections.image_ids, -detections.scores, detections.category_ids))
    detections = detections.take(order)
    keys = ground_truth.keys(detections.image_ids, detections.category_ids)

    object_keys = ground_truth.keys(ground_truth.image, ground_truth.category)
    by_group = np.argsort(object_keys, kind="stable")
    groups, start, count = np.unique(object_keys[by_group], return_index=True, return_counts=True)
    group = places(keys, groups) if len(groups) else np.full(len(keys), -1)

    counts = _area_bits(ground_truth.area)
    counts[ground_truth.crowd] = 0
    objects = _Objects(by_group, start, count, counts)
    pairs = _box_pairs if detections.masks is None else _mask_pairs
    row, column, iou = pairs(detections, group, ground_truth, objects)
    event, true, ignored, found = _choose(row, column, iou, group, counts, ground_truth.crowd)

    areas = detections.boxes[:, 2] * detections.boxes[:, 3] if detections.masks is None else _mask_areas(detections)
    countable = _area_bits(areas)
    if ground_truth.not_exhaustive is not None:
        countable[is_member(keys, ground_truth.not_exhaustive)] = 0
    return Matches(
        num_images=len(ground_truth.image_ids),
        num_categories=len(ground_truth.category_ids),
        image=detections.image_ids.astype(np.int32),
        category=detections.category_ids.astype(np.int32),
        countable=countable,
        event=event,
        true=true,
        ignored=ignored,
        object_image=ground_truth.image,
        object_category=ground_truth.category,
        object_counts=counts,
        found=found,
    )


@dataclass(frozen=True)
class _Objects:
    """Objects by group (picture and class): group g has rows order[start[g] : start[g] + count[g]]."""

    order: np.ndarray
    start: np.ndarray
    count: np.ndarray
    counts: np.ndarray


def _area_bits(area: np.ndarray) -> np.ndarray:
    bits = np.zeros(len(area), np.uint8)
    for place, (low, high) in enumerate(AREA_LIMITS):
        bits |= ((area >= low) & (area <= high)).astype(np.uint8) << np.uint8(place)
    return bits


def _mask_areas(detections: DetectionTable) -> np.ndarray:
    # One by one: pycocotools 2.0.11 fails on an empty list and, under numpy 2, on one of more than 255.
    return np.asarray([mask_codec.area(mask) for mask in detections.masks], np.float64)


def _box_pairs(
    detections: DetectionTable, group: np.ndarray, ground_truth: GroundTruth, objects: _Objects
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row, object, IoU) of every pair in one group whose IoU reaches the lowest threshold."""
    rows = np.flatnonzero(group >= 0)
    parts = []
    for chunk in _chunks(rows, objects.count[group[rows]]):
        of_row = group[chunk]
        repeats = objects.count[of_row]
        row = np.repeat(chunk, repeats)
        inside = np.arange(len(row)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        column = objects.order[np.repeat(objects.start[of_row], repeats) + inside]
        iou = _box_iou(detections.boxes[row], ground_truth.boxes[column], ground_truth.crowd[column])
        near = iou >= THRESHOLDS[0]
        parts.append((row[near], column[near], iou[near]))
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _chunks(rows: np.ndarray, repeats: np.ndarray) -> Iterator[np.ndarray]:
    ends = np.cumsum(repeats)
    first = 0
    while first < len(rows):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        yield rows[first:last]
        first = last


def _box_iou(a: np.ndarray, b: np.ndarray, b_is_crowd: np.ndarray) -> np.ndarray:
    """IoU of boxes (P, 4) x, y, width, height in the order of operations of pycocotools, so equal to the last bit.

    Of a crowd only the detection's own area counts as union.
    """
    (ax, ay, aw, ah), (bx, by, bw, bh) = a.T, b.T
    width = np.minimum(aw + ax, bw + bx) - np.maximum(ax, bx)
    height = np.minimum(ah + ay, bh + by) - np.maximum(ay, by)
    shared = width * height
    union = np.where(b_is_crowd, aw * ah, aw * ah + bw * bh - shared)
    overlap = (width > 0) & (height > 0)
    return np.divide(shared, union, out=np.zeros(len(a)), where=overlap)


def _mask_pairs(
    detections: DetectionTable, group: np.ndarray, ground_truth: GroundTruth, objects: _Objects
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = np.flatnonzero(group >= 0)
    rows = rows[np.argsort(group[rows], kind="stable")]
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for members in np.split(rows, np.flatnonzero(np.diff(group[rows])) + 1) if len(rows) else []:
        g = group[members[0]]
        columns = objects.order[objects.start[g] : objects.start[g] + objects.count[g]]
        iou = mask_codec.iou(
            [detections.masks[i] for i in members],
            [ground_truth.masks[i] for i in columns],
            ground_truth.crowd[columns].astype(np.uint8),
        )
        near = np.nonzero(iou >= THRESHOLDS[0])
        parts.append((members[near[0]], columns[near[1]], iou[near]))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _choose(
    row: np.ndarray, column: np.ndarray, iou: np.ndarray, group: np.ndarray, counts: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Let detections choose objects; return event rows, bits of true and of ignored matches, and objects' taken bits.

    The k-th detections of all groups choose together: groups share no objects, so no two want the same one.
    """
    # A detection's objects from best to worst; of equal IoUs the reference packages take the last object.
    preference = np.lexsort((-column, -iou, row))
    row, column = row[preference], column[preference]
    passed = _PASSED[np.searchsorted(THRESHOLDS, iou[preference], side="right")]
    event, first, size = np.unique(row, return_index=True, return_counts=True)
    counted = counts.astype(np.uint64) * _EVERY_THRESHOLD
    taken = np.zeros(len(counts), np.uint64)
    true, ignored = np.zeros(len(event), np.uint64), np.zeros(len(event), np.uint64)
    for chosen in _rounds(group[event], size):
        need = np.full(len(chosen), _PASSED[-1])
        for result, wants_counted in ((true, True), (ignored, False)):
            bits = np.zeros(len(chosen), np.uint64)
            for rank in range(int(size[chosen[0]])):
                some = slice(0, int(np.searchsorted(-size[chosen], -rank, side="left")))
                pair = first[chosen[some]] + rank
                place = column[pair]
                free = np.where(crowd[place], _PASSED[-1], ~taken[place])
                kind = counted[place] if wants_counted else ~counted[place]
                new = need[some] & passed[pair] & free & kind
                taken[place] |= new
                need[some] &= ~new
                bits[some] |= new
            result[chosen] = bits
    return event, true, ignored, taken


def _rounds(group: np.ndarray, size: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the first event of every group, then the second of every group that has one, and so on; each round sorted
    by falling number of objects to choose from."""
    by_group = np.argsort(group, kind="stable")
    new = np.flatnonzero(np.diff(group[by_group], prepend=-2))
    position = np.empty(len(group), np.int64)
    position[by_group] = np.arange(len(group)) - np.repeat(new, np.diff(np.append(new, len(group))))
    order = np.lexsort((-size, position))
    yield from np.split(order, np.flatnonzero(np.diff(position[order])) + 1) if len(order) else []
