"""OTTER and its baselines: what they reduce to, what the teacher does, phases, pieces and resumption."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pretrain.config import ConfigError, ObjectiveConfig, OptimConfig, PhaseConfig, PretrainConfig
from pretrain.data.transforms import normalise
from pretrain.engine.device import Device
from pretrain.engine.step import TrainStep
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import WEIGHTS_FILE
from pretrain.modeling.clip import build_model
from pretrain.objectives import build_objective
from pretrain.objectives.distillation import Distillation
from pretrain.objectives.info_nce import InfoNCE
from pretrain.objectives.label_smoothing import LabelSmoothing, LabelSmoothingOptions
from pretrain.objectives.otter import Otter, OtterOptions

PHASE = PhaseConfig(image_size=32, context_length=8, batch_size=6)
NAMES = ("label_smoothing", "distillation", "otter")


def batch(pairs=6, size=32, length=8):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49000, (pairs, length), generator=generator)
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    images = torch.randint(0, 256, (pairs, 3, size, size), generator=generator, dtype=torch.uint8)
    return {"image": images, "tokens": tokens}


def unit(rows: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.fixture
def make(model_config):
    """A function that makes an objective by name, with the same weights every time, in the phase."""

    def build(name: str, phase: PhaseConfig = PHASE, **options):
        torch.manual_seed(0)
        config = PretrainConfig(model=model_config, objective=ObjectiveConfig(name, options))
        objective = build_objective(config, build_model(model_config)).train()
        objective.enter_phase(phase)
        return objective

    return build


def losses_and_gradients(objective, given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = objective(given)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in objective.model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "options"),
    [("otter", {"alpha": 1.0}), ("distillation", {"alpha": 1.0}), ("label_smoothing", {"smoothing": 0.0})],
)
def test_without_soft_targets_it_is_info_nce_with_its_gradients(make, name, options):
    loss, gradients = losses_and_gradients(make(name, **options), batch())
    wanted, wanted_gradients = losses_and_gradients(make("info_nce"), batch())
    torch.testing.assert_close(loss, wanted)
    for key, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, atol=1e-6, rtol=1e-4)


def naive_otter(v, t, vt, tt, scale, second_scale, options) -> float:
    """The loss by loops over rows, the plan by scaling the matrix itself."""
    n = len(v)
    pairs = torch.eye(n, dtype=torch.bool)
    total = 0.0
    for own, other, own_t, other_t in ((v, t, vt, tt), (t, v, tt, vt)):
        within = options.image_weight * vt @ vt.T + options.text_weight * tt @ tt.T
        plan = ((within + own_t @ other_t.T).masked_fill(pairs, -200.0) / options.epsilon).exp()
        for _ in range(options.iterations):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        for i in range(n):
            target = plan[i] / plan[i].sum()
            first, second = ((s * own[i] @ other.T).log_softmax(0) for s in (scale, second_scale))
            divergence = sum(float(p * (p.log() - second[j])) for j, p in enumerate(target) if p > 0)
            total += (options.alpha * -float(first[i]) + (1 - options.alpha) * divergence) / n
    return total / 2


def test_the_whole_loss_is_that_of_loops_over_rows(make):
    objective = make("otter", alpha=0.3, image_weight=0.5, epsilon=0.2, iterations=3)
    with torch.no_grad():
        objective.distillation_logit_scale.fill_(1.5)
    v, t, teacher_v, teacher_t = (unit(6, seed, torch.float64) for seed in range(4))
    features = {"image": v, "text": t, "teacher_image": teacher_v, "teacher_text": teacher_t}
    found = objective.loss(features)["loss"].item()
    scale = objective.model.logit_scale.exp().item()
    expected = naive_otter(v, t, teacher_v, teacher_t, scale, math.exp(1.5), objective.options)
    assert found == pytest.approx(expected, rel=1e-6)


def test_with_one_temperature_it_is_the_cross_entropy_with_mixed_targets(make):
    objective = make("otter", alpha=0.5)
    names = ("image", "text", "teacher_image", "teacher_text")
    features = {name: unit(6, seed).requires_grad_() for seed, name in enumerate(names)}
    image, text = features["image"], features["text"]
    output = objective.loss(features)
    targets = [0.5 * torch.eye(6) + 0.5 * m for m in objective.targets(*(features[n].detach() for n in names[2:]))]
    logits = objective.model.logit_scale.exp().detach() * image @ text.T
    mixed = (F.cross_entropy(logits, targets[0]) + F.cross_entropy(logits.T, targets[1])) / 2
    found, wanted = (torch.autograd.grad(loss, (image, text)) for loss in (output["loss"], mixed))
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-4)


def test_a_distillation_target_is_the_teachers_prediction(make):
    v, t = unit(6, 0), unit(6, 1)
    published, _ = make("distillation").targets(v, t)
    torch.testing.assert_close(published, (100 * (v @ v.T + t @ t.T + v @ t.T)).softmax(1))
    images, texts = make("distillation", image_weight=0.0, text_weight=0.0).targets(v, t)
    torch.testing.assert_close(images, (100 * v @ t.T).softmax(1))
    torch.testing.assert_close(texts, (100 * t @ v.T).softmax(1))
    images, _ = make("distillation", image_weight=0.5, text_weight=2.0, teacher_scale=3.0).targets(v, t)
    torch.testing.assert_close(images, (3 * (0.5 * v @ v.T + 2 * t @ t.T + v @ t.T)).softmax(1))


def test_no_mass_goes_to_the_pairs_unless_they_are_kept(make):
    v = unit(6, 0)
    for targets in make("otter").targets(v, v):  # each text is its image's nearest
        assert targets.diagonal().max() < 1e-6
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
    for targets in make("otter", remove_diagonal=False).targets(v, v):
        assert targets.diagonal().min() > 0.5


def test_permuting_the_pairs_permutes_the_targets(make):
    objective, v, t, order = make("otter"), unit(8, 0), unit(8, 1), torch.randperm(8)
    for found, wanted in zip(objective.targets(v[order], t[order]), objective.targets(v, t), strict=True):
        torch.testing.assert_close(found, wanted[order][:, order])


def test_on_one_process_the_compatible_diagonal_is_the_true_one(make):
    v, t = unit(6, 0), unit(6, 1)
    pairs = zip(make("otter").targets(v, t), make("otter", compat_rank0_diagonal=True).targets(v, t), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("name", ["distillation", "otter"])
def test_the_teacher_starts_as_the_student_has_no_gradient_and_is_not_trained(make, name):
    objective = make(name)
    features = objective.encode(batch())
    torch.testing.assert_close(features["teacher_image"], features["image"])
    torch.testing.assert_close(features["teacher_text"], features["text"])
    assert not features["teacher_image"].requires_grad and not features["teacher_text"].requires_grad
    objective.loss(features)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    idle = {n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert idle == set()
    step = TrainStep(objective, PHASE, OptimConfig(weight_decay=0.0), Device("cpu", "fp32"))
    before = [p.clone() for p in objective.teacher.module.parameters()]
    step(batch(), 50)
    for old, average, new in zip(
        before, objective.teacher.module.parameters(), objective.model.parameters(), strict=True
    ):
        torch.testing.assert_close(average, 2 / 11 * old + 9 / 11 * new)  # after the optimiser's step


def test_the_teacher_sees_the_whole_image(make):
    phase = PhaseConfig(image_size=48, context_length=8, token_dropping="random", keep_tokens=3, cropped_positions=True)
    objective, given = make("otter", phase), batch(size=48)
    features = objective.encode(given)
    whole = F.normalize(objective.teacher.module.visual(normalise(given["image"])), dim=-1)
    torch.testing.assert_close(features["teacher_image"], whole)
    assert not torch.allclose(features["image"], whole, atol=1e-3)


def test_a_phase_resizes_the_teacher_from_its_own_positions(make):
    objective = make("otter")
    with torch.no_grad():
        objective.model.visual.trunk.pos_embed.add_(1)
    objective.enter_phase(PhaseConfig(image_size=160, context_length=16))
    student, teacher = (m.visual.trunk.pos_embed for m in (objective.model, objective.teacher.module))
    assert student.shape == teacher.shape and not teacher.requires_grad and student.requires_grad
    assert (student - teacher).mean().item() == pytest.approx(1, abs=1e-3)
    assert objective(batch(2, 160, 16))["loss"].isfinite()
    objective.after_step()


def test_both_scales_start_alike_and_are_clamped(make):
    objective = make("otter")
    assert objective.distillation_logit_scale.item() == objective.model.logit_scale.item()
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0)):
        with torch.no_grad():
            objective.distillation_logit_scale.fill_(value)
        objective.after_step()
        assert objective.distillation_logit_scale.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["otter", "distillation"])
def test_both_scales_start_at_the_paper_s_whatever_the_towers_bring(model, model_config, name):
    with torch.no_grad():
        model.logit_scale.fill_(4.6)  # as trained towers have it
    options = {"init_temperature": math.exp(-3.9)}
    config = PretrainConfig(model=model_config, objective=ObjectiveConfig(name, options))
    objective = build_objective(config, model)
    scales = (objective.model.logit_scale, objective.distillation_logit_scale, objective.teacher.module.logit_scale)
    assert [scale.item() for scale in scales] == pytest.approx([3.9] * 3)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_give_the_whole_batchs_gradient(make, name):
    found = []
    for micro in (0, 2):
        phase = PhaseConfig(image_size=32, context_length=8, batch_size=6, micro_batch_size=micro)
        objective = make(name, phase)
        with torch.no_grad():
            for parameter in objective.parameters():  # teacher and student apart, so that their targets differ
                if parameter.requires_grad:
                    parameter.mul_(1.05)
        step = TrainStep(objective, phase, OptimConfig(name="sgd", weight_decay=0.0), Device("cpu", "fp32"))
        loss = step(batch(), 0)["loss"].item()
        found.append((loss, {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, atol=3e-5, rtol=1e-3, msg=key)


class Stopped(Exception):
    """Stands for the power failing."""


def stop_after(trainer: Trainer, steps: int) -> None:
    inner, count = trainer._step, 0

    def step(*arguments):
        nonlocal count
        if count == steps:
            raise Stopped
        count += 1
        return inner(*arguments)

    trainer._step = step


TWO_PHASES = [
    {"name": "small", "steps": 3, "image_size": 32, "context_length": 6},
    {"name": "large", "steps": 3, "image_size": 48, "context_length": 12, "micro_batch_size": 6},
]


def test_stopping_and_resuming_equals_running_straight_to_the_bit(run_config):
    objective = {"name": "otter", "options": {"ema_decay": 0.9}}
    straight = Trainer(run_config(TWO_PHASES, output="straight", objective=objective))
    straight.train()
    config = run_config(TWO_PHASES, output="stopped", objective=objective, run={"checkpoint_every": 1})
    first = Trainer(config)
    stop_after(first, 4)
    with pytest.raises(Stopped):
        first.train()
    torch.manual_seed(999)  # a new process would not have the old one's random state
    second = Trainer(config, resume=True)
    second.train()
    ours, wanted = second.objective.state_dict(), straight.objective.state_dict()
    assert ours.keys() == wanted.keys() and ours["teacher.updates"] == 6
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    saved = load_file(Path(config.run.output) / "checkpoint" / WEIGHTS_FILE)
    assert not any("teacher" in key for key in saved)


def test_a_phase_after_plain_contrastive_ones_starts_its_teacher_from_their_towers(run_config):
    second = {"steps": 1, "lr": 0.0, "objective": {"name": "otter"}}
    trainer = Trainer(run_config([{"steps": 3}, second]))
    trainer.train()
    towers, teacher = trainer.model.state_dict(), trainer.objective.teacher
    assert teacher.updates == 1
    for name, value in teacher.module.state_dict().items():  # nothing was learned since
        torch.testing.assert_close(value, towers[name])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("otter", {"alpha": 1.5}, "objective.options.alpha is 1.5: it must be between 0 and 1"),
        ("distillation", {"ema_decay": -0.1}, "objective.options.ema_decay is -0.1"),
        ("otter", {"epsilon": 0.0}, "epsilon 0.0 must be above 0"),
        ("otter", {"iterations": 0}, "iterations 0 at least 1"),
        (
            "label_smoothing",
            {"smoothing": 1.0},
            "objective.options.smoothing is 1.0: it must be at least 0 and below 1",
        ),
        ("otter", {"chunk_size": 4}, "unknown field 'objective.options.chunk_size'"),
        ("otter", {"init_temperature": 2.0}, "init_temperature is 2.0: it must be between 0.01 and 1"),
        ("distillation", {"teacher_scale": -5.0}, "teacher_scale is -5.0: it must be above 0"),
        ("distillation", {"image_weight": float("nan")}, "image_weight is nan: it must be a number of at least 0"),
        ("otter", {"text_weight": float("inf")}, "text_weight is inf"),
        ("otter", {"epsilon": float("inf")}, "epsilon inf must be above 0"),
        ("info_nce", {"fixed_temperature": float("nan")}, "fixed_temperature is nan: above 0, or 0 to learn it"),
        ("focal", {"gamma": -1.0}, "gamma -1.0 at least 0"),
        ("focal", {"alpha": 1.5}, "alpha 1.5 must be between 0 and 1"),
        ("focal", {"chunk_size": -1}, "chunk_size is -1"),
        ("info_nce", {"chunk_size": -1}, "chunk_size is -1"),
    ],
)
def test_options_that_cannot_be_used_are_named(make, name, options, message):
    with pytest.raises(ConfigError, match=message):
        make(name, **options)


def test_a_pair_alone_cannot_be_smoothed(make):
    with pytest.raises(ConfigError, match="batch_size of phase main is 1: label_smoothing needs at least 2"):
        make("label_smoothing", PhaseConfig(image_size=32, context_length=8, batch_size=1))
    make("label_smoothing", PhaseConfig(image_size=32, context_length=8, batch_size=1), smoothing=0.0)


def test_the_defaults_are_the_published_ones(model, model_config):
    otter = Otter(model, model_config).options
    assert (otter.alpha, otter.epsilon, otter.iterations, otter.ema_decay) == (0.5, 0.15, 5, 0.999)
    assert (otter.image_weight, otter.text_weight, otter.remove_diagonal) == (1, 1, True)
    assert Otter(model, model_config, OtterOptions(epsilon=0.1)).options.epsilon == 0.1
    teacher = Distillation(model, model_config).options
    assert (teacher.alpha, teacher.ema_decay) == (0.5, 0.999)
    assert (teacher.image_weight, teacher.text_weight, teacher.teacher_scale) == (1, 1, 100)
    assert LabelSmoothing(model, model_config).options == LabelSmoothingOptions(0.1)
    assert isinstance(Otter(model, model_config), InfoNCE)
