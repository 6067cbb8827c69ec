"""A study of detectors: trainings that differ in a few settings, each over several seeds and measured in several ways.

Two kinds. "detection": detectors of base classes on pictures with base and novel ones. "retention": fine-tuning on a
few words, and what it does to them and to the others. Ways to measure (variants) that need no other weights, such as
fusion weights or interpolation, share one training. Every training is a resumable run folder whose name follows from
its configuration and data: what is done is skipped, what was stopped continues. Here a study is read; training and
measuring are in `study_judging`, the page in `study_report`.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ovd.detector import CONFIG, IMAGE_TEXT
from ovd.detector_folder import detector_folder
from ovd.engine.lazy_config import load_config
from ovd.engine.trainer import plain
from ovd.modeling.detector_config import INFERENCE_FIELDS, DetectorConfig
from pretrain.config import ConfigError
from pretrain.engine.run_folder import file_fingerprint
from pretrain.engine.study import Study as PretrainingStudy
from pretrain.engine.study import load_study as load_pretraining_study
from pretrain.engine.study_file import check_names, in_order, read_study, stored_result
from pretrain.modeling.checkpoint import WEIGHTS_FILE

KINDS = ("detection", "retention")
WEIGHTS = ("chosen", "none", "fixed")
BEFORE = "before"  # the variant of a retention study that every fine-tuning is compared with


@dataclass
class TrainingSpec:
    """One way to train."""

    name: str = ""
    config: str = ""  # a file of configs/ovd; empty: the study's
    # Dotted field: its value over the configuration's. The text "@STUDY:RUN" is the checkpoint that this run of a
    # pretraining study leaves with the same seed.
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)  # empty: the study's
    image_tower: str = ""  # "random": the text tower of model.image_text with an image tower of new weights


@dataclass
class VariantSpec:
    """One way to measure a training."""

    name: str = ""
    label: str = ""  # in the tables and plots; empty: the name
    training: str = ""
    weights: str = "chosen"  # of fusion: "chosen" on the validation pictures, "none" (0), "fixed" (the configuration's)
    shuffled: bool = False  # detection: every class gets another class's text, the control
    # detection: fields of DetectorConfig that are otherwise when it is measured, of INFERENCE_FIELDS, such as vlm_mode.
    architecture: dict[str, Any] = field(default_factory=dict)
    interpolation: float = 1.0  # retention: from the weights before (0) to those after (1)


@dataclass
class StudyConfig:
    """What a study file can hold. Paths are relative to the working folder."""

    kind: str = "detection"
    title: str = ""
    notes: list[str] = field(default_factory=list)  # what a reader of the table must know, a paragraph each
    config: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    annotations: str = "data/mini/mini_lvis_test.json"  # what is reported
    validation: str = "data/mini/mini_lvis_val.json"  # detection: what fusion weights are chosen on
    image_root: str = "data/mini"
    limit: int = 0  # pictures measured, at most; 0: all
    samples: int = 300  # resamples of the pictures for the intervals
    alpha: str = "0:0.8:0.1"  # detection: fusion weights tried, as tools/sweep_scores.py takes them
    beta: str = "0:0.8:0.1"
    tolerance: float = 0.003  # chosen is the highest APr among the weights within this of the highest AP (0.003: 0.3 %)
    proposals: list[int] = field(default_factory=lambda: [20, 60])  # detection: recall at so many proposals
    detector: str = "mini"  # retention: what is fine-tuned
    words: list[str] = field(default_factory=list)  # retention: what is learned
    scenes: int = 120  # retention: pictures to learn them from
    baseline: str = ""  # the variant that the others are compared with; retention: always "before"
    output: str = "runs/studies/detector"  # run folders
    report: str = "studies/detector.md"  # the tables; plots lie beside it
    trainings: list[TrainingSpec] = field(default_factory=list)
    variants: list[VariantSpec] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """One training with one seed, and the ways to measure it.

    Attributes:
        config: complete but for what `prepare` makes.
        folder: the run folder.
        image_text: detection: the image-text model that the configuration names, whatever is made of it.
    """

    spec: TrainingSpec
    seed: int
    config: Any
    folder: Path
    variants: tuple[VariantSpec, ...]
    image_text: str

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.spec.name} seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What was measured of a job.

    Attributes:
        values: by variant, task ("bbox", "segm") and metric: fractions in 0-1, the first on the pictures as they are,
            the others on resampled ones, the same for every job (NaN: None).
        proposals: `proposal_recall`'s metrics.
        settings: by variant, the fusion weights it was measured with.
        sweep: of the validation pictures: alpha, beta, AP, APr, APc, APf.
        train_seconds: sum of the steps' times, waiting for data included.
        judged: what the measuring depended on; another value makes it stale.
    """

    values: dict[str, dict[str, dict[str, list]]]
    proposals: dict[str, float | None]
    settings: dict[str, dict[str, float]]
    sweep: list[dict[str, float | None]]
    train_seconds: float
    judged: str
    date: str
    machine: str
    git_revision: str


@dataclass(frozen=True)
class Study:
    """A study file, read and checked; jobs in the order to run them: one seed of everything first."""

    path: Path
    config: StudyConfig
    jobs: list[Job]


def load_study(path: str | Path) -> Study:
    """Read a study file and the configuration of each of its trainings.

    Raises:
        ConfigError: a missing file, an unknown field or name, or a training that cannot be configured.
    """
    path = Path(path)
    study = read_study(path, StudyConfig)
    _check(study)
    read_pretraining = cache(load_pretraining_study)  # several trainings name the same one
    pairs = in_order(study.trainings, study.seeds)
    jobs = [_make_job(study, spec, seed, read_pretraining) for spec, seed in pairs]
    return Study(path, study, jobs)


def _check(study: StudyConfig) -> None:
    trainings, variants = [t.name for t in study.trainings], [v.name for v in study.variants]
    check_names("trainings", trainings)
    check_names("variants", variants)
    for variant in study.variants:
        if variant.training not in trainings:
            raise ConfigError(f"variant {variant.name}: no training {variant.training!r}: {', '.join(trainings)}")
        if variant.weights not in WEIGHTS:
            raise ConfigError(f"variant {variant.name}: weights {variant.weights!r}: choose {', '.join(WEIGHTS)}")
        _check_architecture(study, variant)
    if study.kind not in KINDS:
        raise ConfigError(f"study.kind is {study.kind!r}: {' or '.join(KINDS)}")
    if study.kind == "detection" and study.baseline not in variants:
        raise ConfigError(f"study.baseline {study.baseline!r} is not among the variants: {', '.join(variants)}")
    if study.kind == "retention" and (not study.words or BEFORE in variants):
        raise ConfigError(f"study.words is empty, or a variant is called {BEFORE!r}, which is the detector as it was")
    if not study.seeds or study.samples < 1:
        raise ConfigError("study.seeds and study.samples: at least one of each is needed")


def _check_architecture(study: StudyConfig, variant: VariantSpec) -> None:
    """Refuse fields and values that the trained weights, which are read long after this, could not take."""
    given, reason = variant.architecture, ""
    if given and study.kind != "detection":
        reason = "that is for a detection study"
    elif unknown := sorted(given.keys() - {f.name for f in fields(DetectorConfig)}):
        reason = f"DetectorConfig has no {', '.join(unknown)}"
    elif trained := sorted(given.keys() - set(INFERENCE_FIELDS)):
        reason = f"{', '.join(trained)}: as it was trained; what may be otherwise is {', '.join(INFERENCE_FIELDS)}"
    else:
        try:
            DetectorConfig.from_dict(given)
        except ValueError as error:
            reason = str(error)
    if reason:
        raise ConfigError(f"variant {variant.name}: architecture: {reason}")


def _resolved(value: Any, seed: int, read_pretraining: Callable[[str], PretrainingStudy]) -> Any:
    """The value; of "@STUDY:RUN" the checkpoint folder of that run, whether it is there already or not."""
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    path, _, run = value[1:].rpartition(":")
    folders = {job.spec.name: job.folder for job in read_pretraining(path).jobs if job.seed == seed}
    if run not in folders:
        raise ConfigError(f"{value} is no run of that study with seed {seed}: {', '.join(folders) or 'none'}")
    return str(folders[run] / "checkpoint")


def _make_job(
    study: StudyConfig, spec: TrainingSpec, seed: int, read_pretraining: Callable[[str], PretrainingStudy]
) -> Job:
    """Load a training's configuration and give it its folder."""
    own: dict[str, Any] = {}
    if study.kind == "retention":
        scenes = Path(study.output) / "scenes"
        own = {
            "model.detector": study.detector,
            "data.annotations": f"{scenes}/finetune.json",
            "data.images": f"{scenes}",
        }
    try:
        given = own | {key: _resolved(value, seed, read_pretraining) for key, value in spec.overrides.items()}
        overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]  # hydra reads JSON
        config = load_config(spec.config or study.config, [*overrides, f"train.seed={seed}"])
        key = training_key(study, spec, config)
    except ValueError as error:
        raise ConfigError(f"training {spec.name}: {error}") from error
    folder = Path(study.output) / f"{spec.name}-seed{seed}-{key[:8]}"
    config.train.output = str(folder)
    image_text = str(config.model.get("image_text", ""))
    if spec.image_tower == "random":
        config.model.image_text = str(Path(study.output) / f"random_tower-seed{seed}")
    elif spec.image_tower:
        raise ConfigError(f"training {spec.name}: image_tower is {spec.image_tower!r}: leave it out, or random")
    return Job(spec, seed, config, folder, tuple(v for v in study.variants if v.training == spec.name), image_text)


def training_key(study: StudyConfig, spec: TrainingSpec, config: Any) -> str:
    """Hexadecimal digest of all that training depends on: settings, annotations, the weights it starts from."""
    settings = OmegaConf.to_container(plain(config), resolve=False)
    for name in ("output", "log_every", "checkpoint_every"):
        settings["train"].pop(name)
    settings.pop("evaluation")
    parts = [json.dumps(settings, sort_keys=True), spec.image_tower]
    if study.kind == "retention":
        start = detector_folder(study.detector)
        parts += [json.dumps([study.words, study.scenes]), file_fingerprint(start / "model.safetensors")]
        files = [config.data.replay.annotations, start / IMAGE_TEXT / WEIGHTS_FILE]
    else:
        files = [config.data.train_annotations, Path(config.model.image_text) / WEIGHTS_FILE]
    parts += [file_fingerprint(file) for file in files if str(file) and Path(file).is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def judged(study: StudyConfig, job: Job) -> str:
    """What measuring depends on besides the weights."""
    # Left out where it says nothing, so that results from before there was this field still count.
    variants = [
        {k: v for k, v in asdict(variant).items() if k != "label" and (k != "architecture" or v)}
        for variant in job.variants
    ]
    names = ("annotations", "validation", "limit", "samples", "alpha", "beta", "tolerance", "proposals", "words")
    files = [study.annotations, study.validation] if study.kind == "detection" else [study.annotations]
    content = [file_fingerprint(file) if Path(file).is_file() else "" for file in files]
    return json.dumps([variants, [getattr(study, name) for name in names], content])


def read_result(study: StudyConfig, job: Job) -> Result | None:
    """A finished job's result; None if it has none, or one that was measured otherwise than now asked for."""
    result = stored_result(job.folder, Result)
    return result if result and result.judged == judged(study, job) else None


def progress(study: StudyConfig, job: Job) -> str:
    """done, trained (to be measured), started or missing."""
    if read_result(study, job):
        return "done"
    if (job.folder / "detector" / CONFIG).is_file():
        return "trained"
    return "started" if (job.folder / "last_checkpoint").is_file() else "missing"
