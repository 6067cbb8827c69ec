"""COCO average precision of detections, also of base and novel classes apart (OV-COCO; Zareian et al. 2021).

Protocol: Lin et al. 2014 as in pycocotools: per picture and class at most 100 detections, every picture labelled
exhaustively, crowds neither found nor missed. Which classes are base is an argument; LVIS is in `lvis_evaluator`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ovd.evaluation.average_precision import accumulate, mean
from ovd.evaluation.lvis_evaluator import Results
from ovd.evaluation.matching import AREA_NAMES, match
from ovd.evaluation.tables import IOU_TYPES, best_per, read_coco, read_json, read_results


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
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type is {iou_type!r}; choose one of {', '.join(IOU_TYPES)}")
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}; it must be at least 1 (COCO counts 100)")
    if not is_base:
        raise ValueError("is_base names no category; name the base and the novel ones")
    content = read_json(ground_truth_json)
    every = read_coco(content, iou_type, [category["id"] for category in content["categories"]])
    table = read_results(results, every, iou_type)
    kept = best_per(every.keys(table.image_ids, table.category_ids), table.scores, max_dets)
    ground_truth = read_coco(content, iou_type, list(is_base))
    place = np.searchsorted(every.category_ids, ground_truth.category_ids)
    kept &= np.isin(table.category_ids, place)
    table = table.take(kept)
    table = replace(table, category_ids=np.searchsorted(place, table.category_ids))
    scores = accumulate(match(ground_truth, table))
    base = np.asarray([bool(is_base[int(k)]) for k in ground_truth.category_ids])
    return _metrics(scores.precision, scores.recall, base, max_dets)


def _metrics(precision: np.ndarray, recall: np.ndarray, base: np.ndarray, max_dets: int) -> dict[str, float]:
    metrics = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, :, 0]), "AP75": mean(precision[5, :, 0])}
    metrics |= {f"AP{area}": mean(precision[..., a]) for a, area in enumerate(AREA_NAMES) if a}
    metrics[f"AR@{max_dets}"] = mean(recall[..., 0])
    metrics |= {f"AR{area}@{max_dets}": mean(recall[..., a]) for a, area in enumerate(AREA_NAMES) if a}
    for name, members in (("base", base), ("novel", ~base)):
        metrics[f"AP_{name}"] = mean(precision[:, members, 0])
        metrics[f"AP50_{name}"] = mean(precision[0, members, 0])
        metrics[f"AR@{max_dets}_{name}"] = mean(recall[:, members, 0])
    return metrics
