"""Seconds a training step takes, by phase, and the numbers of steps that give every run of a study the same time.

What is measured is in study_timing.py; here it is named, read, and turned into steps.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.config import PhaseConfig, PretrainConfig

TIMING_FILE = "timing.json"


@dataclass(frozen=True)
class Timing:
    """Seconds a step of every distinct phase, and how they were measured.

    Attributes:
        seconds: median by phase key.
        spread: lowest and highest by phase key.
    """

    seconds: dict[str, float]
    spread: dict[str, tuple[float, float]]
    date: str
    machine: str
    git_revision: str
    load_before: float  # load average over a minute when the measurement began


def phase_key(config: PretrainConfig, phase: PhaseConfig) -> str:
    """Digest of what the time of a step depends on: not on how many there are, nor on the learning rate."""
    plain = PhaseConfig()
    same = ("name", "steps", "lr", "warmup_steps", "initial_lr", "schedule", "final_lr")
    phase = replace(phase, **{name: getattr(plain, name) for name in same})
    parts = (config.model, config.data, config.objective, config.optim, phase, config.run.precision, config.run.compile)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def stored_timing(folder: str | Path) -> Timing | None:
    """The measurement that a study's output folder holds, whatever it is of."""
    try:
        return Timing(**json.loads((Path(folder) / TIMING_FILE).read_text()))
    except (OSError, json.JSONDecodeError, TypeError):
        return None


def training_seconds(config: PretrainConfig, seconds: Mapping[str, float]) -> float:
    """Training time of a run: its steps at the measured seconds."""
    return sum(phase.steps * seconds[phase_key(config, phase)] for phase in config.phases)


def with_equal_time(config: PretrainConfig, seconds: Mapping[str, float], budget: float) -> PretrainConfig:
    """The run with its phases' steps and warm-ups multiplied by one factor, so that it trains for `budget` seconds.

    Args:
        seconds: of a step, by phase key; has all phases of the run.
        budget: seconds.
    """
    factor = budget / training_seconds(config, seconds)
    return replace(config, phases=_scaled(config.phases, factor))


def _scaled(phases: Sequence[PhaseConfig], factor: float) -> list[PhaseConfig]:
    return [
        replace(p, steps=max(1, round(p.steps * factor)), warmup_steps=round(p.warmup_steps * factor)) for p in phases
    ]
