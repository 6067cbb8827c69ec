"""Recall of class-agnostic proposals, by the frequency of the object's class: are novel objects proposed?

Every annotated object counts, also in pictures without proposals, and once, whatever its class (so it is a mean over
objects, not over classes as `lvis_evaluator`'s AR). Proposals choose objects greedily by score as detections do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ovd.evaluation.lvis_evaluator import class_groups, metric_name
from ovd.evaluation.matching import AREA_NAMES, THRESHOLDS, bit, match
from ovd.evaluation.tables import DetectionTable, best_per, places, read_lvis

LIMITS = (100, 300, 1000)


def proposal_recall(
    ground_truth_json: str | Path | Mapping[str, Any],
    proposals: Mapping[int, tuple[np.ndarray, np.ndarray]],
    limits: Sequence[int] = LIMITS,
) -> dict[str, float]:
    """Return the average recall of the best proposals of each picture.

    Args:
        ground_truth_json: path of an LVIS annotation file, or its content.
        proposals: image id -> boxes (P, 4) x1, y1, x2, y2 in pixels of the original picture, and their scores (P,).
            Pictures may be absent.
        limits: numbers of proposals per picture.

    Returns:
        Fractions in 0-1, the mean over the IoU thresholds 0.50, 0.55, …, 0.95, for each limit N: AR@N; ARs@N, ARm@N,
        ARl@N by the object's area; ARr@N, ARc@N, ARf@N by its class's frequency; AR@N_base, AR@N_novel. NaN where
        there is no object.

    Raises:
        ValueError: a picture that the ground truth does not list, a score or a box that is not finite or is inside out.
    """
    if not limits or min(limits) < 1:
        raise ValueError(f"limits is {list(limits)}; give numbers of proposals of at least 1")
    ground_truth = read_lvis(ground_truth_json, "bbox")
    table = _proposal_table(proposals, ground_truth.image_ids)
    # One class for all: an object may be found by any proposal.
    agnostic = replace(
        ground_truth,
        category_ids=np.zeros(1, np.int64),
        names=[""],
        category=np.zeros_like(ground_truth.category),
        checked=None,
        not_exhaustive=None,
    )
    frequencies = ground_truth.frequencies[ground_truth.category]
    metrics = {}
    for limit in limits:
        matches = match(agnostic, table.take(best_per(table.image_ids, table.scores, limit)))
        for area, name in enumerate(AREA_NAMES):
            counts = (matches.object_counts >> np.uint8(area)) & np.uint8(1) > 0
            metrics[metric_name("AR", name if area else "", limit)] = _recall(matches.found, counts, area)
        for name, members in class_groups(frequencies).items():
            metrics[metric_name("AR", name, limit)] = _recall(matches.found, members, 0)
    return metrics


def _recall(found: np.ndarray, members: np.ndarray, area: int) -> float:
    if not members.any():
        return float("nan")
    hits = [((found[members] >> bit(t, area)) & np.uint64(1)).mean() for t in range(len(THRESHOLDS))]
    return float(np.mean(hits))


def _proposal_table(proposals: Mapping[int, tuple[np.ndarray, np.ndarray]], image_ids: np.ndarray) -> DetectionTable:
    images, boxes, scores = [np.zeros(0, np.int64)], [np.zeros((0, 4))], [np.zeros(0)]
    for image_id, (corners, score) in proposals.items():
        corners = np.asarray(corners, np.float64).reshape(-1, 4)
        score = np.asarray(score, np.float64).reshape(-1)
        if places(np.asarray([image_id]), image_ids)[0] < 0:
            raise ValueError(f"proposals name image {image_id}, which the ground truth does not list")
        if len(corners) != len(score):
            raise ValueError(f"image {image_id} has {len(corners)} boxes and {len(score)} scores; give one for each")
        sides = corners[:, 2:] - corners[:, :2]
        if not (np.isfinite(corners).all() and np.isfinite(score).all() and (sides >= 0).all()):
            raise ValueError(f"image {image_id} has a proposal that is not finite or has x2 < x1 or y2 < y1")
        images.append(np.full(len(score), image_id, np.int64))
        boxes.append(np.hstack([corners[:, :2], sides]))
        scores.append(score)
    place = places(np.concatenate(images), image_ids)
    return DetectionTable(place, np.zeros_like(place), np.concatenate(scores), np.concatenate(boxes))
