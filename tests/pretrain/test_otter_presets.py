"""OTTER's presets: the published settings, and minis that differ from the study's parent in the objective alone."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config import RunConfig, load_config
from pretrain.engine.cost import describe_towers
from pretrain.engine.schedule import lr_at
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.otter import OtterOptions

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
MINIS = {"otter_mini": "otter", "label_smoothing_mini": "label_smoothing", "distillation_mini": "distillation"}


def test_the_published_settings():
    config = load_config(FOLDER / "otter_cc3m.yaml")
    phase = config.phases[0]
    assert OtterOptions(**config.objective.options) == OtterOptions(init_temperature=0.020242)
    assert math.log(1 / config.objective.options["init_temperature"]) == pytest.approx(3.9, abs=1e-4)
    assert (phase.batch_size, phase.image_size, phase.schedule, phase.warmup_steps) == (512, 224, "cosine", 0)
    assert phase.steps == 10 * (2_911_810 // 512)
    assert lr_at(0, phase) == pytest.approx(2 * 3e-3)  # the mean of two directions, not their sum
    assert math.log(1 / config.model.init_temperature) == pytest.approx(3.9, abs=1e-4)
    assert (config.optim.name, config.optim.options, config.optim.weight_decay) == ("momentum", {"momentum": 0.9}, 0)
    augmentation = config.data.augmentation
    assert (augmentation.crop_short_side, augmentation.flip, augmentation.colour) == (256, False, 0)
    towers = describe_towers(config.model)
    image = sum(p.numel() for p in towers.module.visual.parameters())
    assert 20e6 < image < 27e6  # a ResNet-50 has 25.6 million


@pytest.mark.parametrize(("name", "objective"), MINIS.items())
def test_a_mini_is_the_studys_run_with_another_objective(name, objective):
    config, parent = load_config(FOLDER / f"{name}.yaml"), load_config(FOLDER / "study_mini.yaml")
    assert config.objective.name == objective and objective in OBJECTIVES
    OBJECTIVES[objective][1](**config.objective.options)
    assert config.run.output == f"runs/{name}"
    assert replace(config, objective=parent.objective, run=RunConfig()) == replace(parent, run=RunConfig())
    assert replace(config.run, output="") == replace(parent.run, output="")


@pytest.mark.parametrize("name", ["info_nce_cc3m", "distillation_cc3m", "label_smoothing_cc3m"])
def test_a_published_baseline_differs_from_otter_in_the_objective_alone(name):
    config, otter = load_config(FOLDER / f"{name}.yaml"), load_config(FOLDER / "otter_cc3m.yaml")
    assert config.objective.name == name.removesuffix("_cc3m") and config.run.output == f"runs/{name}"
    own = OBJECTIVES[config.objective.name][1]
    changed = {"init_temperature": 0.020242} if name == "distillation_cc3m" else {}
    assert own(**config.objective.options) == own(**changed)
    assert replace(config, objective=otter.objective, run=RunConfig()) == replace(otter, run=RunConfig())
    assert replace(config.run, output="") == replace(otter.run, output="")


@pytest.mark.parametrize("name", ["otter_cc3m", "info_nce_cc3m", "distillation_cc3m", "label_smoothing_cc3m", *MINIS])
def test_the_opening_comment_gives_the_command_and_what_was_measured_if_anything(name):
    comment = " ".join(line[1:] for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line[:1] == "#")
    assert f"python tools/pretrain.py --config configs/pretrain/{name}.yaml" in comment
    if name not in MINIS:  # test_measured_minis.py is about the others' numbers
        assert "not yet measured" in comment
