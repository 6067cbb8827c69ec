"""OTTER's presets: the published settings, and minis that differ from the study's parent in the objective alone."""

import math
import re
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
IN_TABLES = {"otter_mini": "OTTER", "label_smoothing_mini": "label smoothing", "distillation_mini": "distillation"}


def test_the_published_settings():
    config = load_config(FOLDER / "otter_cc3m.yaml")
    phase = config.phases[0]
    assert OtterOptions(**config.objective.options) == OtterOptions()
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


@pytest.mark.parametrize("name", ["otter_cc3m", *MINIS])
def test_the_opening_comment_gives_the_command_and_what_was_measured_if_anything(name):
    comment = " ".join(line[1:] for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line[:1] == "#")
    assert f"python tools/pretrain.py --config configs/pretrain/{name}.yaml" in comment
    if name not in MINIS:
        assert "not yet measured" in comment
        return
    page = (FOLDER.parents[1] / "studies/objectives_mini.md").read_text()
    rows = dict(re.findall(r"^\| (.*), RECLIP \| 3 \| (.*?) \|", page, re.M))
    for row in (rows[IN_TABLES[name]], rows["InfoNCE"]):
        assert f"{row.replace('±', '+-')} %" in comment, "the comment has the study's numbers"
