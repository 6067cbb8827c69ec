"""What the evaluators of all protocols share: collect outputs, gather them, write the three files.

The numbers are made by `lvis_evaluator` and `coco_evaluator`.
"""

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detectron2.evaluation import DatasetEvaluator

from ovd.detections import Detections
from ovd.evaluation.bootstrap import Interval, intervals_table
from ovd.evaluation.columns import DetectionColumns
from ovd.evaluation.results import category_table, write_json_atomic, write_json_list_atomic
from ovd.evaluation.tables import IOU_TYPES, DetectionTable, read_json
from pretrain.atomic import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """What was measured for boxes or for masks: metrics in 0-1, `lvis_evaluator.CategoryResult` of every class, and
    intervals, empty where none were asked for."""

    metrics: dict[str, float]
    categories: Sequence[Any]
    intervals: Mapping[str, Interval] = field(default_factory=dict)


class CollectingEvaluator(DatasetEvaluator, ABC):
    """Collect a detector's outputs and measure them, for Detectron2's `inference_on_dataset`.

    `process` takes inputs with "image_id" and outputs with "instances" (`pred_boxes` in pixels of the original picture,
    `scores`, `pred_classes`, perhaps `pred_masks` (N, H, W)). `evaluate` returns {"bbox": metrics}, and "segm"
    where detections and ground truth have masks; it writes detections.json, metrics.json and summary.md into the output
    folder. The detections are kept as columns (`DetectionColumns`).

    Args:
        ground_truth_json: annotation file of the protocol, or its content.
        output_dir: folder for the three files; None writes nothing.
        class_ids: category id of each class index; None takes the ground truth's ids in ascending order.
        samples: resamples of the pictures for the intervals in metrics.json and summary.md; 0 leaves intervals out.
    """

    protocol: str  # as metrics.json names it

    def __init__(
        self,
        ground_truth_json: str | Path | Mapping[str, Any],
        output_dir: str | Path | None,
        class_ids: Sequence[int] | None,
        samples: int,
    ) -> None:
        self.ground_truth = read_json(ground_truth_json)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.samples = samples
        known = sorted(category["id"] for category in self.ground_truth["categories"])
        self.class_ids = known if class_ids is None else list(class_ids)
        unknown = sorted(set(self.class_ids) - set(known))
        if unknown:
            raise ValueError(f"class_ids names category {unknown[0]}, which the ground truth does not list")
        self.reset()

    @abstractmethod
    def measure(self, detections: DetectionTable, task: str) -> TaskResult:
        """Measure all detections; `task` is "bbox" or "segm"."""

    @abstractmethod
    def headline(self, metrics: Mapping[str, Mapping[str, float]]) -> str:
        """Return the first tables of summary.md, of the metrics by task."""

    def reset(self) -> None:
        """Forget what was collected."""
        self._columns = DetectionColumns(self.class_ids)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Collect one batch; see the class for the keys."""
        for image, output in zip(inputs, outputs, strict=True):
            self._columns.add(image["image_id"], Detections.from_instances(output["instances"]))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather from all processes, measure, write the files; return {} on every process but the first."""
        found = self._columns.gathered()
        if found is None:
            return {}
        self._warn_of_unseen(found)
        tasks = IOU_TYPES if found.has_masks and self._masks_are_given() else ("bbox",)
        table = found.table()
        measured = {task: self.measure(table, task) for task in tasks}
        metrics = OrderedDict((task, result.metrics) for task, result in measured.items())
        if self.output_dir is not None:
            self._write(found, measured, metrics)
        return metrics

    def _warn_of_unseen(self, found: DetectionColumns) -> None:
        known = {image["id"] for image in self.ground_truth["images"]}
        missing = known.difference(picture.image_id for picture in found.pictures)
        if missing:
            # Their objects count as missed, so the numbers are lower than the detector deserves.
            logger.warning("%d of %d pictures of the ground truth were never shown", len(missing), len(known))

    def _masks_are_given(self) -> bool:
        """Whether every annotation has a mask to compare with."""
        bare = sum(not a.get("segmentation") for a in self.ground_truth["annotations"])
        if bare:
            total = len(self.ground_truth["annotations"])
            logger.warning("%d of %d annotations have no mask: only boxes are measured", bare, total)
        return not bare

    def _write(
        self, found: DetectionColumns, measured: Mapping[str, TaskResult], metrics: Mapping[str, dict[str, float]]
    ) -> None:
        intervals = {task: result.intervals for task, result in measured.items() if result.intervals}
        text = self.headline(metrics)
        for task, of_task in intervals.items():
            text += f"\n### Intervals over {self.samples} resamples, {task}\n\n{intervals_table(of_task)}"
        for task, result in measured.items():
            text += f"\n### Classes, {task}\n\n{category_table(result.categories)}"
        classes = {task: [asdict(category) for category in result.categories] for task, result in measured.items()}
        content = {"protocol": self.protocol, "metrics": metrics, "categories": classes}
        if intervals:
            content["intervals"] = {t: {k: asdict(v) for k, v in some.items()} for t, some in intervals.items()}
        write_json_list_atomic(self.output_dir / "detections.json", found.results())
        write_json_atomic(self.output_dir / "metrics.json", content)
        write_atomically(self.output_dir / "summary.md", text)
        logger.info("wrote detections.json, metrics.json and summary.md to %s", self.output_dir)
