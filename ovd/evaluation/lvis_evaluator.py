"""LVIS average precision of detections, boxes or masks, also split by the frequency of the class.

Protocol: Gupta, Dollar, Girshick, "LVIS", 2019, section 3 and appendix: per picture at most 300 detections; a detection
of a class that was not checked in that picture is not counted; an unmatched one of a class that is not labelled
exhaustively there is not counted either. Fixed AP: Dave et al., "Evaluating Large-Vocabulary Object Detectors", 2021.
Matching is `matching`'s, accumulation `average_precision`'s; the numbers equal the lvis package's. COCO's protocol is
in `coco_evaluator`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovd.evaluation.average_precision import ClassScores, accumulate, mean
from ovd.evaluation.bootstrap import Interval, bootstrap, interval
from ovd.evaluation.collecting import CollectingEvaluator, TaskResult
from ovd.evaluation.matching import AREA_NAMES, Matches, match
from ovd.evaluation.results import summary
from ovd.evaluation.tables import (
    FREQUENCIES,
    IOU_TYPES,
    DetectionTable,
    GroundTruth,
    best_per,
    read_lvis,
    read_results,
)

BASE, NOVEL = ("c", "f"), ("r",)
FIXED_AP_DETECTIONS = 10_000  # per class over the data set (Dave et al., section 5)
_IOU_50, _IOU_75 = 0, 5  # places of 0.50 and 0.75 among the ten thresholds 0.50, 0.55, ..., 0.95
Results = str | Path | Sequence[Mapping[str, Any]] | DetectionTable


@dataclass(frozen=True)
class CategoryResult:
    """What was measured for one class; AP, AP50 and AR in 0-1, NaN without ground truth."""

    id: int
    name: str
    frequency: str
    num_ground_truth: int
    AP: float
    AP50: float
    AR: float


@dataclass(frozen=True)
class LVISReport:
    """Metrics over all classes, and the classes one by one in the order of their ids."""

    metrics: dict[str, float]
    categories: list[CategoryResult]


def evaluate_results(
    ground_truth_json: str | Path | Mapping[str, Any],
    results: Results,
    iou_type: str = "bbox",
    max_dets: int = 300,
) -> dict[str, float]:
    """Return the LVIS metrics of a results list.

    Args:
        ground_truth_json: path of an LVIS annotation file, or its content.
        results: path of a results file, its content (dicts with image_id, category_id, score, and bbox (x, y, width,
            height in pixels) or segmentation (run lengths)), or a `DetectionTable`. May be empty.
        iou_type: "bbox" or "segm".
        max_dets: detections counted per picture, over all classes.

    Returns:
        Fractions in 0-1, NaN where there is no ground truth to find: AP, AP50, AP75; APs, APm, APl by area;
        APr, APc, APf by frequency; with N = max_dets AR@N, ARs@N, ARm@N, ARl@N, ARr@N, ARc@N, ARf@N; and of the base
        (common and frequent) and novel (rare) classes AP_base, AP50_base, AR@N_base, AP_novel, AP50_novel, AR@N_novel.
        Average recall is the mean over classes and thresholds.

    Raises:
        ValueError: the ground truth lacks a field LVIS needs, or a result names an unknown picture or class, lacks a
            field or has an impossible value.
    """
    return evaluate_report(ground_truth_json, results, iou_type, max_dets).metrics


def evaluate_fixed_ap(
    ground_truth_json: str | Path | Mapping[str, Any],
    results: Results,
    iou_type: str = "bbox",
    max_dets_per_class: int = FIXED_AP_DETECTIONS,
) -> dict[str, float]:
    """Return the metrics of `evaluate_results` with the best `max_dets_per_class` detections of each class over all
    pictures counted instead of 300 of each picture, so that no class displaces another (recall: AR@10000)."""
    ground_truth, matches = lvis_matches(ground_truth_json, results, iou_type, max_dets_per_class, per_class=True)
    return _metrics(accumulate(matches), ground_truth.frequencies, max_dets_per_class)


def evaluate_report(
    ground_truth_json: str | Path | Mapping[str, Any],
    results: Results,
    iou_type: str = "bbox",
    max_dets: int = 300,
) -> LVISReport:
    """Return the metrics of `evaluate_results`, same arguments, together with those of every class."""
    return _report(*lvis_matches(ground_truth_json, results, iou_type, max_dets), max_dets)


def evaluate_intervals(
    ground_truth_json: str | Path | Mapping[str, Any],
    results: Results,
    iou_type: str = "bbox",
    max_dets: int = 300,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return AP, AP50 and AR of all, base, novel and each frequency's classes with 95 % intervals over pictures.

    Args:
        ground_truth_json, results, iou_type, max_dets: as of `evaluate_results`.
        samples: resamples of the pictures.

    Returns:
        The keys of `evaluate_results` (AP, APr, AP50_novel, AR@300_base, …) -> `Interval`.
    """
    return _intervals(*lvis_matches(ground_truth_json, results, iou_type, max_dets), max_dets, samples, seed)


def _intervals(
    ground_truth: GroundTruth, matches: Matches, max_dets: int, samples: int, seed: int
) -> dict[str, Interval]:
    groups = {"": np.ones(len(ground_truth.names), bool), **class_groups(ground_truth.frequencies)}
    return metric_intervals(matches, groups, max_dets, samples, seed)


def metric_intervals(
    matches: Matches, groups: Mapping[str, np.ndarray], max_dets: int, samples: int, seed: int
) -> dict[str, Interval]:
    """Return the intervals of AP, AP50 and AR of groups of classes (name -> (K,) boolean) by `metric_name`."""
    return {
        metric_name(metric, group, max_dets if metric == "AR" else None): interval(values[0], least=0.0)
        for (group, metric), values in bootstrap([matches], groups, samples, seed).items()
    }


def _report(ground_truth: GroundTruth, matches: Matches, max_dets: int) -> LVISReport:
    scores = accumulate(matches)
    metrics = _metrics(scores, ground_truth.frequencies, max_dets)
    return LVISReport(metrics, category_results(ground_truth, scores))


def category_results(ground_truth: GroundTruth, scores: ClassScores) -> list[CategoryResult]:
    """Return each class's result, in the order of their ids."""
    counts = np.bincount(ground_truth.category, minlength=len(ground_truth.names))
    return [
        CategoryResult(
            id=int(ground_truth.category_ids[k]),
            name=name,
            frequency=str(ground_truth.frequencies[k]),
            num_ground_truth=int(counts[k]),
            AP=mean(scores.precision[:, k, 0]),
            AP50=mean(scores.precision[_IOU_50, k, 0]),
            AR=mean(scores.recall[:, k, 0]),
        )
        for k, name in enumerate(ground_truth.names)
    ]


def lvis_matches(
    ground_truth_json: str | Path | Mapping[str, Any],
    results: Results,
    iou_type: str = "bbox",
    max_dets: int = 300,
    per_class: bool = False,
) -> tuple[GroundTruth, Matches]:
    """Read, limit and match once, for whatever is to be computed from the matches.

    Args:
        max_dets: detections counted per picture or, with `per_class`, per class over all pictures.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type is {iou_type!r}; choose one of {', '.join(IOU_TYPES)}")
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}; it must be at least 1 (LVIS counts 300)")
    ground_truth = read_lvis(ground_truth_json, iou_type)
    table = read_results(results, ground_truth, iou_type)
    # Before detections of unchecked classes are dropped, as the lvis package does.
    kept = best_per(table.category_ids if per_class else table.image_ids, table.scores, max_dets)
    return ground_truth, match(ground_truth, table if kept.all() else table.take(kept))


def class_groups(frequencies: np.ndarray) -> dict[str, np.ndarray]:
    """Return which classes (K,) belong to each of r, c, f, base and novel."""
    groups = {f: frequencies == f for f in FREQUENCIES}
    return groups | {"base": np.isin(frequencies, BASE), "novel": np.isin(frequencies, NOVEL)}


def metric_name(metric: str, group: str, limit: int | None = None) -> str:
    """Return the key of a metric of a group: AP, APr, AP_base; with a limit AR@300, ARr@300, AR@300_base."""
    at = "" if limit is None else f"@{limit}"
    return f"{metric}{group}{at}" if len(group) < 2 else f"{metric}{at}_{group}"


def _metrics(scores: ClassScores, frequencies: np.ndarray, max_dets: int) -> dict[str, float]:
    precision, recall = scores.precision, scores.recall
    groups = class_groups(frequencies)
    metrics = {
        "AP": mean(precision[..., 0]),
        "AP50": mean(precision[_IOU_50, :, 0]),
        "AP75": mean(precision[_IOU_75, :, 0]),
    }
    metrics |= {f"AP{area}": mean(precision[..., a]) for a, area in enumerate(AREA_NAMES) if a}
    for a, area in enumerate(AREA_NAMES):
        metrics[metric_name("AR", area if a else "", max_dets)] = mean(recall[..., a])
    for name, members in groups.items():
        metrics[metric_name("AP", name)] = mean(precision[:, members, 0])
        metrics[metric_name("AR", name, max_dets)] = mean(recall[:, members, 0])
    for name in ("base", "novel"):
        metrics[f"AP50_{name}"] = mean(precision[_IOU_50, groups[name], 0])
    return metrics


class OpenVocabularyEvaluator(CollectingEvaluator):
    """Collect a detector's outputs and measure them by LVIS, for Detectron2's `inference_on_dataset`.

    What goes in, what comes back and the files are `CollectingEvaluator`'s.

    Args:
        ground_truth_json: LVIS annotation file, or its content.
        output_dir: folder for the three files; None writes nothing.
        max_dets: detections counted per picture.
        class_ids: category id of each class index; None takes the ground truth's ids in ascending order.
        samples: resamples of the pictures for the intervals in metrics.json and summary.md; 0 leaves intervals out.
        fixed_ap: also measure AP_fixed, APr_fixed, … (`evaluate_fixed_ap`); give it a detector that keeps more than
            `max_dets` detections per picture, else it only counts what is left of them.
    """

    protocol = "lvis"

    def __init__(
        self,
        ground_truth_json: str | Path | Mapping[str, Any],
        output_dir: str | Path | None,
        max_dets: int = 300,
        *,
        class_ids: Sequence[int] | None = None,
        samples: int = 0,
        fixed_ap: bool = False,
    ) -> None:
        super().__init__(ground_truth_json, output_dir, class_ids, samples)
        self.max_dets, self.fixed_ap = max_dets, fixed_ap

    def measure(self, detections: DetectionTable, task: str) -> TaskResult:
        """Measure all detections by LVIS; `task` is "bbox" or "segm"."""
        matched = lvis_matches(self.ground_truth, detections, task, self.max_dets)
        report = _report(*matched, self.max_dets)
        intervals = _intervals(*matched, self.max_dets, self.samples, seed=0) if self.samples else {}
        if self.fixed_ap:
            fixed = evaluate_fixed_ap(self.ground_truth, detections, task)
            report.metrics.update({f"{name}_fixed": fixed[name] for name in ("AP", "APr", "APc", "APf")})
        return TaskResult(report.metrics, report.categories, intervals)

    def headline(self, metrics: Mapping[str, Mapping[str, float]]) -> str:
        """Return the tables of AP by frequency."""
        columns = ("AP", "AP50", "AP75", "APr", "APc", "APf", f"AR@{self.max_dets}")
        text = summary(metrics, "LVIS average precision (percent)", columns)
        if self.fixed_ap:
            columns = ("AP_fixed", "APr_fixed", "APc_fixed", "APf_fixed")
            text += "\n" + summary(metrics, f"Fixed AP ({FIXED_AP_DETECTIONS:,} a class, percent)", columns)
        return text
