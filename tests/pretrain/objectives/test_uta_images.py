"""Training from a teacher on images without captions: whole runs, and which phases may."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretrain.config import ConfigError, ObjectiveConfig, PhaseConfig, PretrainConfig, load_config
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import save_checkpoint
from pretrain.modeling.clip import build_model
from pretrain.objectives import OBJECTIVES, build_objective, caption_reader, passes_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run_teacher(run_config, tmp_path) -> str:
    config = run_config(output="unused").model
    torch.manual_seed(7)
    return str(save_checkpoint(tmp_path / "run_teacher", build_model(config), config))


def align(teacher: str, name: str = "uta") -> dict:
    return {"name": "align", "steps": 2, "objective": {"name": name, "options": {"teacher": teacher}}}


def losses(config: PretrainConfig) -> list[float]:
    lines = map(json.loads, (Path(config.run.output) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", ["uta", "masked_features"])
def test_two_steps_train_on_images_alone(run_config, run_teacher, images_alone, name):
    config = run_config([align(run_teacher, name)], data=images_alone[1], evaluation={"splits": []})
    trainer = Trainer(config)
    before = trainer.model.visual.trunk.blocks[0].mlp.fc1.weight.detach().clone()
    trainer.train()
    assert len(losses(config)) == 2 and all(-1 <= loss <= 1 for loss in losses(config))
    assert not torch.equal(trainer.model.visual.trunk.blocks[0].mlp.fc1.weight, before)


def test_images_alone_and_the_same_with_captions_train_to_the_same_losses(run_config, run_teacher, pairs_table):
    """Captions change nothing that `uta` draws or sees."""
    rows = [line.split(",") for line in pairs_table.read_text().splitlines()]
    alone = pairs_table.with_name("alone.csv")
    alone.write_text("".join(f"{row[0]},{row[-1]}\n" for row in rows))
    found = []
    for number, path in enumerate((pairs_table, alone)):
        data = {"table": str(path), "unique_by": None}
        config = run_config([align(run_teacher)], output=f"run{number}", data=data, evaluation={"splits": []})
        Trainer(config).train()
        found.append(losses(config))
    assert len(found[0]) == 2 and found[0] == found[1]


def test_a_contrastive_phase_on_images_alone_is_refused_by_its_name(run_config, run_teacher, images_alone):
    """At the start; or at the first batch of any phase, where only reading its JSON tells that a sample has none."""
    phases = [align(run_teacher), {"name": "tune", "steps": 1}]
    config = run_config(phases, data=images_alone[1], evaluation={"splits": []})
    with pytest.raises((ConfigError, OSError), match="phase tune .info_nce. needs captions"):
        Trainer(config).train()
    assert not (Path(config.run.output) / "metrics.jsonl").exists() or losses(config) == []


def test_the_student_is_evaluated_on_a_split_with_names(run_config, run_teacher, pairs_table):
    """While the training rows have none."""
    lines = [re.sub(r"^([^,]*),[^,]*,(.*),train$", r"\1,,\2,train", s) for s in pairs_table.read_text().splitlines()]
    table = pairs_table.with_name("names_in_val.csv")
    table.write_text("\n".join(lines) + "\n")
    trainer = Trainer(run_config([align(run_teacher)], data={"table": str(table)}))
    trainer.train()
    result = trainer.results["align"]["val"]
    assert len(trainer.data.training) == 36 and (result.classes, result.images) == (12, 12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_captions_are_needed_by_the_objectives_whose_views_have_texts(run_config, run_teacher, name):
    config = run_config(output="unused")
    config.objective = ObjectiveConfig(name, {"teacher": run_teacher} if name in ("uta", "masked_features") else {})
    objective = build_objective(config, build_model(config.model))
    passes, views = passes_of(config), objective.views(config.data, config.phases[0], [])
    assert bool(views.captions) == bool(passes.texts + passes.teacher_texts) == bool(caption_reader(config))


def test_the_reader_of_captions_is_the_first_phase_that_has_texts():
    config = PretrainConfig(phases=[PhaseConfig("a"), PhaseConfig("b"), PhaseConfig("c")])
    config.objective = ObjectiveConfig("otter")
    config.phases[0].objective = ObjectiveConfig("masked_features")
    assert caption_reader(config) == "phase b (otter)"
    for phase in config.phases[1:]:
        phase.objective = ObjectiveConfig("uta")
    assert caption_reader(config) == ""


def test_the_configuration_that_the_documentation_shows_reads_a_folder(tmp_path, monkeypatch):
    text = (ROOT / "docs/data.md").read_text()
    shown = re.search(r"^# new file: (\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    path = tmp_path / Path(shown[1]).name
    path.write_text(shown[2].replace("parent: ", f"parent: {ROOT}/configs/pretrain/"))
    monkeypatch.chdir(ROOT)  # its teacher is the package's
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(pictures / f"{number}.jpg")
    small = ["phases.0.steps=1", "phases.0.batch_size=4", "phases.0.warmup_steps=0", "data.workers=0"]
    places = [f"data.table={pictures}", f"run.output={tmp_path / 'run'}", "run.device=cpu"]
    assert Trainer(load_config(path, [*small, *places])).train().is_dir()
