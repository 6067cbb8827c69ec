"""Studies: what is run, skipped, continued and run again, and that the table's numbers are the hand-computed ones."""

import importlib.util
import json
import math
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from pretrain.atomic import write_atomically
from pretrain.config import ConfigError, to_yaml
from pretrain.engine import study as study_module
from pretrain.engine.cost import describe_towers, phase_cost
from pretrain.engine.equal_time import TIMING_FILE, Timing
from pretrain.engine.study import Result, RunSpec, Study, StudyConfig, load_study, progress, read_result
from pretrain.engine.study_file import choose
from pretrain.engine.study_report import Spread, collect, format_report, make_rows, missing, verdict, write_report
from pretrain.engine.study_timing import distinct_phases, read_timing, time_study
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import WEIGHTS_FILE

ROOT = Path(__file__).resolve().parents[3]
# Detector studies, which have a `kind`, are another half's.
CHECKED_IN = [p for p in sorted((ROOT / "configs" / "studies").glob("*.yaml")) if "\nkind:" not in p.read_text()]
SMALL = {"name": "small", "steps": 3, "image_size": 32, "context_length": 6, "batch_size": 12, "lr": 1e-3}
LARGE = {**SMALL, "name": "large", "steps": 2, "image_size": 64, "context_length": 12}


@pytest.fixture
def make_study(run_config, tmp_path):
    """A function that writes a study of tiny runs and loads it; keywords replace its fields."""

    def make(**changes) -> Study:
        config = run_config(evaluation={"splits": ["val"]})
        (tmp_path / "base.yaml").write_text(to_yaml(config))
        node = {
            "title": "Tiny",
            "config": str(tmp_path / "base.yaml"),
            "seeds": [0, 1],
            "image_size": 64,
            "split": "val",
            "output": str(tmp_path / "runs"),
            "report": str(tmp_path / "studies" / "tiny.md"),
            "runs": [
                {"name": "baseline", "overrides": {"phases": [{**LARGE, "steps": 3}]}},
                {"name": "two", "label": "two phases", "overrides": {"phases": [SMALL, LARGE]}},
                {"name": "one", "overrides": {"phases": [SMALL], "optim.weight_decay": 0.1}, "also_at": [32]},
            ],
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**node, **changes}))
        return load_study(tmp_path / "tiny.yaml")

    return make


@pytest.fixture
def no_training(monkeypatch):
    """From the call of this fixture's value on, training anything is an error."""

    def forbid():
        def refuse(*_, **__):
            raise AssertionError("this must not train")

        monkeypatch.setattr(study_module, "Trainer", refuse)

    return forbid


def job_of(study: Study, name: str, seed: int = 0):
    return next(job for job in study.jobs if (job.spec.name, job.seed) == (name, seed))


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


# ---------------------------------------------------------------------------------------------------- what is run


def test_one_seed_of_everything_comes_first(make_study):
    names = ["baseline", "two", "one"]
    assert [(j.spec.name, j.seed) for j in make_study().jobs] == [(n, s) for s in (0, 1) for n in names]
    runs = [{"name": "baseline"}, {"name": "often", "seeds": [5, 6, 7]}]
    found = [(j.spec.name, j.seed) for j in make_study(runs=runs).jobs]
    assert found == [("baseline", 0), ("often", 5), ("baseline", 1), ("often", 6), ("often", 7)]


def test_a_run_is_the_configuration_its_overrides_and_its_seed(make_study):
    job = job_of(make_study(), "one", seed=1)
    assert job.config.run.seed == 1 and job.config.optim.weight_decay == 0.1
    assert [(p.name, p.steps, p.image_size) for p in job.config.phases] == [("small", 3, 32)]
    assert job.sizes == (64, 32)


def test_a_finished_run_is_skipped(make_study, no_training):
    job = job_of(make_study(), "baseline")
    assert progress(job) == "missing"
    result = study_module.run_job(job)
    assert progress(job) == "done"
    no_training()
    before = (job.folder / "result.json").stat().st_mtime_ns
    assert study_module.run_job(job_of(make_study(), "baseline")) == result
    assert (job.folder / "result.json").stat().st_mtime_ns == before
    assert not (job.folder / "state.pt").exists(), "a finished run needs no resumable state"


def test_a_run_without_a_phase_at_full_size_is_judged_at_both_sizes(make_study, tmp_path):
    job = job_of(make_study(), "one")
    result = study_module.run_job(job)
    assert set(result.zero_shot) == {"32", "64"}
    own = Trainer(replace(job.config, run=replace(job.config.run, output=str(tmp_path / "own"))))
    own.train()
    assert result.zero_shot["32"]["val"] == pytest.approx(own.results["small"]["val"].to_dict(), abs=1e-9)
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert result.train_seconds == lines[-1]["train_seconds"] > 0
    cost = phase_cost(job.config.phases[0], describe_towers(job.config.model))
    assert result.training_flops == cost.training_flops


def test_a_run_can_start_from_what_another_one_left_with_the_same_seed(make_study):
    runs = [
        {"name": "baseline", "overrides": {"phases": [SMALL]}},
        {"name": "more", "overrides": {"model.init": "@baseline", "phases": [{**SMALL, "steps": 1, "lr": 0.0}]}},
    ]
    study = make_study(runs=runs)
    for seed in (0, 1):
        first, second = job_of(study, "baseline", seed), job_of(study, "more", seed)
        assert second.config.model.init == str(first.folder / "checkpoint")
    study_module.run_job(first)
    study_module.run_job(second)
    left, right = (load_file(job.folder / "checkpoint" / WEIGHTS_FILE) for job in (first, second))
    assert torch.equal(left["text.token_embedding.weight"], right["text.token_embedding.weight"])
    with pytest.raises(ConfigError, match="run baseline: @more is no run before this one with the same seed: none"):
        make_study(
            runs=[{**runs[1], "name": "baseline", "overrides": {"model.init": "@more"}}, runs[0] | {"name": "b"}]
        )


def test_further_measures_are_those_of_their_own_evaluations(make_study, tmp_path):
    (tmp_path / "unseen.txt").write_text("yellow\n")
    small = {**SMALL, "batch_size": 9}
    runs = [{"name": "baseline", "overrides": {"phases": [small], "data.withhold": str(tmp_path / "unseen.txt")}}]
    study = make_study(runs=runs, further=True, seeds=[0])
    result = study_module.run_job(study.jobs[0])
    measured = result.zero_shot["64"]["val"]
    assert result.further["hit@1"] == pytest.approx(measured["top1"])
    assert result.further["hit@5"] == pytest.approx(measured["top5"])
    assert result.further["hit@10"] >= result.further["hit@5"]
    # 12 drawings of 12 names: from a drawing to its name is what zero-shot classification asks.
    mean = result.further["retrieval, mean R@1"]
    assert 2 * mean - result.further["text to image R@1"] == pytest.approx(measured["top1"])
    assert result.further["unseen, of 3: top-5"] == 1.0  # three yellow things, all of them among the first five
    page = format_report(study, collect(study), None)
    assert "| run | hit@1 | hit@2 |" in page and f"| baseline | {100 * result.further['hit@1']:.1f} |" in page
    without = make_study(runs=runs, seeds=[0]).jobs[0]
    assert read_result(without) is None and progress(without) == "trained"


def test_a_runs_folder_depends_on_what_is_set_not_on_defaults(make_study):
    config = make_study().jobs[0].config
    key = study_module.training_key(config)
    assert study_module.training_key(replace(config, optim=replace(config.optim, weight_decay=0.3))) != key
    assert study_module.training_key(replace(config, run=replace(config.run, log_every=7, output="x"))) == key
    changed = [replace(config.phases[0], token_dropping="random", keep_tokens=2)]
    assert study_module.training_key(replace(config, phases=changed)) != key
    unusual = study_module._unusual(config)
    assert "optim" not in unusual and "min_temperature" not in unusual["model"]
    assert unusual["phases"][0]["steps"] == 3 and "keep_tokens" not in unusual["phases"][0]


def test_a_changed_setting_runs_again_and_keeps_the_old_result(make_study):
    study = make_study()
    study_module.run_job(old := job_of(study, "baseline"))
    changed = {"phases": [{**LARGE, "steps": 2}]}
    job = job_of(make_study(runs=[{"name": "baseline", "overrides": changed}]), "baseline")
    assert progress(job) == "missing" and job.folder != old.folder
    assert len(losses(old.folder)) == 3 and progress(job_of(make_study(), "baseline")) == "done"


def test_how_often_something_is_written_changes_no_run(make_study):
    often = {"phases": [{**LARGE, "steps": 3}], "run.log_every": 2, "run.checkpoint_every": 1}
    other = make_study(runs=[{"name": "baseline", "overrides": often}])
    assert job_of(other, "baseline").folder == job_of(make_study(), "baseline").folder


def test_other_data_is_another_run(make_study, run_config, tmp_path):
    config = job_of(make_study(), "baseline").config
    table = tmp_path / "copy.csv"
    config.data.table = str(table)
    table.write_text("image,caption\na.png,cat\n")
    before = study_module.training_key(config)
    assert study_module.training_key(config) == before
    table.write_text("image,caption\na.png,dog\n")
    assert study_module.training_key(config) != before


def test_other_templates_are_judged_again_without_training(make_study, no_training):
    study = make_study()
    first = study_module.run_job(job_of(study, "baseline"))
    runs = [{"name": "baseline", "overrides": {"phases": [{**LARGE, "steps": 3}], "evaluation.templates": ["the {}"]}}]
    job = job_of(make_study(runs=runs), "baseline")
    assert progress(job) == "trained"
    no_training()
    again = study_module.run_job(job)
    assert again.judged != first.judged and again.train_seconds == first.train_seconds
    assert progress(job) == "done"


def test_a_stopped_run_continues_to_the_weights_and_accuracy_of_a_straight_one(make_study, monkeypatch, tmp_path):
    job = job_of(make_study(), "two")
    straight = replace(job.config, run=replace(job.config.run, output=str(tmp_path / "straight")))
    (own := Trainer(straight)).train()

    class Stopped(Exception):
        pass

    inner, calls = Trainer._step, []

    def dying(self, *arguments):
        if len(calls) == 4:  # in the second phase, one step after the state at the end of the first
            raise Stopped
        calls.append(1)
        return inner(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", dying)
    with pytest.raises(Stopped):
        study_module.run_job(job)
    assert progress(job) == "started" and read_result(job) is None
    monkeypatch.setattr(Trainer, "_step", inner)
    result = study_module.run_job(job)
    assert result.zero_shot["64"]["val"] == pytest.approx(own.results["large"]["val"].to_dict(), abs=1e-9)
    a, b = (load_file(folder / "checkpoint" / WEIGHTS_FILE) for folder in (job.folder, tmp_path / "straight"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(job.folder) == losses(tmp_path / "straight")


def test_a_damaged_result_counts_as_none(make_study):
    job = job_of(make_study(), "baseline")
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text('{"train_seconds": 1')
    assert read_result(job) is None and progress(job) == "missing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown field 'study.sedes': did you mean 'seeds'?"),
        ({"baseline": "bse"}, "study.baseline 'bse' is not among the runs: baseline, two, one"),
        ({"runs": [{"name": "baseline"}, {"name": "baseline"}]}, "'baseline' occurs twice"),
        ({"runs": [{"label": "x"}]}, "a run has no name"),
        ({"runs": []}, "a run has no name"),
        ({"seeds": []}, "study.seeds: at least one is needed"),
        ({"split": "test"}, "study.split 'test' is not among evaluation.splits ['val']"),
        ({"runs": [{"name": "baseline", "overrides": {"optim.nme": 1}}]}, "run baseline: unknown field 'optim.nme'"),
    ],
)
def test_mistakes_in_a_study_are_named(make_study, changes, message):
    with pytest.raises(ConfigError) as caught:
        make_study(**changes)
    assert message in str(caught.value)


def test_unknown_runs_and_files_are_named(make_study, tmp_path):
    study = make_study()
    assert [job.seed for job in choose(study.jobs, ["two"], "run")] == [0, 1]
    with pytest.raises(ConfigError, match="no run 'tow': baseline, two, one"):
        choose(study.jobs, ["tow"], "run")
    with pytest.raises(ConfigError, match="did you mean .*tiny.yaml"):
        load_study(tmp_path / "tinny.yaml")


# ---------------------------------------------------------------------------------------------------- the report


def result(top1: float, seconds: float, flops: int = 1000, top5: float = 0.5, sizes=("160",)) -> Result:
    values = {"top1": top1, "top5": top5, "images": 849, "classes": 861, "chance": 1 / 861}
    zero_shot = {size: {"val": {**values, "top1": top1 + 0.1}, "test": values} for size in sizes}
    return Result(seconds, flops, zero_shot, "", "2030-01-02", "a machine", "abcdef0123456789+changes")


@pytest.fixture
def measured():
    """(configuration, results) whose table can be computed by hand."""
    config = StudyConfig(
        title="Hand", image_size=160, seeds=[0, 1, 2],
        runs=[RunSpec("baseline"), RunSpec("fast", "the fast one"), RunSpec("odd", also_at=[64])],
    )  # fmt: skip
    results = {
        "baseline": {0: result(0.10, 1000, 6000), 1: result(0.12, 1100, 6000), 2: result(0.14, 1200, 6000)},
        "fast": {0: result(0.09, 100), 2: result(0.14, 120)},
        "odd": {1: result(0.05, 300, 2000, sizes=("160", "64"))},
    }
    return config, results


def test_the_table_is_the_one_computed_by_hand(measured):
    baseline, fast, odd, odd_small = make_rows(*measured)
    top1, top5 = baseline.accuracy["test"]
    assert (top1.mean, top1.deviation) == (pytest.approx(12), pytest.approx(2)) and top5.mean == 50
    assert baseline.accuracy["val"][0].mean == pytest.approx(22)
    assert (baseline.seconds.mean, baseline.seconds.deviation) == (1100, 100)
    assert baseline.difference is None and baseline.time_ratio == baseline.flop_ratio == 1
    # Seeds 0 and 2 only: -1 and 0 points; (1000 + 1200) / (100 + 120) = 10; 6000 / 1000 = 6.
    assert fast.seeds == [0, 2] and fast.difference.mean == pytest.approx(-0.5)
    assert fast.difference.deviation == pytest.approx(math.sqrt(0.5))
    assert (fast.time_ratio, fast.flop_ratio) == (pytest.approx(10), pytest.approx(6))
    # Seed 1 only: 5 - 12 points, 1100 / 300, and no spread.
    assert odd.difference == Spread(pytest.approx(-7), None)
    assert (odd.time_ratio, odd.flop_ratio) == (pytest.approx(11 / 3), pytest.approx(3))
    assert odd_small.label == "odd, judged at 64 px" and odd_small.difference.mean == pytest.approx(-7)


def test_spreads_are_sample_deviations_as_text():
    assert Spread.of([1.0, 2.0, 4.0]).deviation == pytest.approx(statistics.stdev([1, 2, 4]))
    assert Spread.of([3.14]).text() == "3.1" and Spread.of([1.0, 3.0]).text() == "2.0 ± 1.4"
    assert Spread.of([-0.26]).text(1, "+") == "-0.3" and Spread.of([0.26]).text(1, "+") == "+0.3"


def test_the_verdict_says_which_runs_meet_the_aim_and_how_near_the_others_come(measured):
    config, results = measured
    assert "Met by the fast one (-0.5 ± 0.7 points at 10.0x less time)" in verdict(config, make_rows(config, results))
    assert "reaches 12.0 %" not in verdict(config, make_rows(config, results)), "a point is little beside 12"
    assert "The baseline itself reaches 12.0 %" in verdict(replace(config, aim_points=2), make_rows(config, results))
    strict = verdict(replace(config, aim_points=0.1), make_rows(config, results))
    assert "Not met. Most accurate at that speed: the fast one" in strict and "within that accuracy" not in strict
    slow = verdict(replace(config, aim_ratio=20), make_rows(config, results))
    assert "Not met. Fastest of all: the fast one" in slow and "Fastest within that accuracy: the fast one" in slow
    none = verdict(config, make_rows(config, {**results, "fast": {}, "odd": {}}))
    assert "Nothing to compare yet" in none


def test_runs_judged_at_sizes_of_their_own_have_a_verdict_apart(measured):
    config, results = measured
    odd = results["odd"][1]
    small = {split: {**values, "top1": 0.13} for split, values in odd.zero_shot["64"].items()}
    better = replace(odd, train_seconds=110, zero_shot={**odd.zero_shot, "64": small})
    full, own = verdict(
        replace(config, aim_ratio=9.5), make_rows(config, {**results, "fast": {}, "odd": {1: better}})
    ).split("Judged at any size of their own:")
    assert "Not met. Most accurate at that speed: odd (-7.0 points at 10.0x less time)" in full
    assert "Met by odd, judged at 64 px (+1.0 points at 10.0x less time)" in own
    alone = make_rows(replace(config, runs=config.runs[:2]), results)
    assert "of their own" not in verdict(config, alone)


def test_a_partial_study_says_what_is_missing(measured):
    config, results = measured
    study = Study(Path("configs/studies/hand.yaml"), config, [])
    jobs = [study_module.Job(spec, seed, None, (160,)) for seed in config.seeds for spec in config.runs]
    study = replace(study, jobs=jobs)
    assert missing(study, results) == ["fast: seed 1", "odd: seeds 0, 2"]
    page = format_report(study, results, Path("hand.png"))
    assert "**Not complete.**" in page and "- odd: seeds 0, 2" in page and "(hand.png)" in page
    assert "| the fast one | 2 | 11.5 ± 3.5 |" in page and "| 110 ± 14 |" in page
    for words in ("a machine", "2030-01-02", "seeds 0, 1, 2", "code abcdef0123\n", "--study configs/studies/hand.yaml"):
        assert words in page
    without = format_report(study, {**results, "baseline": {}}, None)
    assert "- baseline: seeds 0, 1, 2" in without and "Nothing to compare yet" in without
    assert "Nothing is measured yet" in format_report(study, {name: {} for name in results}, None)


def write_result(job, train_seconds: float) -> None:
    """As if the job had run."""
    measured = {"top1": 0.1, "top5": 0.5, "chance": 0.1, "images": 4, "classes": 12}
    done = Result(
        train_seconds, 1000, {str(size): {"val": measured} for size in job.sizes}, study_module._judged(job),
        "today", "here", "code",
    )  # fmt: skip
    write_atomically(job.folder / "result.json", json.dumps(asdict(done)))


def test_times_come_from_the_timing_of_phases_where_there_is_one(make_study):
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
    changed = make_study(seeds=[0], runs=[{"name": "baseline", "overrides": {"phases": [{**LARGE, "batch_size": 6}]}}])
    assert read_timing(changed) is None  # a phase that was never timed: as the runs went


def test_runs_of_equal_time_have_their_steps_from_the_timing(make_study):
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
        make_study(seconds=70, runs=[{"name": "baseline", "overrides": {"phases": [{**SMALL, "image_size": 96}]}}])


def test_timing_measures_steps_of_the_real_loop(make_study):
    study = make_study(seeds=[0])
    timing = time_study(study, repeats=2, steps=1)
    assert read_timing(study) == replace(timing, spread={key: list(value) for key, value in timing.spread.items()})
    assert timing.seconds.keys() == distinct_phases(study).keys() and all(t > 0 for t in timing.seconds.values())


def test_the_plot_is_an_image_with_something_on_it(make_study):
    study = make_study(seeds=[0])
    assert write_report(study)[1] is None, "nothing to plot before the first result"
    for job in study.jobs:
        values = {"top1": 0.1, "top5": 0.2, "images": 12, "classes": 12, "chance": 1 / 12}
        zero_shot = {str(size): {"val": values} for size in job.sizes}
        done = replace(result(0, 60), zero_shot=zero_shot, judged=study_module._judged(job))
        write_atomically(job.folder / "result.json", json.dumps(asdict(done)))
    table, plot = write_report(study)
    assert "**Not complete.**" not in table.read_text() and plot.name in table.read_text()
    with Image.open(plot) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert str(plot.parent) not in table.read_text(), "a checked-in page names no folder of this machine"


# ---------------------------------------------------------------------------------------------------- the tool


@pytest.fixture
def main():
    """The command's function; loading the file must leave the import path as it was."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("tools_study", ROOT / "tools" / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module.main


def test_the_command_lists_runs_and_reports(make_study, main, tmp_path, capsys, no_training):
    make_study(seeds=[0])
    command = ["--study", str(tmp_path / "tiny.yaml")]
    assert main([*command, "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["missing"] * 3
    assert main([*command, "--only", "one"]) == 0
    out = capsys.readouterr().out
    assert "one seed 0" in out and "| one, judged at 32 px | 1 |" in out and "- two: seed 0" in out
    no_training()
    assert main([*command, "--only", "one"]) == 0 and main([*command, "--report"]) == 0
    capsys.readouterr()
    assert main([*command, "--only", "tow"]) == 1
    assert "error: the study has no run 'tow'" in capsys.readouterr().err


def test_a_run_that_diverges_does_not_stop_the_others(make_study, main, tmp_path, capsys):
    wild = {"phases": [{**SMALL, "lr": 1e30, "warmup_steps": 0}]}
    runs = [{"name": "wild", "overrides": wild}, {"name": "baseline", "overrides": {"phases": [{**SMALL, "steps": 1}]}}]
    make_study(seeds=[0], runs=runs)
    assert main(["--study", str(tmp_path / "tiny.yaml")]) == 1
    out, err = capsys.readouterr()
    assert "the loss became" in err and "- wild: seed 0" in out and "| baseline | 1 |" in out


# ------------------------------------------------------------------------------------------- the checked-in study


@pytest.mark.parametrize("path", CHECKED_IN, ids=lambda path: path.name)
def test_a_checked_in_study_compares_what_it_says(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path, timed=False)
    assert f"tools/study.py --study configs/studies/{path.name}" in path.read_text()
    jobs = {job.spec.name: job for job in study.jobs if job.seed == 0}
    full = jobs[study.config.baseline].config
    assert len({job.seed for job in study.jobs}) == 3
    assert [phase.image_size for phase in full.phases] == [study.config.image_size]
    towers = describe_towers(full.model)
    for name, job in jobs.items():
        assert job.config.optim == full.optim and job.config.data == full.data, name
        assert job.config.phases[0].batch_size == full.phases[0].batch_size
        if study.config.seconds:  # equal time instead, from what a step takes
            continue
        main = [phase for phase in job.config.phases if not phase.name.startswith("finetune")]
        if name in ("ladder", "short_baseline"):
            cost, whole = study_module.training_flops(job.config), study_module.training_flops(full)
            assert 5 < whole / cost < 9, f"{name}: a sixth of the time"
        else:
            assert sum(phase.steps for phase in main) == full.phases[0].steps, f"{name}: equal epochs"
        if main[0].token_dropping != "none":
            assert towers.image.image_tokens(main[0]) == towers.image.image_tokens(jobs["reclip"].config.phases[0]), (
                name
            )
