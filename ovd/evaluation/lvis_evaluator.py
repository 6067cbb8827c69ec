"""LVIS average precision of detections, boxes or masks, also split by the frequency of the class.

Protocol: Gupta, Dollar, Girshick, "LVIS", 2019, section 3 and appendix: per picture at most 300 detections; a detection
of a class that was not checked in that picture is not counted; an unmatched one of a class that is not labelled
exhaustively there is not counted either. Matching and accumulation are faster-coco-eval's; the numbers equal the
lvis package's. COCO's protocol is not here.
"""

import json
import logging
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from faster_coco_eval import COCO, COCOeval_faster

from ovd.detections import Detections
from ovd.evaluation.results import category_table, summary, write_json_atomic
from pretrain.atomic import write_atomically

logger = logging.getLogger(__name__)

IOU_TYPES = ("bbox", "segm")
FREQUENCIES = ("r", "c", "f")  # LVIS: seen in 1-10, 11-100, more than 100 training pictures
NOVEL, BASE = ("r",), ("c", "f")
_AREAS = ("all", "s", "m", "l")  # faster-coco-eval's order: all, below 32^2, 32^2 to 96^2, above, in pixels
_IOU_50, _IOU_75 = 0, 5  # places of 0.50 and 0.75 among the ten thresholds 0.50, 0.55, ..., 0.95
# Classes do not influence one another, and the library keeps an entry per (picture, class): 20,000 LVIS pictures times
# 1,203 classes at once would take several GB.
_CATEGORIES_AT_ONCE = 100


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
    results: str | Path | Sequence[Mapping[str, Any]],
    iou_type: str = "bbox",
    max_dets: int = 300,
) -> dict[str, float]:
    """Return the LVIS metrics of a results list.

    Args:
        ground_truth_json: path of an LVIS annotation file, or its content.
        results: path of a results file, or its content: dicts with image_id, category_id, score, and bbox (x, y,
            width, height in pixels) or segmentation (run lengths). May be empty.
        iou_type: "bbox" or "segm".
        max_dets: detections counted per picture, over all classes.

    Returns:
        Fractions in 0-1, NaN where there is no ground truth to find: AP, AP50, AP75; APs, APm, APl by area;
        APr, APc, APf by frequency; AR@N, ARs@N, ARm@N, ARl@N with N = max_dets; AP_base (common and frequent classes),
        AR@N_base and AR@N_novel (rare classes). Average recall is the mean over classes and thresholds.

    Raises:
        ValueError: the ground truth lacks a field LVIS needs, or a result names an unknown picture or class, lacks a
            field or has an impossible value.
    """
    return evaluate_report(ground_truth_json, results, iou_type, max_dets).metrics


def evaluate_report(
    ground_truth_json: str | Path | Mapping[str, Any],
    results: str | Path | Sequence[Mapping[str, Any]],
    iou_type: str = "bbox",
    max_dets: int = 300,
) -> LVISReport:
    """Return the metrics of `evaluate_results`, same arguments, together with those of every class."""
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type is {iou_type!r}; choose one of {', '.join(IOU_TYPES)}")
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}; it must be at least 1 (LVIS counts 300)")
    ground_truth = _prepare_ground_truth(_read_json(ground_truth_json), iou_type)
    prepared = _prepare_results(_read_json(results), ground_truth, iou_type)
    counted = _only_checked(_limit_per_image(prepared, max_dets), ground_truth)
    precision, recall = _accumulate(ground_truth, counted, iou_type, max_dets)
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    counts = Counter(annotation["category_id"] for annotation in ground_truth["annotations"])
    return LVISReport(
        metrics=_metrics(precision, recall, [category["frequency"] for category in categories], max_dets),
        categories=[
            CategoryResult(
                id=category["id"],
                name=category["name"],
                frequency=category["frequency"],
                num_ground_truth=counts[category["id"]],
                AP=_mean(precision[:, :, k, 0]),
                AP50=_mean(precision[_IOU_50, :, k, 0]),
                AR=_mean(recall[:, k, 0]),
            )
            for k, category in enumerate(categories)
        ],
    )


def _read_json(source: Any) -> Any:
    if not isinstance(source, (str, Path)):
        return source
    with open(source, encoding="utf-8") as file:
        return json.load(file)


def _prepare_ground_truth(source: Mapping[str, Any], iou_type: str) -> dict[str, Any]:
    """Check the fields the protocol reads and return a copy the library may write into."""
    for field in ("images", "categories", "annotations"):
        if field not in source:
            raise ValueError(f"the ground truth has no {field!r}; give an LVIS annotation file")
    if not source["images"] or not source["categories"]:
        raise ValueError("the ground truth has no images or no categories; give an LVIS annotation file that has some")
    for image in source["images"]:
        for field in ("neg_category_ids", "not_exhaustive_category_ids"):
            # Without the list every class that is absent from a picture would go unchecked, and AP would look better.
            if field not in image:
                raise ValueError(
                    f"image {image['id']} of the ground truth has no {field}; LVIS counts only checked classes, "
                    "so list them (every absent class if the picture is labelled exhaustively)"
                )
    for category in source["categories"]:
        if category.get("frequency") not in FREQUENCIES:
            raise ValueError(
                f"category {category['id']} ({category.get('name')}) has frequency {category.get('frequency')!r}; "
                "LVIS needs r, c or f"
            )
    images, names = {i["id"] for i in source["images"]}, {c["id"] for c in source["categories"]}
    annotations = []
    # Ids are counted anew from 1: the matching takes 0 for "no match", and duplicates would hide annotations.
    for number, annotation in enumerate(source["annotations"], start=1):
        if annotation["image_id"] not in images or annotation["category_id"] not in names:
            raise ValueError(
                f"annotation {annotation.get('id', number)} names image {annotation['image_id']} and category "
                f"{annotation['category_id']}, one of which the ground truth does not list"
            )
        if annotation.get("ignore"):
            raise ValueError(f"annotation {annotation.get('id', number)} is marked ignore; LVIS has none, remove it")
        if iou_type == "segm" and not annotation.get("segmentation"):
            raise ValueError(f"annotation {annotation.get('id', number)} has no segmentation; evaluate bbox instead")
        # The protocol has no crowds: the lvis package reads such an annotation as an ordinary one.
        annotations.append({**annotation, "id": number, "iscrowd": 0})
    return {
        "images": [dict(image) for image in source["images"]],
        "categories": [dict(category) for category in source["categories"]],
        "annotations": annotations,
    }


def _prepare_results(
    results: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any], iou_type: str
) -> list[dict[str, Any]]:
    """Check every result and return copies that hold only what this iou_type reads."""
    if isinstance(results, Mapping) or not isinstance(results, Sequence):
        raise ValueError(f"results must be a list of detections, got {type(results).__name__}")
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    # Masks carry no bbox to the library, else it would take the area, and with it s, m or l, from the box.
    key = "bbox" if iou_type == "bbox" else "segmentation"
    prepared = []
    for number, result in enumerate(results):
        missing = [field for field in ("image_id", "category_id", "score", key) if field not in result]
        if missing:
            raise ValueError(f"result {number} has no {missing[0]}; {iou_type} evaluation needs it in every result")
        if result["image_id"] not in sizes:
            raise ValueError(f"result {number} names image {result['image_id']}, which the ground truth does not list")
        if result["category_id"] not in categories:
            raise ValueError(
                f"result {number} names category {result['category_id']}, which the ground truth does not list; "
                "write LVIS category ids, not class indices"
            )
        if not math.isfinite(result["score"]):
            raise ValueError(f"result {number} has score {result['score']}; scores must be finite numbers")
        region = result[key]
        if iou_type == "bbox":
            region = [float(value) for value in region]
            if len(region) != 4 or not all(map(math.isfinite, region)) or min(region[2:]) < 0:
                raise ValueError(f"result {number} has bbox {region}; give finite x, y, width >= 0, height >= 0")
        elif tuple(region["size"]) != sizes[result["image_id"]]:
            raise ValueError(
                f"result {number} has a mask of size {tuple(region['size'])}, but image {result['image_id']} has "
                f"{sizes[result['image_id']]} (height, width); resize masks to the original picture"
            )
        prepared.append(
            {
                "image_id": int(result["image_id"]),
                "category_id": int(result["category_id"]),
                "score": float(result["score"]),
                key: region,
            }
        )
    return prepared


def _limit_per_image(results: list[dict[str, Any]], max_dets: int) -> list[dict[str, Any]]:
    """Keep each picture's best `max_dets` results over all classes; the library limits only within a class."""
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    for image_id, found in by_image.items():
        if len(found) > max_dets:
            by_image[image_id] = sorted(found, key=lambda result: result["score"], reverse=True)[:max_dets]
    return list(chain.from_iterable(by_image.values()))


def _only_checked(results: list[dict[str, Any]], ground_truth: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Drop results of classes that were not checked in the picture: neither labelled there nor listed as absent.

    The library does so too, but fails on masks in a picture of which it keeps nothing else.
    """
    checked = {image["id"]: set(image["neg_category_ids"]) for image in ground_truth["images"]}
    for annotation in ground_truth["annotations"]:
        checked[annotation["image_id"]].add(annotation["category_id"])
    return [result for result in results if result["category_id"] in checked[result["image_id"]]]


def _accumulate(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str, max_dets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, R, K, A) and recall (T, K, A), -1 where a class has no ground truth of that area.

    T = 10 IoU thresholds, R = 101 recall levels, K = classes by id, A = areas all, small, medium, large.
    """
    gt = COCO(ground_truth)
    dt = gt.loadRes(results)
    ids = sorted(category["id"] for category in ground_truth["categories"])
    precision, recall = [], []
    for start in range(0, len(ids), _CATEGORIES_AT_ONCE):
        evaluation = COCOeval_faster(gt, dt, iou_type, lvis_style=True, print_function=logger.debug)
        evaluation.params.maxDets = [max_dets]
        evaluation.params.catIds = ids[start : start + _CATEGORIES_AT_ONCE]
        evaluation.evaluate()
        evaluation.accumulate()
        precision.append(evaluation.eval["precision"][..., 0])
        recall.append(evaluation.eval["recall"][..., 0])
    return np.concatenate(precision, axis=2), np.concatenate(recall, axis=1)


def _mean(values: np.ndarray) -> float:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else float("nan")


def _metrics(precision: np.ndarray, recall: np.ndarray, frequencies: list[str], max_dets: int) -> dict[str, float]:
    places = {f: [k for k, frequency in enumerate(frequencies) if frequency == f] for f in FREQUENCIES}
    base = [k for f in BASE for k in places[f]]
    novel = [k for f in NOVEL for k in places[f]]
    metrics = {
        "AP": _mean(precision[..., 0]),
        "AP50": _mean(precision[_IOU_50, :, :, 0]),
        "AP75": _mean(precision[_IOU_75, :, :, 0]),
    }
    metrics |= {f"AP{area}": _mean(precision[..., a]) for a, area in enumerate(_AREAS) if a}
    metrics |= {f"AP{f}": _mean(precision[:, :, places[f], 0]) for f in FREQUENCIES}
    metrics[f"AR@{max_dets}"] = _mean(recall[..., 0])
    metrics |= {f"AR{area}@{max_dets}": _mean(recall[..., a]) for a, area in enumerate(_AREAS) if a}
    metrics["AP_base"] = _mean(precision[:, :, base, 0])
    metrics[f"AR@{max_dets}_base"] = _mean(recall[:, base, 0])
    metrics[f"AR@{max_dets}_novel"] = _mean(recall[:, novel, 0])
    return metrics


class OpenVocabularyEvaluator(DatasetEvaluator):
    """Collect a detector's outputs and measure them by LVIS, for Detectron2's `inference_on_dataset`.

    `process` takes inputs with "image_id" and outputs with "instances" (`pred_boxes` in pixels of the original picture,
    `scores`, `pred_classes`, perhaps `pred_masks` (N, H, W)). `evaluate` returns {"bbox": metrics} and, when there are
    masks, "segm", and writes into the output folder detections.json, metrics.json and summary.md.

    Args:
        ground_truth_json: LVIS annotation file, or its content.
        output_dir: folder for the three files; None writes nothing.
        max_dets: detections counted per picture.
        class_ids: category id of each class index; None takes the ground truth's ids in ascending order.
    """

    def __init__(
        self,
        ground_truth_json: str | Path | Mapping[str, Any],
        output_dir: str | Path | None,
        max_dets: int = 300,
        *,
        class_ids: Sequence[int] | None = None,
    ) -> None:
        self.ground_truth = _read_json(ground_truth_json)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.max_dets = max_dets
        known = sorted(category["id"] for category in self.ground_truth["categories"])
        self.class_ids = known if class_ids is None else list(class_ids)
        unknown = sorted(set(self.class_ids) - set(known))
        if unknown:
            raise ValueError(f"class_ids names category {unknown[0]}, which the ground truth does not list")
        self.reset()

    def reset(self) -> None:
        """Forget what was collected."""
        self._results: list[dict[str, Any]] = []
        self._seen: set[int] = set()
        self._has_masks = False

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Collect one batch; see the class for the keys."""
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            self._results += Detections.from_instances(instances).to_coco(image["image_id"], self.class_ids)
            self._has_masks |= instances.has("pred_masks")
            self._seen.add(image["image_id"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather from all processes, measure, write the files; return {} on every process but the first."""
        gathered = comm.gather((self._results, self._seen, self._has_masks), dst=0)
        if not comm.is_main_process():
            return {}
        results = list(chain.from_iterable(part[0] for part in gathered))
        missing = {image["id"] for image in self.ground_truth["images"]} - set().union(*(part[1] for part in gathered))
        if missing:
            # Their objects count as missed, so the numbers are lower than the detector deserves.
            total = len(self.ground_truth["images"])
            logger.warning("%d of %d pictures of the ground truth were never shown", len(missing), total)
        tasks = IOU_TYPES if any(part[2] for part in gathered) else ("bbox",)
        reports = {task: evaluate_report(self.ground_truth, results, task, self.max_dets) for task in tasks}
        metrics = OrderedDict((task, report.metrics) for task, report in reports.items())
        if self.output_dir is not None:
            self._write(results, reports, metrics)
        return metrics

    def _write(self, results: list[dict], reports: dict[str, LVISReport], metrics: dict[str, dict[str, float]]) -> None:
        columns = ("AP", "AP50", "AP75", "APr", "APc", "APf", f"AR@{self.max_dets}")
        text = summary(metrics, "LVIS average precision (percent)", columns)
        for task, report in reports.items():
            text += f"\n### Classes, {task}\n\n{category_table(report.categories)}"
        classes = {task: [asdict(category) for category in report.categories] for task, report in reports.items()}
        write_json_atomic(self.output_dir / "detections.json", results)
        write_json_atomic(self.output_dir / "metrics.json", {"metrics": metrics, "categories": classes})
        write_atomically(self.output_dir / "summary.md", text)
        logger.info("wrote detections.json, metrics.json and summary.md to %s", self.output_dir)
