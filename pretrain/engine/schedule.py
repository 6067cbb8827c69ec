"""Learning rate as a pure function of the step within a phase."""

import math

from pretrain.config import PhaseConfig


def lr_at(step: int, phase: PhaseConfig) -> float:
    """Learning rate for 0-based `step`: linear warm-up from `initial_lr` to the peak, then decay to `final_lr`, which
    the step after the last one would have (so the last one still learns).

    RECLIP decays linearly (arXiv 2304.06028, section 4).
    """
    if step < phase.warmup_steps:
        return phase.initial_lr + (phase.lr - phase.initial_lr) * (step + 1) / phase.warmup_steps
    progress = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    progress = min(1.0, progress)
    shape = 1 - progress if phase.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return phase.final_lr + (phase.lr - phase.final_lr) * shape
