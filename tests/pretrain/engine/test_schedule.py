"""The learning rate at hand-computed steps."""

import math

import pytest

from pretrain.config import PhaseConfig
from pretrain.engine.schedule import lr_at

PHASE = {"steps": 110, "warmup_steps": 10, "lr": 0.4, "final_lr": 0.1}


@pytest.mark.parametrize(
    ("step", "linear", "cosine"),
    [
        (0, 0.04, 0.04),  # one tenth of the peak: no step is wasted at zero
        (4, 0.2, 0.2),
        (9, 0.4, 0.4),  # the last warm-up step is at the peak
        (10, 0.4, 0.4),
        (35, 0.325, 0.1 + 0.3 * (1 + math.sqrt(0.5)) / 2),  # a quarter: cos 45°
        (60, 0.25, 0.25),  # the middle of the decay
        (85, 0.175, 0.1 + 0.3 * (1 - math.sqrt(0.5)) / 2),
        (109, 0.103, 0.1 + 0.3 * (1 + math.cos(0.99 * math.pi)) / 2),  # the last step still learns
        (110, 0.1, 0.1),
        (500, 0.1, 0.1),
    ],
)
def test_by_hand(step, linear, cosine):
    assert lr_at(step, PhaseConfig(schedule="linear", **PHASE)) == pytest.approx(linear)
    assert lr_at(step, PhaseConfig(schedule="cosine", **PHASE)) == pytest.approx(cosine)


def test_without_warmup_the_first_step_is_at_the_peak():
    assert lr_at(0, PhaseConfig(steps=10, warmup_steps=0, lr=0.3)) == pytest.approx(0.3)


def test_a_warmup_longer_than_the_phase_only_rises():
    rates = [lr_at(step, PhaseConfig(steps=4, warmup_steps=8, lr=0.8)) for step in range(4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rises_then_falls(schedule):
    rates = [lr_at(step, PhaseConfig(schedule=schedule, **PHASE)) for step in range(111)]
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)


def test_warmup_can_start_above_zero():
    phase = PhaseConfig(steps=10, warmup_steps=4, lr=0.9, initial_lr=0.1)
    assert [lr_at(step, phase) for step in range(4)] == pytest.approx([0.3, 0.5, 0.7, 0.9])
