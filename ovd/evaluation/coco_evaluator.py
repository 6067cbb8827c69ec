"""COCO average precision of detections, also of base and novel classes apart (OV-COCO; Zareian et al. 2021).

Protocol: Lin et al. 2014 as in pycocotools: per picture and class at most 100 detections, every picture labelled
exhaustively, crowds neither found nor missed. Which classes are base is an argument; LVIS is in `lvis_evaluator`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ovd.evaluation.average_precision import ClassScores, accumulate, mean
from ovd.evaluation.bootstrap import Interval
from ovd.evaluation.collecting import CollectingEvaluator, TaskResult
from ovd.evaluation.lvis_evaluator import Results, category_results, metric_intervals
from ovd.evaluation.matching import AREA_NAMES, Matches, match
from ovd.evaluation.results import summary
from ovd.evaluation.tables import (
    IOU_TYPES,
    DetectionTable,
    GroundTruth,
    best_per,
    only_categories,
    read_coco,
    read_results,
)


def evaluate_coco_results(
    ground_truth_json: str | Path | Mapping[str, Any],
    results: Results,
    is_base: Mapping[int, bool],
    iou_type: str = "bbox",
    max_dets: int = 100,
) -> dict[str, float]:
    """Return the COCO metrics of a results list.

    Args:
        ground_truth_json: path of a COCO annotation file, or its content.
        results: path of a results file, its content or a `DetectionTable`; may be empty.
        is_base: category id -> whether it is a base class. Other categories are not measured: their annotations are
            left out, and so are results that name them. OV-COCO measures its 48 base and 17 novel classes together.
        iou_type: "bbox" or "segm".
        max_dets: detections counted per picture and class.

    Returns:
        Fractions in 0-1, NaN where there is no ground truth: AP, AP50, AP75, APs, APm, APl; AR@N, ARs@N, ARm@N, ARl@N
        with N = max_dets; and AP, AP50 and AR@N of each part as AP_base, AP50_base, AR@N_base, AP_novel, ….

    Raises:
        ValueError: a field is missing or impossible, a result names an unknown picture or class, or no class is named.
    """
    _, base, matches = coco_matches(ground_truth_json, results, is_base, iou_type, max_dets)
    return _metrics(accumulate(matches), base, max_dets)


def evaluate_coco_intervals(
    ground_truth_json: str | Path | Mapping[str, Any],
    results: Results,
    is_base: Mapping[int, bool],
    iou_type: str = "bbox",
    max_dets: int = 100,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return AP, AP50 and AR@N of all, base and novel classes with 95 % intervals over pictures.

    Args:
        ground_truth_json, results, is_base, iou_type, max_dets: as of `evaluate_coco_results`.
        samples: resamples of the pictures.

    Returns:
        The keys of `evaluate_coco_results` (AP, AP50_novel, AR@100_base, …) -> `Interval`.
    """
    _, base, matches = coco_matches(ground_truth_json, results, is_base, iou_type, max_dets)
    return metric_intervals(matches, _groups(base), max_dets, samples, seed)


def coco_matches(
    ground_truth_json: str | Path | Mapping[str, Any],
    results: Results,
    is_base: Mapping[int, bool],
    iou_type: str = "bbox",
    max_dets: int = 100,
) -> tuple[GroundTruth, np.ndarray, Matches]:
    """Read, limit and match once, for whatever is to be computed from the matches.

    Returns:
        The annotations of the K classes of `is_base`, which of them are base (K,), the matches.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type is {iou_type!r}; choose one of {', '.join(IOU_TYPES)}")
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}; it must be at least 1 (COCO counts 100)")
    if not is_base:
        raise ValueError("is_base names no category; name the base and the novel ones")
    every = read_coco(ground_truth_json, iou_type)  # of all classes: a result may name any
    table = read_results(results, every, iou_type)
    kept = best_per(every.keys(table.image_ids, table.category_ids), table.scores, max_dets)
    ground_truth = only_categories(every, is_base)
    place = np.searchsorted(every.category_ids, ground_truth.category_ids)
    kept &= np.isin(table.category_ids, place)
    table = table.take(kept)
    table = replace(table, category_ids=np.searchsorted(place, table.category_ids))
    base = np.asarray([bool(is_base[int(k)]) for k in ground_truth.category_ids])
    return ground_truth, base, match(ground_truth, table)


def _groups(base: np.ndarray) -> dict[str, np.ndarray]:
    return {"": np.ones(len(base), bool), "base": base, "novel": ~base}


def _metrics(scores: ClassScores, base: np.ndarray, max_dets: int) -> dict[str, float]:
    precision, recall = scores.precision, scores.recall
    metrics = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, :, 0]), "AP75": mean(precision[5, :, 0])}
    metrics |= {f"AP{area}": mean(precision[..., a]) for a, area in enumerate(AREA_NAMES) if a}
    metrics[f"AR@{max_dets}"] = mean(recall[..., 0])
    metrics |= {f"AR{area}@{max_dets}": mean(recall[..., a]) for a, area in enumerate(AREA_NAMES) if a}
    for name, members in (("base", base), ("novel", ~base)):
        metrics[f"AP_{name}"] = mean(precision[:, members, 0])
        metrics[f"AP50_{name}"] = mean(precision[0, members, 0])
        metrics[f"AR@{max_dets}_{name}"] = mean(recall[:, members, 0])
    return metrics


class CocoEvaluator(CollectingEvaluator):
    """Collect a detector's outputs and measure them by COCO, for Detectron2's `inference_on_dataset`.

    What goes in, what comes back and the files are `CollectingEvaluator`'s.

    Args:
        ground_truth_json: COCO annotation file, or its content.
        output_dir: folder for the three files; None writes nothing.
        is_base: category id -> whether it is a base class; see `evaluate_coco_results`.
        max_dets: detections counted per picture and class.
        class_ids: category id of each class index; None takes the ground truth's ids in ascending order.
        samples: resamples of the pictures for the intervals in metrics.json and summary.md; 0 leaves intervals out.
    """

    protocol = "coco"

    def __init__(
        self,
        ground_truth_json: str | Path | Mapping[str, Any],
        output_dir: str | Path | None,
        is_base: Mapping[int, bool],
        max_dets: int = 100,
        *,
        class_ids: Sequence[int] | None = None,
        samples: int = 0,
    ) -> None:
        super().__init__(ground_truth_json, output_dir, class_ids, samples)
        self.is_base, self.max_dets = dict(is_base), max_dets

    def measure(self, detections: DetectionTable, task: str) -> TaskResult:
        """Measure all detections by COCO; `task` is "bbox" or "segm"."""
        ground_truth, base, matches = coco_matches(self.ground_truth, detections, self.is_base, task, self.max_dets)
        scores = accumulate(matches)
        intervals = {}
        if self.samples:
            intervals = metric_intervals(matches, _groups(base), self.max_dets, self.samples, seed=0)
        return TaskResult(_metrics(scores, base, self.max_dets), category_results(ground_truth, scores), intervals)

    def headline(self, metrics: Mapping[str, Mapping[str, float]]) -> str:
        """Return the table of AP and AP50 of base and novel classes."""
        columns = ("AP", "AP50", "AP75", "AP50_base", "AP50_novel", "AP_base", "AP_novel", f"AR@{self.max_dets}")
        return summary(metrics, "COCO average precision (percent)", columns)
