"""Alignment with a teacher, then contrastive fine-tuning: whole runs of two phases, resumed to the bit in each."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import WEIGHTS_FILE, save_checkpoint
from pretrain.modeling.clip import build_model


def phases(teacher: str, name: str) -> list[dict]:
    return [
        {
            "name": "align", "steps": 2, "context_length": 6, "image_size": 48,
            "objective": {"name": name, "options": {"teacher": teacher}},
        },
        {
            "name": "finetune", "steps": 2, "image_size": 32,
            "objective": {"name": "info_nce", "options": {"fixed_temperature": 0.01}},
            "optim": {"name": "lamb", "layer_decay": 0.75, "weight_decay": 0.05},
        },
    ]  # fmt: skip


@pytest.fixture
def run_teacher(run_config, tmp_path) -> str:
    config = run_config(output="unused").model
    torch.manual_seed(7)
    return str(save_checkpoint(tmp_path / "run_teacher", build_model(config), config))


class Stopped(Exception):
    """Stands for the power failing."""


def stop_before(trainer: Trainer, step: int) -> None:
    """Let the trainer die right before its step of this number (0-based, over all phases)."""
    inner, done = trainer._step, []

    def counted(*arguments):
        if len(done) == step:
            raise Stopped
        done.append(1)
        return inner(*arguments)

    trainer._step = counted
    with pytest.raises(Stopped):
        trainer.train()


def curve(folder: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines if "zero_shot_val_top1" in line} == {"align", "finetune"}
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize(("name", "stops"), [("uta", (1, 3)), ("masked_features", (1,))])
def test_alignment_then_fine_tuning_resumes_to_the_bit(run_config, run_teacher, name, stops):
    """Stopped within either phase; the optimiser changes with the phase."""
    straight = run_config(phases(run_teacher, name), output="straight").run.output
    Trainer(run_config(phases(run_teacher, name), output="straight")).train()
    weights = load_file(Path(straight) / "checkpoint" / WEIGHTS_FILE)
    for stop in stops:
        config = run_config(phases(run_teacher, name), output=f"stopped{stop}", run={"checkpoint_every": 1})
        stop_before(Trainer(config), stop)
        Trainer(config, resume=True).train()
        resumed = load_file(Path(config.run.output) / "checkpoint" / WEIGHTS_FILE)
        assert curve(config.run.output) == curve(straight) and len(curve(straight)) == 4
        assert weights.keys() == resumed.keys() and all(torch.equal(weights[key], resumed[key]) for key in weights)
    assert weights["logit_scale"].exp().item() == pytest.approx(100, rel=1e-6)
    before = load_file(Path(run_teacher) / WEIGHTS_FILE)
    assert not torch.equal(weights["text.ln_final.weight"], before["text.ln_final.weight"])


def trained(phases_: list[dict], run_config, output: str, stop: int, before_resuming) -> dict:
    """The weights of a run that stopped before a step (0: never) and went on."""
    config = run_config(phases_, output=output, run={"checkpoint_every": 1})
    if stop:
        stop_before(Trainer(config), stop)
        before_resuming()
    Trainer(config, resume=bool(stop)).train()
    return load_file(Path(config.run.output) / "checkpoint" / WEIGHTS_FILE)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_resumes_without_its_teachers_folder(run_config, run_teacher, stop):
    """Within the phase that learns from it, at that phase's end, and in the next phase."""
    wanted = trained(phases(run_teacher, "uta"), run_config, "straight", 0, None)
    found = trained(phases(run_teacher, "uta"), run_config, "stopped", stop, lambda: shutil.rmtree(run_teacher))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_another_teacher_in_the_next_phase_is_not_the_old_one(run_config, run_teacher, tmp_path):
    """The rest of the objective's state is taken over; what the option names is not."""
    config = run_config(output="unused").model
    torch.manual_seed(8)
    other = str(save_checkpoint(tmp_path / "other_teacher", build_model(config), config))
    first, second = (phases(teacher, "masked_features")[0] for teacher in (run_teacher, other))
    trainer = Trainer(run_config([first, {**second, "lr": 0.0, "name": "again"}]))
    trainer.train()
    tower = load_file(Path(other) / WEIGHTS_FILE)["visual.trunk.blocks.0.mlp.fc1.weight"]
    assert torch.equal(trainer.objective.teacher.visual.trunk.blocks[0].mlp.fc1.weight, tower)
