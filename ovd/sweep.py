"""Try fusion weights, temperatures and the objectness exponent on cached scores, without running the network.

Sources: F-VLM (section 4.3, alpha and beta), DITO (objectness). Choose settings on a validation split: chosen on the
split that is reported, the report is of a fit. The cache is in `ovd/scores.py`.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.modeling.postprocessing import detector_postprocess
from torch import Tensor

from ovd.detections import Detections
from ovd.evaluation.lvis_evaluator import evaluate_results
from ovd.evaluation.results import format_percent, text_table
from ovd.modeling.roi_heads import OpenVocabularyROIHeads, RegionScores
from ovd.modeling.setting_ranges import check_setting
from ovd.modeling.temperature import temper
from ovd.scores import ScoreCache, clipped_boxes

COLUMNS = ("AP", "APr", "APc", "APf")
_MOST_SETTINGS = 100_000


@dataclass(frozen=True)
class ScoreSettings:
    """How scores are made of the cached parts.

    Attributes:
        alpha, beta: weights of the image-text score for base and novel classes, 0..1.
        delta: exponent of the objectness, at least 0.
        detector_temperature, image_text_temperature: logits are divided by it before the softmax; relative to the
            detector as it is, so 1 changes nothing.
    """

    alpha: float
    beta: float
    delta: float = 0.0
    detector_temperature: float = 1.0
    image_text_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "detector_temperature"):
            check_setting(name, getattr(self, name))
        check_setting("objectness_delta", self.delta, "delta")
        check_setting("detector_temperature", self.image_text_temperature, "image_text_temperature")


@dataclass(frozen=True)
class SweepRow:
    """What one setting reaches: metrics of `evaluate_results` on boxes, in 0-1; those on masks begin with "mask_"."""

    settings: ScoreSettings
    metrics: dict[str, float]


def parse_grid(text: str) -> tuple[float, ...]:
    """Values to try: "0:1:0.25" (from, to inclusive, step), "0.35,0.65", or "0.5".

    Raises:
        ValueError: not numbers, or a range that holds none.
    """
    try:
        parts = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError as error:
        raise ValueError(f"{text!r} is no list of numbers; write 0:1:0.1 or 0.2,0.5") from error
    if ":" not in text:
        return tuple(parts)
    if len(parts) != 3 or not all(map(math.isfinite, parts)) or parts[2] <= 0 or parts[1] < parts[0]:
        raise ValueError(f"{text!r} is no range; write from:to:step with from <= to and a step above 0, like 0:1:0.1")
    start, stop, step = parts
    count = int((stop - start) / step + 1e-9) + 1
    if count > _MOST_SETTINGS:
        raise ValueError(f"{text!r} has {count} values, more than {_MOST_SETTINGS}; choose a larger step")
    return tuple(round(start + i * step, 10) for i in range(count))


def settings_grid(
    alpha: Sequence[float],
    beta: Sequence[float],
    delta: Sequence[float] = (0.0,),
    detector_temperature: Sequence[float] = (1.0,),
    image_text_temperature: Sequence[float] = (1.0,),
) -> list[ScoreSettings]:
    """All combinations."""
    # The temperatures outermost: alpha and beta, of which most is tried, are neighbours in the table.
    combinations = itertools.product(detector_temperature, image_text_temperature, delta, alpha, beta)
    return [ScoreSettings(a, b, d, tz, tp) for tz, tp, d, a, b in combinations]


def rescore(regions: RegionScores, settings: ScoreSettings) -> RegionScores:
    """The regions with both temperatures applied; the detector's is that of the ensemble where there are two heads."""
    p = regions.image_text
    return replace(
        regions,
        detector=temper(regions.detector, settings.detector_temperature, regions.independent),
        image_text=None if p is None else temper(p, settings.image_text_temperature),
    )


@torch.no_grad()
def cached_detections(
    cache: ScoreCache,
    heads: OpenVocabularyROIHeads,
    settings: ScoreSettings,
    image_ids: Iterable[int],
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Detections of cached pictures in the LVIS results form, as a full run with these settings gives them; with masks
    where the cache has them.

    Args:
        cache: holds all the pictures.
        heads: of the detector, with the vocabulary of the cache; only selects, nothing of the network runs.
        image_ids: pictures.
        category_ids: id of each class.
    """
    results: list[dict[str, Any]] = []
    device = heads.is_base.device
    with _settings(heads, settings):
        for image_id in image_ids:
            picture = cache.read(image_id)
            regions = rescore(_to(picture.regions, device), settings)
            instances = heads.select_detections([regions])[0]
            if picture.masks is not None:
                instances.region = _regions_of(instances.pred_boxes.tensor, regions)
            instances = detector_postprocess(instances, *picture.size)
            found = Detections.from_instances(instances).to_coco(image_id, category_ids)
            if picture.masks is not None:
                for result, region in zip(found, instances.region.tolist(), strict=True):
                    result["segmentation"] = {"size": list(picture.size), "counts": picture.masks[region]}
            results += found
    return results


def _regions_of(boxes: Tensor, regions: RegionScores) -> Tensor:
    """(N,) which region each of (N, 4) detected boxes is of; regions with the same box have the same mask."""
    same = (boxes[:, None] == clipped_boxes(regions)[None]).all(dim=-1)
    if not same.any(dim=1).all():
        raise RuntimeError("a detected box is no region's box; this is a fault of the selection")
    return same.int().argmax(dim=1)


def sweep(
    cache: ScoreCache,
    heads: OpenVocabularyROIHeads,
    ground_truth: dict[str, Any],
    grid: Sequence[ScoreSettings],
    progress: Callable[[Iterable], Iterable] | None = None,
) -> list[SweepRow]:
    """Measure every setting on the pictures of `ground_truth`, in the order given; memory is that of one setting.

    Masks are measured too where the cache has them.
    """
    image_ids = [image["id"] for image in ground_truth["images"]]
    category_ids = sorted(category["id"] for category in ground_truth["categories"])
    rows = []
    for settings in progress(grid) if progress else grid:
        results = cached_detections(cache, heads, settings, image_ids, category_ids)
        metrics = evaluate_results(ground_truth, results, "bbox")
        if cache.description.get("masks"):
            on_masks = evaluate_results(ground_truth, results, "segm")
            metrics |= {f"mask_{name}": value for name, value in on_masks.items()}
        rows.append(SweepRow(settings, metrics))
    return rows


def best_row(rows: Sequence[SweepRow], metric: str = "AP") -> SweepRow:
    """The row with the highest value of a metric; the first of equals.

    Raises:
        ValueError: no such metric, or it could not be measured on this data.
    """
    if not rows or metric not in rows[0].metrics:
        known = ", ".join(rows[0].metrics) if rows else "none, nothing was swept"
        raise ValueError(f"there is no metric {metric!r}; choose one of {known}")
    measured = [row for row in rows if not math.isnan(row.metrics[metric])]
    if not measured:
        raise ValueError(f"{metric} cannot be measured on these annotations: they hold no such class; choose another")
    return max(measured, key=lambda row: row.metrics[metric])


def sweep_table(rows: Sequence[SweepRow], columns: Sequence[str] = COLUMNS) -> str:
    """Markdown: one line a setting; a temperature or delta that all rows share is left out. Masks where measured."""
    columns = [*columns, *(f"mask_{name}" for name in columns if rows and f"mask_{name}" in rows[0].metrics)]
    names = ["alpha", "beta"]
    optional = ("delta", "detector_temperature", "image_text_temperature")
    names += [name for name in optional if len({getattr(row.settings, name) for row in rows}) > 1]
    body = [
        [
            *(f"{getattr(row.settings, name):g}" for name in names),
            *(format_percent(row.metrics.get(column)) for column in columns),
        ]
        for row in rows
    ]
    return text_table([*names, *columns], body)


def reported_annotations(detector_folder: str | Path) -> str | None:
    """The annotation file that the run which made a detector reports its numbers on, by the configuration beside it."""
    folder = Path(detector_folder)
    for path in (folder.parent / "config.yaml", folder / "log" / "detector" / "config.yaml"):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            return str(content["evaluation"]["annotations"])
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            continue
    return None


def split_warning(annotations: str | Path, detector_folder: str | Path) -> str | None:
    """A sentence when settings would be chosen on the split that is reported, else None."""
    path, reported = Path(annotations), reported_annotations(detector_folder)
    if reported is not None and Path(reported).name == path.name:
        return (
            f"{path} is what this detector's evaluation reports on: settings chosen on it are fitted to it, so do not "
            "report its numbers; sweep on a validation split"
        )
    if "test" in path.stem.lower():
        return f"{path} looks like a test split: choose settings on a validation split"
    return None


@contextlib.contextmanager
def _settings(heads: OpenVocabularyROIHeads, settings: ScoreSettings) -> Iterator[None]:
    """Give the heads other weights for a while."""
    before = heads.alpha, heads.beta, heads.objectness_delta
    heads.alpha, heads.beta, heads.objectness_delta = settings.alpha, settings.beta, settings.delta
    try:
        yield
    finally:
        heads.alpha, heads.beta, heads.objectness_delta = before


def _to(regions: RegionScores, device: torch.device) -> RegionScores:
    moved = {name: value.to(device) for name, value in vars(regions).items() if isinstance(value, Tensor)}
    return replace(regions, **moved)
