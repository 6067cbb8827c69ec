"""Times of a study's phases, and runs of equal time."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pretrain.atomic import write_atomically
from pretrain.config import ConfigError
from pretrain.engine import study as study_module
from pretrain.engine.equal_time import TIMING_FILE, Timing
from pretrain.engine.study import Result
from pretrain.engine.study_report import collect, format_report
from pretrain.engine.study_timing import distinct_phases, read_timing, time_study


def write_result(job, train_seconds: float) -> None:
    """As if the job had run."""
    measured = {"top1": 0.1, "top5": 0.5, "chance": 0.1, "images": 4, "classes": 12}
    done = Result(
        train_seconds, 1000, {str(size): {"val": measured} for size in job.sizes}, study_module._judged(job),
        "today", "here", "code",
    )  # fmt: skip
    write_atomically(job.folder / "result.json", json.dumps(asdict(done)))


def test_times_come_from_the_timing_of_phases_where_there_is_one(make_study, large):
    """Baseline: 3 large steps; two: 3 small and 2 large; so 3·2 = 6 s and 3·0.5 + 2·2 = 5.5 s at 0.5 and 2 s a step."""
    study = make_study(seeds=[0])
    for job in study.jobs:
        write_result(job, train_seconds=1000.0)
    assert {run[0].train_seconds for run in collect(study).values()} == {1000.0}
    phases = distinct_phases(study)
    sizes = {key: phase.image_size for key, (_, phase) in phases.items()}
    assert sorted(sizes.values()) == [32, 32, 64]  # small steps with another weight decay are timed apart
    timing = Timing({key: {32: 0.5, 64: 2.0}[size] for key, size in sizes.items()}, {}, "today", "here", "code", 0.1)
    write_atomically(Path(study.config.output) / TIMING_FILE, json.dumps(asdict(timing)))
    seconds = {name: run[0].train_seconds for name, run in collect(study).items()}
    assert seconds == {"baseline": 6.0, "two": 5.5, "one": 1.5}
    assert "load average 0.1 before it" in format_report(study, collect(study), None)
    changed = make_study(seeds=[0], runs=[{"name": "baseline", "overrides": {"phases": [{**large, "batch_size": 6}]}}])
    assert read_timing(changed) is None  # a phase that was never timed: as the runs went


def test_runs_of_equal_time_have_their_steps_from_the_timing(make_study, small, job_of):
    with pytest.raises(ConfigError, match="study.seconds needs the time of a step: run this study with --time first"):
        make_study(seconds=60)
    plain = make_study()
    per_step = {key: phase.image_size / 64 for key, (_, phase) in distinct_phases(plain).items()}
    timing = Timing(per_step, {}, "today", "here", "code", 0.1)
    write_atomically(Path(plain.config.output) / TIMING_FILE, json.dumps(asdict(timing)))
    study = make_study(seconds=70)
    steps = {job.spec.name: [p.steps for p in job.config.phases] for job in study.jobs}
    # At 64 px a step takes a second, at 32 px half of one: "two" has 3 and 2 steps as written, 3.5 s, and gets 20 times
    # as many.
    assert steps == {"baseline": [70], "two": [60, 40], "one": [140]}
    written, scaled = plain.jobs[1].config.phases[0], study.jobs[1].config.phases[0]
    assert scaled.warmup_steps == 20 * written.warmup_steps
    assert job_of(study, "two").folder != job_of(plain, "two").folder
    with pytest.raises(ConfigError, match="is already timed, and the runs' steps depend on it: delete"):
        time_study(study)
    with pytest.raises(ConfigError, match="run baseline: a phase has not been timed"):
        make_study(seconds=70, runs=[{"name": "baseline", "overrides": {"phases": [{**small, "image_size": 96}]}}])


def test_timing_measures_steps_of_the_real_loop(make_study):
    study = make_study(seeds=[0])
    timing = time_study(study, repeats=2, steps=1)
    assert read_timing(study) == replace(timing, spread={key: list(value) for key, value in timing.spread.items()})
    assert timing.seconds.keys() == distinct_phases(study).keys() and all(t > 0 for t in timing.seconds.values())
