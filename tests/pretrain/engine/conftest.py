"""Studies of tiny runs, for the tests of their parts."""

import pytest
import yaml

from pretrain.config import to_yaml
from pretrain.engine import study as study_module
from pretrain.engine.study import Job, Study, load_study


@pytest.fixture
def small() -> dict:
    """A phase of 3 steps at 32 px."""
    return {"name": "small", "steps": 3, "image_size": 32, "context_length": 6, "batch_size": 12, "lr": 1e-3}


@pytest.fixture
def large(small) -> dict:
    """A phase of 2 steps at 64 px."""
    return {**small, "name": "large", "steps": 2, "image_size": 64, "context_length": 12}


@pytest.fixture
def make_study(run_config, tmp_path, small, large):
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
                {"name": "baseline", "overrides": {"phases": [{**large, "steps": 3}]}},
                {"name": "two", "label": "two phases", "overrides": {"phases": [small, large]}},
                {"name": "one", "overrides": {"phases": [small], "optim.weight_decay": 0.1}, "also_at": [32]},
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


@pytest.fixture
def job_of():
    """`job_of(study, name, seed=0)`: that run's job."""

    def find(study: Study, name: str, seed: int = 0) -> Job:
        return next(job for job in study.jobs if (job.spec.name, job.seed) == (name, seed))

    return find
