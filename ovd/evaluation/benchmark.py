"""How long LVIS box evaluation takes beside the lvis package: generated pictures, objects and detections, same numbers.

Masks are not timed: both spend their time in pycocotools' mask overlaps there. Memory is `benchmark_memory`'s.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 640  # pixels a side
# Per picture about what LVIS has (Gupta et al. 2019): 12 objects of 4 classes. The 8 listed absent ones are a choice.
_OBJECTS, _CLASSES_PRESENT, _CLASSES_ABSENT = 12, 4, 8
SHARED_METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300", "ARs@300", "ARm@300", "ARl@300",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluationBenchmark:
    """A generated data set: pictures, detections per picture, classes, seed."""

    images: int = 20_000
    detections: int = 300
    classes: int = 1203
    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """One run: wall and CPU seconds, memory it added at its peak in GB (NaN where not known), and the metrics."""

    name: str
    wall: float
    cpu: float
    memory: float
    metrics: dict[str, float]


def make_ground_truth(benchmark: EvaluationBenchmark) -> dict[str, Any]:
    """Return LVIS annotations: boxes of 10 to 300 px, classes by a 1/rank law, some classes not exhaustive."""
    random = np.random.default_rng(benchmark.seed)
    chance = 1 / np.arange(1, benchmark.classes + 1)
    wanted = min(_CLASSES_PRESENT + _CLASSES_ABSENT, benchmark.classes)
    images, annotations = [], []
    for number in range(1, benchmark.images + 1):
        # The least of exponential times of these rates: a weighted draw without replacement.
        drawn = np.argpartition(-np.log(random.random(benchmark.classes)) / chance, wanted - 1)[:wanted] + 1
        present, absent = drawn[:_CLASSES_PRESENT], drawn[_CLASSES_PRESENT:]
        open_ended = present[:1].tolist() if random.random() < 0.2 else []
        images.append(
            {"id": number, "height": SIZE, "width": SIZE, "neg_category_ids": absent.tolist()}
            | {"not_exhaustive_category_ids": open_ended}
        )
        extent = np.exp(random.uniform(np.log(10), np.log(300), (_OBJECTS, 2)))
        corner = random.random((_OBJECTS, 2)) * (SIZE - extent)
        for category, box in zip(random.choice(present, _OBJECTS), np.hstack([corner, extent]).tolist(), strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": int(category), "bbox": box}
                | {"area": box[2] * box[3], "segmentation": []}
            )
    # Thirds of the classes; the most drawn are the frequent ones.
    letters = np.repeat(["f", "c", "r"], -(-benchmark.classes // 3))[: benchmark.classes]
    categories = [{"id": k, "name": f"class {k}", "frequency": str(f)} for k, f in enumerate(letters, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_detections(benchmark: EvaluationBenchmark, ground_truth: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return columns image_ids, category_ids, scores and boxes: of each picture's detections a third lie near objects
    with their class, a third anywhere with a checked class, a third anywhere with any class."""
    random = np.random.default_rng(benchmark.seed + 1)
    boxes = np.asarray([a["bbox"] for a in ground_truth["annotations"]]).reshape(benchmark.images, _OBJECTS, 4)
    labels = np.asarray([a["category_id"] for a in ground_truth["annotations"]]).reshape(benchmark.images, _OBJECTS)
    absent = np.asarray([image["neg_category_ids"] for image in ground_truth["images"]], np.int64)
    checked = np.concatenate([labels, absent], axis=1)
    shape = (benchmark.images, benchmark.detections)
    near, known = benchmark.detections // 3, 2 * benchmark.detections // 3
    category_ids = random.integers(1, benchmark.classes + 1, shape)
    picked = random.integers(0, _OBJECTS, (benchmark.images, near))
    category_ids[:, :near] = np.take_along_axis(labels, picked, axis=1)
    picked_checked = random.integers(0, checked.shape[1], (benchmark.images, known - near))
    category_ids[:, near:known] = np.take_along_axis(checked, picked_checked, axis=1)
    found = np.empty((*shape, 4))
    found[..., 2:] = np.exp(random.uniform(np.log(10), np.log(300), (*shape, 2)))
    found[..., :2] = random.random((*shape, 2)) * (SIZE - found[..., 2:])
    aimed = np.take_along_axis(boxes, picked[..., None], axis=1)
    shift = random.normal(0, 0.1, aimed.shape)
    aimed[..., :2] += shift[..., :2] * aimed[..., 2:]
    aimed[..., 2:] *= np.exp(shift[..., 2:])
    found[:, :near] = aimed
    return {
        "image_ids": np.repeat(np.arange(1, benchmark.images + 1), benchmark.detections),
        "category_ids": category_ids.ravel(),
        "scores": random.random(shape).round(4).ravel(),
        "boxes": found.reshape(-1, 4),
    }


def as_list(columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return the columns as a results list."""
    rows = zip(*(columns[name].tolist() for name in ("image_ids", "category_ids", "scores", "boxes")), strict=True)
    return [{"image_id": i, "category_id": c, "score": s, "bbox": b} for i, c, s, b in rows]


def measure(name: str, work: Callable[[], dict[str, float]]) -> Measurement:
    """Run once; memory is the highest resident size during the run beyond that before it."""
    before = _reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Measurement(name, wall, cpu, (_resident("VmHWM") - before) / 2**20, metrics)


def _resident(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next((float(line.split()[1]) for line in lines if line.startswith(field)), float("nan"))


def _reset_peak() -> float:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak restarts at the present size
    except OSError:
        return float("nan")
    return _resident("VmRSS")


def load_with_lvis(ground_truth: dict[str, Any]) -> Any:
    """Return the lvis package's form of annotations, which it reads from a file only."""
    from lvis import LVIS

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "ground_truth.json"
        path.write_text(json.dumps(ground_truth), encoding="utf-8")
        return LVIS(str(path))


def evaluate_with_lvis(loaded: Any, results: list[dict[str, Any]]) -> dict[str, float]:
    """Return the lvis package's metrics of annotations it has loaded; it writes into the results."""
    if not hasattr(np, "float"):
        np.float = float  # lvis 0.5.3 uses the name that numpy dropped
    from lvis import LVISEval, LVISResults

    evaluation = LVISEval(loaded, LVISResults(loaded, results), "bbox")
    evaluation.run()
    return {key: float(value) for key, value in evaluation.get_results().items()}


def run(benchmark: EvaluationBenchmark, with_lvis: bool, with_list: bool) -> list[Measurement]:
    """Measure this project from columns, from a list (unless left out), and the lvis package (likewise)."""
    from ovd.evaluation.lvis_evaluator import evaluate_results
    from ovd.evaluation.tables import DetectionTable

    ground_truth = make_ground_truth(benchmark)
    columns = make_detections(benchmark, ground_truth)
    table = DetectionTable(**columns)
    done = [measure("this project, columns", lambda: evaluate_results(ground_truth, table))]
    if with_list or with_lvis:
        results = as_list(columns)
        done.append(measure("this project, list of dictionaries", lambda: evaluate_results(ground_truth, results)))
    if with_lvis:
        loaded = load_with_lvis(ground_truth)
        done.append(measure("lvis, same list", lambda: evaluate_with_lvis(loaded, results)))
    return done


def to_markdown(benchmark: EvaluationBenchmark, measurements: list[Measurement]) -> str:
    """Return the table, the ratios and the largest difference between the metrics."""
    from ovd.evaluation.results import text_table

    head = [f"{benchmark.images:,} pictures x {benchmark.detections}, {benchmark.classes:,} classes"]
    head += ["wall, s", "CPU, s", "memory added, GB", "AP, %"]
    body = [
        [m.name, f"{m.wall:.1f}", f"{m.cpu:.1f}", f"{m.memory:.2f}", f"{100 * m.metrics['AP']:.3f}"]
        for m in measurements
    ]  # fmt: skip
    text = (
        f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, seed {benchmark.seed}\n\n"
    )
    text += text_table(head, body)
    if measurements[-1].name.startswith("lvis"):
        own, other = measurements[-2:]
        apart = max(abs(own.metrics[k] - other.metrics[k]) for k in SHARED_METRICS if other.metrics[k] > -1)
        text += (
            f"\nlvis takes {other.wall / own.wall:.1f} times the wall time, {other.cpu / own.cpu:.1f} times the CPU "
        )
        text += f"time (same list); largest difference of the {len(SHARED_METRICS)} metrics: {apart:.1g}\n"
    return text


def add_evaluation_command(commands: argparse._SubParsersAction) -> None:
    """Options of `evaluation`; importing this file imports neither torch nor Detectron2."""
    parser = commands.add_parser("evaluation", help="LVIS box evaluation beside the lvis package")
    parser.add_argument("--images", type=int, default=20_000, help="generated pictures; LVIS val has 19,809")
    parser.add_argument("--detections", type=int, default=300, help="of each picture")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-lvis-api", action="store_true", help="measure this project only")
    parser.add_argument("--skip-list", action="store_true", help="and not from a list either, which takes 4 GB itself")
    parser.add_argument("--memory", choices=["boxes", "masks"], help="instead: what collected detections take")
    parser.set_defaults(run=run_evaluation)


def run_evaluation(options: argparse.Namespace) -> None:
    """Generate, measure, print the table."""
    from pretrain.config import ConfigError

    smallest = {"images": 1, "detections": 3, "classes": _CLASSES_PRESENT + 1}
    for name, least in smallest.items():
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} is {getattr(options, name)}; give at least {least}")
    benchmark = EvaluationBenchmark(options.images, options.detections, options.classes, options.seed)
    if options.memory:
        from ovd.evaluation import benchmark_memory

        masks = options.memory == "masks"
        print(
            benchmark_memory.to_markdown(
                benchmark, masks, benchmark_memory.run(benchmark, masks, not options.skip_list)
            )
        )
        return
    measurements = run(benchmark, not options.skip_lvis_api, not options.skip_list)
    print(to_markdown(benchmark, measurements))
