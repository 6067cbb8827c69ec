"""UTA's presets: the published values, and towers that fit the teachers they name."""

from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.modeling.clip import build_model
from pretrain.objectives import build_objective

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "pretrain"


def test_the_base_preset_has_the_published_values():
    config = load_config(FOLDER / "uta_b16.yaml")
    align, fine = config.phases
    assert (align.image_size, align.batch_size, align.lr, align.final_lr) == (224, 4096, 1.5e-3, 1e-5)
    epoch = 14_197_122 / 4096  # ImageNet-21k
    assert align.steps == pytest.approx(150 * epoch, rel=1e-4) and align.warmup_steps == round(epoch)
    assert (align.objective.name, align.objective.options["mask_ratio"]) == ("uta", 0.4)
    assert (align.optim.name, align.optim.weight_decay) == ("adamw", 0.05)
    assert (fine.batch_size, fine.lr, fine.final_lr) == (49152, 2e-4, 0)
    assert (fine.objective.name, fine.objective.options["fixed_temperature"]) == ("info_nce", 0.01)
    assert (fine.optim.name, fine.optim.weight_decay, fine.optim.layer_decay) == ("lamb", 0.05, 0.75)
    assert align.schedule == fine.schedule == "cosine"


def test_the_large_preset_has_the_papers_values_for_it_and_else_the_bases():
    config, base = load_config(FOLDER / "uta_l16.yaml"), load_config(FOLDER / "uta_b16.yaml")
    align, fine = config.phases
    assert "vit_large_patch16" in config.model.image.timm_model
    assert align.objective.options["mask_ratio"] == 0.5 and fine.lr == 4e-4 and fine.optim.layer_decay == 0.85
    for own, other in zip(config.phases, base.phases, strict=True):
        for field in ("steps", "image_size", "context_length", "batch_size", "warmup_steps", "schedule", "final_lr"):
            assert getattr(own, field) == getattr(other, field)
        assert (own.objective.name, own.optim.name) == (other.objective.name, other.optim.name)
    assert align.lr == base.phases[0].lr
    assert align.objective.options["teacher"] == base.phases[0].objective.options["teacher"]


@pytest.mark.parametrize("name", ["uta_b16", "uta_l16"])
def test_a_preset_fits_the_teacher_it_names(name):
    config = load_config(FOLDER / f"{name}.yaml")
    teacher = Path(config.phases[0].objective.options["teacher"]).parent.name
    source = load_config(FOLDER / f"{teacher}.yaml")
    assert (config.model.text, config.model.embed_dim) == (source.model.text, source.model.embed_dim)
    assert "patch16" in config.model.image.timm_model and "patch16" in source.model.image.timm_model


@pytest.mark.parametrize("name", ["uta", "masked_features"])
def test_a_mini_preset_is_the_study_with_the_teacher_of_the_package(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, study = load_config(FOLDER / f"{name}_mini.yaml"), load_config(FOLDER / "study_mini.yaml")
    for phase, other in zip(config.phases, study.phases, strict=True):
        assert phase.image_size == 64  # at the study's 32 px there are four patches to mask
        for field in ("steps", "context_length", "batch_size", "lr", "warmup_steps"):
            assert getattr(phase, field) == getattr(other, field)
    assert (config.model, config.data, config.optim) == (study.model, study.data, study.optim)
    assert [phase.objective.name for phase in config.phases] == [name, "info_nce"]
    assert config.run.output == f"runs/{name}_mini"
    model = build_model(config.model)
    for phase in config.phases:
        objective = build_objective(config, model, phase)
        objective.enter_phase(phase)
        assert objective.model is model
    assert f"--config configs/pretrain/{name}_mini.yaml" in (FOLDER / f"{name}_mini.yaml").read_text()
