"""A study file: jobs in the order to run them, what each is, and which mistakes are named."""

from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.engine import study as study_module
from pretrain.engine.cost import describe_towers
from pretrain.engine.study import load_study
from pretrain.engine.study_file import choose

ROOT = Path(__file__).resolve().parents[3]
# Detector studies, which have a `kind`, are another half's.
CHECKED_IN = [p for p in sorted((ROOT / "configs" / "studies").glob("*.yaml")) if "\nkind:" not in p.read_text()]
EQUAL_STEPS = ROOT / "configs/studies/objectives_steps_mini.yaml"
AFTER_ALIGNMENT = ROOT / "configs/studies/uta_sizes_mini.yaml"


def test_one_seed_of_everything_comes_first(make_study):
    names = ["baseline", "two", "one"]
    assert [(j.spec.name, j.seed) for j in make_study().jobs] == [(n, s) for s in (0, 1) for n in names]
    runs = [{"name": "baseline"}, {"name": "often", "seeds": [5, 6, 7]}]
    found = [(j.spec.name, j.seed) for j in make_study(runs=runs).jobs]
    assert found == [("baseline", 0), ("often", 5), ("baseline", 1), ("often", 6), ("often", 7)]


def test_a_run_is_the_configuration_its_overrides_and_its_seed(make_study, job_of):
    job = job_of(make_study(), "one", seed=1)
    assert job.config.run.seed == 1 and job.config.optim.weight_decay == 0.1
    assert [(p.name, p.steps, p.image_size) for p in job.config.phases] == [("small", 3, 32)]
    assert job.sizes == (64, 32)


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


def test_the_study_of_equal_steps_gives_every_objective_the_same_steps_of_the_same_pairs(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = {job.spec.name: job for job in load_study(EQUAL_STEPS).jobs if job.seed == 0}
    timed = load_study(ROOT / "configs/studies/objectives_mini.yaml", timed=False)
    curriculum = next(job.config.phases for job in timed.jobs if job.spec.name == "info_nce_reclip")
    assert len({job.config.objective.name for job in jobs.values()}) == 4
    repeats = ("info_nce_repeats", "distillation_repeats", "otter_repeats")
    for names in (
        ("info_nce", "distillation", "otter", "clip_rocket", *repeats),
        ("info_nce_trained", "otter_trained"),
    ):
        assert all(jobs[name].config.phases == jobs[names[0]].config.phases for name in names)
    own = jobs["info_nce"].config.phases
    assert [(p.image_size, p.context_length, p.lr) for p in own] == [
        (p.image_size, p.context_length, p.lr) for p in curriculum
    ]
    first = str(jobs["info_nce"].folder / "checkpoint")
    assert all(jobs[name].config.model.init == first for name in ("info_nce_trained", "otter_trained"))
    for name, job in jobs.items():
        assert job.config.optim == jobs["info_nce"].config.optim
        assert job.config.data.unique_by == (None if name in repeats else "concept")
        assert replace(job.config.data, unique_by="concept") == jobs["info_nce"].config.data


def test_the_study_of_utas_sizes_continues_one_alignment(monkeypatch):
    monkeypatch.chdir(ROOT)
    for seed in (0, 1):
        jobs = {job.spec.name: job for job in load_study(AFTER_ALIGNMENT).jobs if job.seed == seed}
        start = jobs["alignment"].config
        for name in ("full_size", "small", "small_then_full", "short"):
            config = jobs[name].config
            assert config.model.init == str(jobs["alignment"].folder / "checkpoint")
            assert all(config.objective_of(phase).name == "info_nce" for phase in config.phases)
            assert (config.data, config.optim, config.run.seed) == (start.data, start.optim, seed)
        from_nothing = jobs["small_alignment"].config
        assert from_nothing.model.init is None
        assert [from_nothing.objective_of(phase).name for phase in from_nothing.phases] == ["uta", "uta", "info_nce"]


@pytest.mark.parametrize("path", sorted(set(CHECKED_IN) - {EQUAL_STEPS, AFTER_ALIGNMENT}), ids=lambda path: path.name)
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
