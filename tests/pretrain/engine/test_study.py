"""Studies: what is run, skipped, continued and run again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.config import ConfigError
from pretrain.engine import study as study_module
from pretrain.engine.cost import describe_towers, phase_cost
from pretrain.engine.study import progress, read_result
from pretrain.engine.study_report import collect, format_report
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import WEIGHTS_FILE


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def main(command):
    return command("study")


def test_a_finished_run_is_skipped(make_study, no_training, job_of):
    job = job_of(make_study(), "baseline")
    assert progress(job) == "missing"
    result = study_module.run_job(job)
    assert progress(job) == "done"
    no_training()
    before = (job.folder / "result.json").stat().st_mtime_ns
    assert study_module.run_job(job_of(make_study(), "baseline")) == result
    assert (job.folder / "result.json").stat().st_mtime_ns == before
    assert not (job.folder / "state.pt").exists(), "a finished run needs no resumable state"


def test_a_run_without_a_phase_at_full_size_is_judged_at_both_sizes(make_study, tmp_path, job_of):
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


def test_a_run_can_start_from_what_another_one_left_with_the_same_seed(make_study, small, job_of):
    runs = [
        {"name": "baseline", "overrides": {"phases": [small]}},
        {"name": "more", "overrides": {"model.init": "@baseline", "phases": [{**small, "steps": 1, "lr": 0.0}]}},
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


def test_further_measures_are_those_of_their_own_evaluations(make_study, tmp_path, small):
    (tmp_path / "unseen.txt").write_text("yellow\n")
    small = {**small, "batch_size": 9}
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


def test_a_changed_setting_runs_again_and_keeps_the_old_result(make_study, large, job_of):
    study = make_study()
    study_module.run_job(old := job_of(study, "baseline"))
    changed = {"phases": [{**large, "steps": 2}]}
    job = job_of(make_study(runs=[{"name": "baseline", "overrides": changed}]), "baseline")
    assert progress(job) == "missing" and job.folder != old.folder
    assert len(losses(old.folder)) == 3 and progress(job_of(make_study(), "baseline")) == "done"


def test_how_often_something_is_written_changes_no_run(make_study, large, job_of):
    often = {"phases": [{**large, "steps": 3}], "run.log_every": 2, "run.checkpoint_every": 1}
    other = make_study(runs=[{"name": "baseline", "overrides": often}])
    assert job_of(other, "baseline").folder == job_of(make_study(), "baseline").folder


def test_other_data_is_another_run(make_study, run_config, tmp_path, job_of):
    config = job_of(make_study(), "baseline").config
    table = tmp_path / "copy.csv"
    config.data.table = str(table)
    table.write_text("image,caption\na.png,cat\n")
    before = study_module.training_key(config)
    assert study_module.training_key(config) == before
    table.write_text("image,caption\na.png,dog\n")
    assert study_module.training_key(config) != before


def test_other_templates_are_judged_again_without_training(make_study, no_training, large, job_of):
    study = make_study()
    first = study_module.run_job(job_of(study, "baseline"))
    runs = [{"name": "baseline", "overrides": {"phases": [{**large, "steps": 3}], "evaluation.templates": ["the {}"]}}]
    job = job_of(make_study(runs=runs), "baseline")
    assert progress(job) == "trained"
    no_training()
    again = study_module.run_job(job)
    assert again.judged != first.judged and again.train_seconds == first.train_seconds
    assert progress(job) == "done"


def test_a_stopped_run_continues_to_the_weights_and_accuracy_of_a_straight_one(
    make_study, monkeypatch, tmp_path, job_of
):
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


def test_a_damaged_result_counts_as_none(make_study, job_of):
    job = job_of(make_study(), "baseline")
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text('{"train_seconds": 1')
    assert read_result(job) is None and progress(job) == "missing"


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


def test_a_run_that_diverges_does_not_stop_the_others(make_study, main, tmp_path, capsys, small):
    wild = {"phases": [{**small, "lr": 1e30, "warmup_steps": 0}]}
    runs = [{"name": "wild", "overrides": wild}, {"name": "baseline", "overrides": {"phases": [{**small, "steps": 1}]}}]
    make_study(seeds=[0], runs=runs)
    assert main(["--study", str(tmp_path / "tiny.yaml")]) == 1
    out, err = capsys.readouterr()
    assert "the loss became" in err and "- wild: seed 0" in out and "| baseline | 1 |" in out
