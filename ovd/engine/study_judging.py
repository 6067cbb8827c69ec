"""Train what a study lacks and measure it: precision and recall on resampled pictures, proposals, retention.

All jobs of a study are measured on the same resamples, so that what two have in common is removed from their
difference. Reading a study is in `study`, the page in `study_report`.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ovd.data.finetune_scenes import build_finetuning_scenes
from ovd.data.lvis import read_ground_truth
from ovd.detector import CONFIG, OpenVocabularyDetector
from ovd.detector_folder import detector_folder, read_detector, read_prompting
from ovd.engine.evaluate import derangement
from ovd.engine.interpolation import interpolate_detectors
from ovd.engine.retention import detect_categories, first_pictures
from ovd.engine.run_text import run_prompting
from ovd.engine.study import BEFORE, Job, Result, StudyConfig, VariantSpec, judged, read_result
from ovd.engine.trainer import resolve_device, train
from ovd.evaluation.bootstrap import bootstrap
from ovd.evaluation.lvis_evaluator import class_groups, lvis_matches
from ovd.evaluation.proposal_recall import proposal_recall
from ovd.evaluation.retention import word_groups
from ovd.scores import CachedPicture, ScoreCache, cached_proposals, collect_scores
from ovd.sweep import COLUMNS, ScoreSettings, SweepRow, cached_detections, parse_grid, settings_grid, sweep
from pretrain.atomic import replacing, write_atomically
from pretrain.engine.run_folder import git_revision
from pretrain.engine.study import describe_machine
from pretrain.engine.study_file import RESULT_FILE
from pretrain.modeling.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_checkpoint

TASKS = ("bbox", "segm")
SCORES = "scores"  # how the names of folders of cached scores begin
Values = dict[str, dict[str, list]]  # task -> metric -> fractions


def run_job(study: StudyConfig, job: Job) -> Result:
    """Train (or continue), measure, and store the result; a job whose result is there is not touched.

    Raises:
        ValueError: data or settings that cannot be used.
        FloatingPointError: if a loss is no longer finite.
    """
    done = read_result(study, job)
    if done:
        return done
    prepare(study, job)
    if not (job.folder / "detector" / CONFIG).is_file():
        train(job.config, resume=True)
    result = Result(
        **judge(study, job),
        train_seconds=train_seconds(job.folder),
        judged=judged(study, job),
        date=time.strftime("%Y-%m-%d"),
        machine=describe_machine(),
        git_revision=git_revision(),
    )
    write_atomically(job.folder / RESULT_FILE, json.dumps(asdict(result)) + "\n")
    # Neither is needed any more: states are three times the weights' size, and until now scores made an interrupted
    # measuring go on.
    for state in job.folder.glob("model_*.pth"):
        state.unlink()
    for scores in job.folder.glob(f"{SCORES}-*"):
        shutil.rmtree(scores, ignore_errors=True)
    return result


def train_seconds(folder: Path) -> float:
    """Time of all steps by a run's metrics, each line standing for the steps since the one before."""
    times: dict[int, float] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        if "time" in row:
            times[row["iteration"]] = row["time"]
    total, before = 0.0, -1
    for step, seconds in sorted(times.items()):
        total, before = total + seconds * (step - before), step
    return total


def prepare(study: StudyConfig, job: Job) -> None:
    """Make what a job needs besides the data: a tower of new weights, or the scenes to fine-tune on."""
    if study.kind == "retention":
        build_finetuning_scenes(study.image_root, study.words, study.scenes, job.config.data.images)
    elif job.spec.image_tower == "random":
        target = Path(job.config.model.image_text)
        if not (target / CONFIG_FILE).is_file():
            randomise_image_tower(job.image_text, target, job.seed)


def randomise_image_tower(source: str | Path, target: str | Path, seed: int) -> Path:
    """Write a checkpoint folder with the text tower of another and an image tower as it is before any training."""
    import open_clip

    source, target = Path(source), Path(target)
    load_checkpoint(source)  # says what is wrong with it, if anything is
    description = json.loads((source / CONFIG_FILE).read_text())["model_cfg"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        custom = description.pop("custom_text", False)
        fresh = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**description)
    trained, tower = load_file(source / WEIGHTS_FILE), fresh.state_dict()
    state = {
        name: tower[name].contiguous() if name.startswith("visual.") else value.float()
        for name, value in trained.items()
    }
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / WEIGHTS_FILE) as path:
        save_file(state, path, {"format": "pt"})
    config = json.loads((source / CONFIG_FILE).read_text())
    config.pop("trained_image_size", None)  # new weights have the tower's native size
    write_atomically(target / CONFIG_FILE, json.dumps(config))
    return target


def judge(study: StudyConfig, job: Job) -> dict[str, Any]:
    """Measure a trained job: "values", "proposals", "settings" and "sweep" of `Result`."""
    return (judge_detection if study.kind == "detection" else judge_retention)(study, job)


def resampled(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    samples: int,
    fine_tuned: Sequence[str] | None = None,
) -> Values:
    """Metrics of results on the pictures and on resampled ones, boxes and, where all have them, masks.

    Args:
        fine_tuned: words that are measured apart from the others; None groups by frequency.

    Returns:
        task -> "AP", "AP50", "AR" with a group behind a colon ("AP:r", "AR:base", "AP:untouched", none for all).
    """
    values: Values = {}
    for task in TASKS if results and all("segmentation" in r for r in results) else TASKS[:1]:
        truth, matches = lvis_matches(ground_truth, results, task)
        groups = {"": np.ones(len(truth.names), bool), **class_groups(truth.frequencies)}
        if fine_tuned is not None:
            groups |= word_groups(truth, fine_tuned)
        values[task] = {
            f"{metric}:{group}".rstrip(":"): [None if math.isnan(v) else round(float(v), 6) for v in row[0]]
            for (group, metric), row in bootstrap([matches], groups, samples, seed=0).items()
        }
    return values


class ShuffledScores:
    """Cached scores as if each class had another class's text; for `cached_detections`.

    The columns are permuted: a class's score comes from its own text alone, but for the normalisation, which has no
    order. (Where two heads were fused by base and novel before, their weights stay those of the text's own class.)
    """

    def __init__(self, cache: ScoreCache, num_classes: int) -> None:
        self.cache = cache
        self.columns = torch.from_numpy(np.concatenate([[0], 1 + derangement(num_classes)]))

    def read(self, image_id: int) -> CachedPicture:
        """A picture with permuted classes."""
        picture = self.cache.read(image_id)
        regions, p = picture.regions, picture.regions.image_text
        regions = replace(
            regions,
            detector=regions.detector[:, self.columns],
            image_text=None if p is None else p[:, self.columns],
        )
        return replace(picture, regions=regions)


def choose_weights(rows: Sequence[SweepRow], tolerance: float) -> SweepRow:
    """The row with the highest APr among those within `tolerance` of the highest AP; by AP where there is no APr."""
    best = max(row.metrics["AP"] for row in rows)
    near = [row for row in rows if row.metrics["AP"] >= best - tolerance] or list(rows)
    return max(near, key=lambda row: -1.0 if math.isnan(row.metrics["APr"]) else row.metrics["APr"])


def judge_detection(study: StudyConfig, job: Job) -> dict[str, Any]:
    """Measure every variant, those with the same architecture from the same cached scores.

    The scores stay in the run folder. The sweep and the proposals that are kept are those of the job's first variant.
    """
    groups: dict[str, list[VariantSpec]] = {}
    for variant in job.variants:
        groups.setdefault(json.dumps(variant.architecture, sort_keys=True), []).append(variant)
    parts = [_judge_architecture(study, job, some, proposals=i == 0) for i, some in enumerate(groups.values())]
    merged = {name: {k: v for part in parts for k, v in part[name].items()} for name in ("values", "settings")}
    return {**parts[0], **merged}


def _judge_architecture(
    study: StudyConfig, job: Job, variants: Sequence[VariantSpec], proposals: bool
) -> dict[str, Any]:
    """Sweep the fusion weights on the validation pictures, then measure the variants, and the proposals where that is
    asked for, on those that are reported."""
    detector = _load_detector(job.folder / "detector", variants[0].architecture)
    heads, prompting = detector.model.roi_heads, run_prompting(job.config)
    key = hashlib.sha256((judged(study, job) + json.dumps(variants[0].architecture)).encode()).hexdigest()[:8]

    def collect(split: str, annotations: str, masks: bool) -> tuple[ScoreCache, dict[str, Any]]:
        return collect_scores(
            detector, annotations, study.image_root, job.folder / f"{SCORES}-{split}-{key}", prompting, "float16",
            study.limit or None, masks=masks,
        )  # fmt: skip

    rows: list[SweepRow] = []
    own = ScoreSettings(heads.alpha, heads.beta, heads.objectness_delta)
    settings = {"none": replace(own, alpha=0.0, beta=0.0), "fixed": own}
    if any(variant.weights == "chosen" for variant in variants):
        grid = settings_grid(parse_grid(study.alpha), parse_grid(study.beta), (own.delta,))
        cache, ground_truth = collect("validation", study.validation, False)
        rows = sweep(cache, heads, ground_truth, grid)
        settings["chosen"] = choose_weights(rows, study.tolerance).settings
    cache, ground_truth = collect("test", study.annotations, bool(detector.model.architecture.mask_on))
    ids = [image["id"] for image in ground_truth["images"]]
    classes = sorted(c["id"] for c in ground_truth["categories"])
    values = {}
    for variant in variants:
        scores = ShuffledScores(cache, len(classes)) if variant.shuffled else cache
        found = cached_detections(scores, heads, settings[variant.weights], ids, classes)
        values[variant.name] = resampled(ground_truth, found, study.samples)
    recall = proposal_recall(ground_truth, cached_proposals(cache, ids), study.proposals) if proposals else {}
    return {
        "values": values,
        "proposals": {name: None if math.isnan(v) else v for name, v in recall.items()},
        "settings": {v.name: {n: getattr(settings[v.weights], n) for n in ("alpha", "beta")} for v in variants},
        "sweep": [_plain_row(row) for row in rows],
    }


def _load_detector(folder: Path, architecture: Mapping[str, Any]) -> OpenVocabularyDetector:
    """A trained detector with some fields of its architecture changed, on the device there is."""
    device = resolve_device("auto")
    model, image_text, base_names = read_detector(folder, dict(architecture))
    image_text.model.to(device).eval()
    return OpenVocabularyDetector(model.to(device), image_text, base_names, prompting=read_prompting(folder))


def _plain_row(row: SweepRow) -> dict[str, float | None]:
    metrics = {name: None if math.isnan(row.metrics[name]) else row.metrics[name] for name in COLUMNS}
    return {"alpha": row.settings.alpha, "beta": row.settings.beta, **metrics}


def judge_retention(study: StudyConfig, job: Job) -> dict[str, Any]:
    """Measure the detector before, and after in every variant, on all words of the reported pictures."""
    ground_truth = first_pictures(read_ground_truth(study.annotations), study.limit or None)
    before = detector_folder(study.detector)
    found = {BEFORE: _detections(study, before, Path(study.output))}
    for variant in job.variants:
        found[variant.name] = _detections(study, _interpolated(before, job, variant), job.folder)
    values = {name: resampled(ground_truth, some, study.samples, study.words) for name, some in found.items()}
    return {"values": values, "proposals": {}, "settings": {}, "sweep": []}


def _interpolated(before: Path, job: Job, variant: VariantSpec) -> Path:
    after = job.folder / "detector"
    if variant.interpolation == 1:
        return after
    target = job.folder / f"interpolated-{variant.interpolation:g}"
    return interpolate_detectors(before, after, variant.interpolation, target, float16=True)


def _detections(study: StudyConfig, detector: Path, folder: Path) -> list[dict[str, Any]]:
    """Detections of a folder, kept in a file that is named by what they depend on."""
    parts = [study.annotations, str(study.limit)]
    for name in ("config.yaml", "model.safetensors"):
        parts.append(hashlib.sha256((detector / name).read_bytes()).hexdigest())
    path = folder / f"detections-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:12]}.json"
    if not path.is_file():
        device = resolve_device("auto")
        found = detect_categories(detector, study.annotations, study.image_root, device, limit=study.limit or None)
        write_atomically(path, json.dumps(found))
    return json.loads(path.read_text())
