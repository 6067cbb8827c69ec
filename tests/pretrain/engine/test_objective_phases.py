"""Phases with an objective and an optimiser of their own, weights to start from, and several encoders to judge."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.config import ConfigError, load_config, to_yaml
from pretrain.data.views import Views
from pretrain.engine.checkpoint import load_state
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import WEIGHTS_FILE, CheckpointError, load_checkpoint
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.info_nce import InfoNCE, InfoNCEOptions

CHANGING = [
    {"name": "contrastive", "steps": 3},
    {"name": "own weights", "steps": 3, "objective": {"name": "scaled"}, "optim": {"name": "sgd"}},
]


class Scaled(InfoNCE):
    """InfoNCE on features that a drawn matrix has turned, judged before and after it."""

    whole_batch = "rows depend on each other"

    def __init__(self, model, config, options=None):
        super().__init__(model, config, options)
        self.turn = nn.Linear(config.embed_dim, config.embed_dim)

    def encode(self, batch):
        features = super().encode(batch)
        return {**features, "image": nn.functional.normalize(self.turn(features["image"]), dim=-1)}

    def encoders(self):
        return {"": self.model, "turned": Turned(self.model, self.turn)}

    def views(self, data, phase, backgrounds):
        plain = super().views(data, phase, backgrounds)
        return Views(dict(plain.images), dict(plain.captions))


class Turned(nn.Module):
    def __init__(self, model, turn):
        super().__init__()
        self.model, self.turn = model, turn
        self.visual, self.context_length = model.visual, model.context_length

    def encode_image(self, image, normalize=False):
        return nn.functional.normalize(self.turn(self.model.encode_image(image, normalize=True)), dim=-1)

    def encode_text(self, text, normalize=False):
        return self.model.encode_text(text, normalize=True)


@pytest.fixture(autouse=True)
def scaled(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "scaled", (Scaled, InfoNCEOptions))


def weights(config):
    return load_file(Path(config.run.output) / "checkpoint" / WEIGHTS_FILE)


def zero_shot_names(config):
    lines = (Path(config.run.output) / "metrics.jsonl").read_text().splitlines()
    return {key for line in map(json.loads, lines) for key in line if key.endswith("_top1")}


def test_a_phase_has_its_own_objective_and_optimiser(run_config):
    config = run_config(CHANGING)
    trainer = Trainer(config)
    assert type(trainer.objective) is InfoNCE
    trainer.train()
    assert type(trainer.objective) is Scaled
    kept = load_state(Path(config.run.output))["optimizer"]["state"].values()
    assert all(list(state) == ["momentum_buffer"] for state in kept)  # timm's SGD, not AdamW
    assert zero_shot_names(config) == {"zero_shot_val_top1", "zero_shot_val_turned_top1"}
    assert "val_turned" in (Path(config.run.output) / "summary.md").read_text()


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumption_before_at_and_after_the_change_is_exact(run_config, stop):
    straight, stopped = (run_config(CHANGING, output=name, run={"checkpoint_every": 1}) for name in ("a", "b"))
    Trainer(straight).train()
    trainer, inner, count = Trainer(stopped), Trainer._step, 0

    def step(*arguments):
        nonlocal count
        if count == stop:
            raise KeyboardInterrupt
        count += 1
        return inner(trainer, *arguments)

    trainer._step = step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    Trainer(stopped, resume=True).train()
    left, right = weights(straight), weights(stopped)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_later_phase_that_cannot_work_is_refused_before_the_first(run_config):
    phases = [CHANGING[0], {**CHANGING[1], "micro_batch_size": 4}]
    with pytest.raises(ConfigError, match="Scaled cannot be encoded in pieces, because rows depend on each other"):
        Trainer(run_config(phases)).train()
    with pytest.raises(ConfigError, match="objective.name is 'scald'"):
        Trainer(run_config([CHANGING[0], {"steps": 1, "objective": {"name": "scald"}}], output="other"))


def test_the_fields_of_a_phases_groups_are_checked_and_survive_a_file(run_config, tmp_path):
    config = run_config(CHANGING)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    with pytest.raises(ConfigError, match=r"unknown field 'phases\[1\]\.optim\.nme': did you mean 'name'"):
        run_config([CHANGING[0], {"steps": 1, "optim": {"nme": "sgd"}}])


def test_a_run_starts_from_the_weights_it_is_given(run_config):
    first = run_config([{"name": "only", "steps": 3, "image_size": 64}], output="first")
    folder = Trainer(first).train()
    second = run_config([{"name": "more", "steps": 1, "lr": 0.0}], output="second")
    second.model.init = str(folder)
    Trainer(second).train()
    before, after = load_checkpoint(folder).model, load_checkpoint(Path(second.run.output) / "checkpoint").model
    assert torch.equal(before.text.token_embedding.weight, after.text.token_embedding.weight)
    assert torch.equal(before.visual.trunk.blocks[0].mlp.fc1.weight, after.visual.trunk.blocks[0].mlp.fc1.weight)


def test_weights_of_other_towers_are_refused_with_the_fields_to_copy(run_config):
    folder = Trainer(run_config([{"steps": 1}], output="first")).train()
    other = run_config([{"steps": 1}], output="second")
    other.model.init, other.model.embed_dim = str(folder), 16
    with pytest.raises(CheckpointError, match="model.init .* holds other towers .*copy those fields"):
        Trainer(other)
    other.model.init = str(folder) + "x"
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        Trainer(other)
