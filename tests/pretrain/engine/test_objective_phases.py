"""Phases with an objective and an optimiser of their own, weights to start from, and several encoders to judge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.config import ConfigError, load_config, to_yaml
from pretrain.data.views import Views
from pretrain.engine import phases as phases_module
from pretrain.engine.checkpoint import load_state
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import WEIGHTS_FILE, CheckpointError, load_checkpoint
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.info_nce import InfoNCE, InfoNCEOptions

SIZES = {
    "siamese_hidden": 16, "siamese_outputs": 8, "assignment_hidden": 16, "assignment_outputs": 8, "prototypes": 6
}  # fmt: skip
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


def stop_and_resume(config, stop: int) -> Trainer:
    """Train until the power fails before step `stop`, then the rest; returns the second trainer."""
    trainer, inner, count = Trainer(config), Trainer._step, 0

    def step(*arguments):
        nonlocal count
        if count == stop:
            raise KeyboardInterrupt
        count += 1
        return inner(trainer, *arguments)

    trainer._step = step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = Trainer(config, resume=True)
    resumed.train()
    return resumed


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumption_before_at_and_after_the_change_is_exact(run_config, stop):
    straight, stopped = (run_config(CHANGING, output=name, run={"checkpoint_every": 1}) for name in ("a", "b"))
    Trainer(straight).train()
    stop_and_resume(stopped, stop)
    left, right = weights(straight), weights(stopped)
    assert all(torch.equal(left[name], right[name]) for name in left)


ROCKET = {"name": "clip_rocket", "options": {"projector_hidden": 16}}
CANNOT = {
    "pieces of a batch norm": (
        {**CHANGING[1], "micro_batch_size": 4}, "Scaled cannot be encoded in pieces, because rows depend on each other"
    ),
    "a micro batch that does not divide": ({"micro_batch_size": 5}, "micro_batch_size 5 does not cut the 12 pairs"),
    "an unknown objective": ({"objective": {"name": "scald"}}, "objective.name is 'scald'"),
    "an unknown optimiser": ({"optim": {"name": "lambb"}}, "optim: lambb cannot be used"),
    "an option of another optimiser": (
        {"optim": {"name": "lamb", "options": {"fallback_lr_scale": 0.1}}}, "lamb cannot be used .*fallback_lr_scale"
    ),
    "tokens that the objective does not drop": (
        {"objective": ROCKET, "token_dropping": "random", "keep_tokens": 2}, "clip_rocket does not drop tokens"
    ),
    "larger augmented images": (
        {"objective": {**ROCKET, "options": {"augmented_image_scale": 2.0}}}, "scale is 2.0: .* at most 1, the phase"
    ),
    "one pair for a batch norm": ({"objective": ROCKET, "batch_size": 1}, "batch_size is 1; batch norm .* 2 pairs"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT)
def test_a_later_phase_that_cannot_work_is_refused_before_the_first(run_config, case):
    """When the trainer is made: nothing here trains."""
    phase, message = CANNOT[case]
    with pytest.raises(ConfigError, match=message):
        Trainer(run_config([CHANGING[0], {"steps": 1, **phase}]))


def test_phases_are_checked_without_memory_for_their_towers(run_config, monkeypatch):
    config, made = run_config([CHANGING[0], {"steps": 1, "objective": {"name": "otter"}}]), []
    build = phases_module.build_objective

    def watched(*arguments):
        made.append(objective := build(*arguments))
        return objective

    monkeypatch.setattr(phases_module, "build_objective", watched)
    Trainer(config)
    assert len(made) == 2 and {p.device.type for objective in made for p in objective.parameters()} == {"meta"}


def test_an_objective_whose_constructor_needs_numbers_is_checked_too(run_config, monkeypatch):
    class Reading(Scaled):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.start = self.turn.weight.norm().item()

    monkeypatch.setitem(OBJECTIVES, "scaled", (Reading, InfoNCEOptions))
    Trainer(run_config(CHANGING))
    with pytest.raises(ConfigError, match="Reading cannot be encoded in pieces"):
        Trainer(run_config([CHANGING[0], {**CHANGING[1], "micro_batch_size": 4}]))


# A phase with the same objective and other options, and what must be the same right before and after its start.
CARRIED = {
    "clip_rocket": (
        {"projector_hidden": 16, "terms": {"byolip": 1.0, "swalip_v1": 0.2}, "sizes": SIZES}, {"text_dropout": 0.1},
        {
            "image_projector.0.weight", "image_projector.1.num_batches_tracked", "augmented_logit_scale",
            "terms.byolip.average.updates", "terms.swalip_v1.steps", "terms.swalip_v1.prototypes",
        },
    ),
    "otter": (
        {"ema_decay": 0.9}, {"alpha": 0.6},
        {"teacher.updates", "teacher.module.text.token_embedding.weight", "distillation_logit_scale"},
    ),
    "distillation": ({"init_temperature": 0.05}, {"alpha": 0.6}, {"model.logit_scale", "distillation_logit_scale"}),
}  # fmt: skip


def entered(trainer: Trainer) -> dict[int, tuple[dict, dict]]:
    """The objective's state before and after each phase's start, filled while it trains."""
    found, inner = {}, trainer._enter

    def enter(index):
        before = {name: value.clone() for name, value in trainer.objective.state_dict().items()}
        live = inner(index)
        found[index] = before, {name: value.clone() for name, value in trainer.objective.state_dict().items()}
        return live

    trainer._enter = enter
    return found


@pytest.mark.parametrize("name", CARRIED)
def test_another_option_of_the_same_objective_keeps_what_it_has_learned(run_config, capsys, name):
    options, change, expected = CARRIED[name]
    second = {"steps": 2, "image_size": 48, "objective": {"name": name, "options": {**options, **change}}}
    phases = [{"steps": 2, "objective": {"name": name, "options": options}}, second]
    straight, stopped = (run_config(phases, output=output, run={"checkpoint_every": 1}) for output in "ab")
    trainer = Trainer(straight)
    states = entered(trainer)
    trainer.train()
    before, after = states[1]
    unequal = {
        key for key in before if before[key].shape == after[key].shape and not torch.equal(before[key], after[key])
    }
    assert expected <= before.keys() and unequal == set() and "start afresh" not in capsys.readouterr().out
    for stop in (2, 3):  # at the boundary and within the second phase
        resumed = stop_and_resume(stopped, stop)
        own, wanted = resumed.objective.state_dict(), trainer.objective.state_dict()
        assert own.keys() == wanted.keys() and all(torch.equal(own[key], wanted[key]) for key in wanted)
        shutil.rmtree(stopped.run.output)


def test_what_has_another_shape_starts_afresh_and_is_named(run_config, capsys):
    objectives = [{"name": "clip_rocket", "options": {"projector_hidden": width}} for width in (16, 24)]
    trainer = Trainer(run_config([{"steps": 1, "objective": objective} for objective in objectives]))
    states = entered(trainer)
    trainer.train()
    printed = capsys.readouterr().out
    assert "clip_rocket has other options; these start afresh: image_projector.0, " in printed
    before, after = states[1]
    assert torch.equal(before["augmented_logit_scale"], after["augmented_logit_scale"])


def test_a_new_part_is_named_as_a_whole(run_config, capsys):
    options = {"projector_hidden": 16, "sizes": SIZES}
    objectives = [{"name": "clip_rocket", "options": {**options, "terms": terms}} for terms in ({}, {"siamlip": 1.0})]
    Trainer(run_config([{"steps": 1, "objective": objective} for objective in objectives])).train()
    assert "these start afresh: terms\n" in capsys.readouterr().out


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
