"""How much memory a data set's detections take while they are collected, written and measured, as columns and as the
results form (a dictionary a detection). Counted by tracemalloc, so that a run repeats to the byte; what pycocotools
allocates in C for the masks of one picture is not in it.
"""

import platform
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovd.detections import Detections
from ovd.evaluation.benchmark import SIZE, EvaluationBenchmark, make_detections, make_ground_truth
from ovd.evaluation.columns import DetectionColumns
from ovd.evaluation.lvis_evaluator import evaluate_results
from ovd.evaluation.results import text_table, write_json_atomic, write_json_list_atomic

_LVIS_VAL = 19_809  # pictures


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one form: held after collecting; added at the peak while writing detections.json, while measuring."""

    name: str
    held: int
    writing: int
    measuring: int


def pictures(
    benchmark: EvaluationBenchmark, ground_truth: dict[str, Any], masks: bool
) -> Iterator[tuple[int, Detections]]:
    """Yield (image id, `Detections`) with the boxes of `make_detections`.

    Masks are ellipses with a wavy edge in the first picture's boxes, the same in every picture.
    """
    columns = make_detections(benchmark, ground_truth)
    shape = (benchmark.images, benchmark.detections)
    boxes = columns["boxes"].reshape(*shape, 4)
    corners = np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)
    scores, labels = columns["scores"].reshape(shape), columns["category_ids"].reshape(shape) - 1
    shapes = _wavy_ellipses(boxes[0]) if masks else None
    names = [""] * benchmark.detections
    for number in range(benchmark.images):
        yield number + 1, Detections(corners[number], scores[number], labels[number], names, (SIZE, SIZE), shapes)


def _wavy_ellipses(boxes: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE]
    wave = 0.15 * np.sin(x / 7) * np.cos(y / 9)
    masks = np.zeros((len(boxes), SIZE, SIZE), bool)
    for mask, (left, top, width, height) in zip(masks, boxes, strict=True):
        across, down = (2 * (x - left) - width) / width, (2 * (y - top) - height) / height
        mask[...] = across**2 + down**2 + wave < 1
    return masks


def with_masks(ground_truth: dict[str, Any]) -> dict[str, Any]:
    """Return the annotations with each box as its polygon."""
    annotations = []
    for annotation in ground_truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotations.append({**annotation, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
    return {**ground_truth, "annotations": annotations}


def run(benchmark: EvaluationBenchmark, masks: bool, with_list: bool) -> list[MemoryUse]:
    """Measure the columns and (unless left out) the list of dictionaries, on the same detections."""
    ground_truth = make_ground_truth(benchmark)
    ids = [category["id"] for category in ground_truth["categories"]]
    tasks = ("bbox", "segm") if masks else ("bbox",)
    if masks:
        ground_truth = with_masks(ground_truth)

    def collect_columns() -> DetectionColumns:
        found = DetectionColumns(ids)
        for image_id, detections in pictures(benchmark, ground_truth, masks):
            found.add(image_id, detections)
        return found

    def measure_columns(found: DetectionColumns) -> list[dict[str, float]]:
        table = found.table()
        return [evaluate_results(ground_truth, table, task) for task in tasks]

    def collect_list() -> list[dict[str, Any]]:
        found = []
        for image_id, detections in pictures(benchmark, ground_truth, masks):
            found += detections.to_coco(image_id, ids)
        return found

    def measure_list(found: list[dict[str, Any]]) -> list[dict[str, float]]:
        return [evaluate_results(ground_truth, found, task) for task in tasks]

    done = [
        _measure("columns", collect_columns, lambda path, f: write_json_list_atomic(path, f.results()), measure_columns)
    ]
    if with_list:
        done.append(_measure("dictionaries", collect_list, write_json_atomic, measure_list))
    return done


def _measure(
    name: str,
    collect: Callable[[], Any],
    write: Callable[[Path, Any], Any],
    measure: Callable[[Any], Any],
) -> MemoryUse:
    tracemalloc.start()
    try:
        found = collect()
        held = tracemalloc.get_traced_memory()[0]
        with tempfile.TemporaryDirectory() as folder:
            writing = _added(lambda: write(Path(folder) / "detections.json", found))
        return MemoryUse(name, held, writing, _added(lambda: measure(found)))
    finally:
        tracemalloc.stop()


def _added(work: Callable[[], Any]) -> int:
    """Bytes that were in use at the peak beyond those before."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    work()
    return tracemalloc.get_traced_memory()[1] - before


def to_markdown(benchmark: EvaluationBenchmark, masks: bool, uses: list[MemoryUse]) -> str:
    """Return the table: bytes a detection, and megabytes at the peaks."""
    count = benchmark.images * benchmark.detections
    size = f"{benchmark.images:,} pictures x {benchmark.detections}, {'boxes and masks' if masks else 'boxes'}"
    head = [size, "bytes held a detection", "held, MB", "writing adds, MB", "measuring adds, MB"]
    head.append(f"held at {_LVIS_VAL:,} pictures, GB")
    body = [
        [use.name, f"{use.held / count:.0f}", *(f"{b / 1e6:.1f}" for b in (use.held, use.writing, use.measuring)),
         f"{use.held / benchmark.images * _LVIS_VAL / 1e9:.2f}"]
        for use in uses
    ]  # fmt: skip
    about = f"Python {platform.python_version()}, numpy {np.__version__}, seed {benchmark.seed}"
    return f"{about}\n\n{text_table(head, body)}"
