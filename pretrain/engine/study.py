"""A study: pretraining runs that differ in a few settings, each over several seeds, all judged alike.

Every run is a resumable run folder whose name follows from its configuration and data: a run whose result is there is
skipped, a stopped one continues, and one whose configuration has changed starts afresh beside the old one. The table
and the plot are made in study_report.py.
"""

import hashlib
import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pretrain.atomic import write_atomically
from pretrain.config import ConfigError, EvaluationConfig, PretrainConfig, RunConfig, load_config
from pretrain.engine.checkpoint import STATE_FILE
from pretrain.engine.cost import describe_towers, phase_cost
from pretrain.engine.equal_time import Timing, stored_timing, with_equal_time
from pretrain.engine.run_folder import describe_environment, file_fingerprint, git_revision
from pretrain.engine.study_file import RESULT_FILE, check_names, in_order, read_study, stored_result
from pretrain.engine.study_judging import further_measures, zero_shot
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import CONFIG_FILE
from pretrain.objectives import passes_of


@dataclass
class RunSpec:
    """One way to train."""

    name: str = ""
    label: str = ""  # in the table and the plot; empty: the name
    config: str = ""  # a file of configs/pretrain; empty: the study's
    # Dotted field: its value over the configuration's. The text "@NAME" is the checkpoint that the run NAME, which must
    # come before, leaves with the same seed.
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)  # empty: the study's
    also_at: list[int] = field(default_factory=list)  # image sizes to judge at besides the study's


@dataclass
class StudyConfig:
    """What a study file can hold. Paths are relative to the working folder."""

    title: str = ""
    notes: list[str] = field(default_factory=list)  # what a reader of the table must know, a paragraph each
    config: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    image_size: int = 160  # pixels at which every run is judged, whatever it was trained at
    split: str = "test"  # the one that differences, aim and plot are about
    baseline: str = "baseline"  # the run that the others are compared with
    further: bool = False  # also hit@K, retrieval and, with data.withhold, unseen concepts
    # Seconds of training that every run gets: steps and warm-ups of its phases are multiplied by one factor, from what
    # a step takes as measured once before (`--time`); 0: the steps as they are.
    seconds: float = 0.0
    # Without `seconds`, the aim: a run may be this many points of top-1 below the baseline …
    aim_points: float = 1.0
    aim_ratio: float = 6.0  # … in this many times less training time; 0: the study has no aim
    output: str = "runs/study"  # run folders
    report: str = "studies/study.md"  # the table; the plot lies beside it
    runs: list[RunSpec] = field(default_factory=list)

    @property
    def aim_text(self) -> str:
        """The aim's points, in words."""
        return f"{self.aim_points:g} point{'s' * (self.aim_points != 1)}"


@dataclass(frozen=True)
class Job:
    """One run with one seed.

    Attributes:
        config: complete; its `run.output` is the run folder.
        sizes: image sizes to judge at, the study's first.
        further: the split to take further measures on; empty: none.
    """

    spec: RunSpec
    seed: int
    config: PretrainConfig
    sizes: tuple[int, ...]
    further: str = ""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.output)

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.spec.name} seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What was measured of a job.

    Attributes:
        train_seconds: sum of the training steps' times, waiting for data included; evaluation, saving and start-up not.
        training_flops: both towers, forward and backward, computed from the configuration (engine/cost.py).
        zero_shot: by image size (as text) and split, the fields of `ZeroShotResult`.
        judged: what the evaluation depended on; another value makes it stale.
    """

    train_seconds: float
    training_flops: int
    zero_shot: dict[str, dict[str, dict[str, float]]]
    judged: str
    date: str
    machine: str
    git_revision: str
    further: dict[str, float] = field(default_factory=dict)  # fractions by title, where the study asks


@dataclass(frozen=True)
class Study:
    """A study file, read and checked; jobs in the order to run them: one seed of everything first."""

    path: Path
    config: StudyConfig
    jobs: list[Job]


def load_study(path: str | Path, timed: bool = True) -> Study:
    """Read a study file and the configuration of each of its runs.

    Args:
        timed: False: as written, not yet at equal times, to measure what those depend on.

    Raises:
        ConfigError: for a missing file, an unknown field, a name given twice, or a run that cannot be configured.
    """
    path = Path(path)
    study = read_study(path, StudyConfig)
    _check(study)
    timing = stored_timing(study.output) if study.seconds and timed else None
    jobs: list[Job] = []
    for spec, seed in in_order(study.runs, study.seeds):
        before = {job.spec.name: job.folder / "checkpoint" for job in jobs if job.seed == seed}
        jobs.append(_make_job(study, spec, seed, before, timing))
    if study.seconds and timed and timing is None:
        raise ConfigError(f"study.seconds needs the time of a step: run this study with --time first ({study.output})")
    return Study(path, study, jobs)


def _check(study: StudyConfig) -> None:
    names = [spec.name for spec in study.runs]
    check_names("runs", names, nameless="a run has no name")
    if study.baseline not in names:
        raise ConfigError(f"study.baseline {study.baseline!r} is not among the runs: {', '.join(names)}")
    if not study.seeds:
        raise ConfigError("study.seeds: at least one is needed")


def _resolved(value: Any, before: dict[str, Path]) -> Any:
    """The value with every "@NAME" in it, at any depth, replaced by that run's checkpoint folder."""
    if isinstance(value, dict):
        return {key: _resolved(item, before) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, before) for item in value]
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    if value[1:] not in before:
        raise ConfigError(f"{value} is no run before this one with the same seed: {', '.join(before) or 'none'}")
    return str(before[value[1:]])


def _make_job(study: StudyConfig, spec: RunSpec, seed: int, before: dict[str, Path], timing: Timing | None) -> Job:
    """Load a run's configuration and give it its folder."""
    try:
        overrides = [f"{key}={json.dumps(_resolved(value, before))}" for key, value in spec.overrides.items()]
        config = load_config(spec.config or study.config, [*overrides, f"run.seed={seed}"])
    except ConfigError as error:
        raise ConfigError(f"run {spec.name}: {error}") from error
    if study.split not in config.evaluation.splits:
        raise ConfigError(
            f"run {spec.name}: study.split {study.split!r} is not among evaluation.splits {config.evaluation.splits}"
        )
    if timing:
        try:
            config = with_equal_time(config, timing.seconds, study.seconds)
        except KeyError as error:
            raise ConfigError(f"run {spec.name}: a phase has not been timed; run the study with --time") from error
    folder = Path(study.output) / f"{spec.name}-seed{seed}-{training_key(config)[:8]}"
    config = replace(config, run=replace(config.run, output=str(folder)))
    sizes = tuple(dict.fromkeys([study.image_size, *spec.also_at]))
    return Job(spec, seed, config, sizes, study.split if study.further else "")


def _unusual(settings: Any) -> Any:
    """What differs from the defaults, so that a field that is added later does not make old runs strangers."""
    if isinstance(settings, list):
        return [_unusual(item) for item in settings]
    if not is_dataclass(settings):
        return settings
    usual = type(settings)()
    pairs = ((item.name, getattr(settings, item.name), getattr(usual, item.name)) for item in fields(settings))
    return {name: _unusual(value) for name, value, default in pairs if value != default}


def training_key(config: PretrainConfig) -> str:
    """Hexadecimal digest of all that training depends on: the settings and the table's content."""
    writing = RunConfig()
    run = replace(config.run, output="", log_every=writing.log_every, checkpoint_every=writing.checkpoint_every)
    table = Path(config.data.table)
    parts = [
        json.dumps(_unusual(replace(config, evaluation=EvaluationConfig(), run=run)), sort_keys=True),
        file_fingerprint(table) if table.is_file() else "",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _judged(job: Job) -> str:
    """What evaluation depends on besides the weights."""
    further = [job.further] if job.further else []
    return json.dumps([job.config.evaluation.splits, job.config.evaluation.templates, sorted(job.sizes), *further])


def read_result(job: Job) -> Result | None:
    """A finished job's result; None if it has none, or one that was judged otherwise than now asked for."""
    result = stored_result(job.folder, Result)
    return result if result and result.judged == _judged(job) else None


def progress(job: Job) -> str:
    """done, trained (to be judged), started or missing."""
    if read_result(job):
        return "done"
    if (job.folder / "checkpoint" / CONFIG_FILE).is_file():
        return "trained"
    return "started" if (job.folder / STATE_FILE).is_file() else "missing"


def run_job(job: Job) -> Result:
    """Train (or continue), judge, and store the result; a job whose result is there is not touched.

    Raises:
        ConfigError: for data or settings that cannot be used.
        FloatingPointError: if the loss is no longer finite.
    """
    done = read_result(job)
    if done:
        return done
    if not (job.folder / "checkpoint" / CONFIG_FILE).is_file():
        # Judged afterwards, from the checkpoint, so that all runs are judged at one size by one piece of code.
        training = replace(job.config, evaluation=replace(job.config.evaluation, splits=[], every=0))
        Trainer(training, resume=True).train()
    checkpoint = job.folder / "checkpoint"
    result = Result(
        train_seconds=train_seconds(job.folder),
        training_flops=training_flops(job.config),
        zero_shot={str(size): zero_shot(job.config, checkpoint, size) for size in job.sizes},
        further=further_measures(job.config, checkpoint, job.sizes[0], job.further) if job.further else {},
        judged=_judged(job),
        date=time.strftime("%Y-%m-%d"),
        machine=describe_machine(),
        git_revision=git_revision(),
    )
    write_atomically(job.folder / RESULT_FILE, json.dumps(asdict(result), indent=1) + "\n")
    (job.folder / STATE_FILE).unlink(missing_ok=True)  # three times the weights' size, and not needed any more
    return result


def train_seconds(folder: Path) -> float:
    """The last `train_seconds` of a run's metrics.

    Raises:
        ConfigError: if there is none.
    """
    seconds = math.nan
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        seconds = json.loads(line).get("train_seconds", seconds)
    if math.isnan(seconds):
        raise ConfigError(f"{path} has no train_seconds: delete {folder} to train this run again")
    return seconds


def training_flops(config: PretrainConfig) -> int:
    """Of both towers over all phases, a teacher's forward passes included."""
    towers = describe_towers(config.model)
    costs = [phase_cost(phase, towers, passes=passes_of(config, phase)) for phase in config.phases]
    return sum(cost.training_flops + cost.teacher_flops for cost in costs)


def describe_machine() -> str:
    """Processor, its cores, accelerator if any, and the versions that decide speed."""
    about = describe_environment()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    accelerator = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    return (
        f"{accelerator}{about['cpus']} cores of {model}, Python {about['python']}, PyTorch {about['torch']}, "
        f"timm {about.get('timm', '-')}, {threads} thread{'s' * (threads != 1)}"
    )
