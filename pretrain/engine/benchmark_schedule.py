"""The measured time of a schedule beside its full-resolution baseline, from a few steps of each of their phases.

A step of the schedule's batch is taken to be as many measured steps as fit into it, and one update: what one device
does that encodes the batch in pieces. A second forward pass (accumulation with cached embeddings), the similarities of
a large batch and exchange between devices are not counted, neither here nor for the baseline.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pretrain.config import PhaseConfig, PretrainConfig
from pretrain.engine.benchmark_train import alternate, random_batch, table_header, table_line, wait_for
from pretrain.engine.cost import BASELINE_IMAGE_SIZE, PhaseCost, Towers, describe_towers, main_phases, phase_cost
from pretrain.engine.device import Device
from pretrain.engine.step import TrainStep
from pretrain.modeling.clip import build_model
from pretrain.objectives import build_objective, passes_of


@dataclass(frozen=True)
class StepTime:
    """Seconds of a measured step: of forward and backward over `pairs`, and of one update, whatever the batch."""

    pairs: int
    compute: float
    update: float

    def seconds(self, batch_size: int) -> float:
        """What a step of `batch_size` pairs takes on one device, encoded in pieces of the measured size."""
        return self.compute * batch_size / self.pairs + self.update


Job = tuple[PretrainConfig, PhaseConfig]


@dataclass(frozen=True)
class PhaseTime:
    """A phase and its measured step."""

    phase: PhaseConfig
    step: StepTime

    @property
    def hours(self) -> float:
        """On this device."""
        return self.phase.steps * self.step.seconds(self.phase.batch_size) / 3600


@dataclass(frozen=True)
class ScheduleTimes:
    """Every phase of a schedule and of its baseline; `flops_ratio` is what counting FLOPs promises."""

    schedule: list[PhaseTime]
    baseline: list[PhaseTime]
    flops_ratio: float

    @property
    def hours(self) -> tuple[float, float]:
        """Of the schedule and of the baseline, on this device."""
        return sum(p.hours for p in self.schedule), sum(p.hours for p in self.baseline)

    @property
    def ratio(self) -> float:
        """How many times less time the schedule takes."""
        return self.hours[1] / self.hours[0]


def compare_schedules(
    config: PretrainConfig, baseline: PretrainConfig | None, timer: Callable[[list[Job]], list[StepTime]]
) -> ScheduleTimes:
    """Measured time of a schedule beside that of its baseline.

    Args:
        config: the schedule.
        baseline: another one; None: `config`'s own main steps at 224 px with the text tower's full length.
        timer: measures phases, for example `time_phases` on a device.

    Raises:
        ConfigError: for sizes that the towers cannot take.
    """
    full = {"image_size": BASELINE_IMAGE_SIZE, "context_length": config.model.text.context_length}
    full |= {"token_dropping": "none", "keep_tokens": 0}
    derived = [replace(phase, **full) for phase in main_phases(config.phases, BASELINE_IMAGE_SIZE)]
    own = [(config, phase) for phase in config.phases]
    other = [(baseline, phase) for phase in baseline.phases] if baseline else [(config, phase) for phase in derived]
    flops = []
    for jobs in (own, other):
        towers = describe_towers(jobs[0][0].model)
        flops.append(sum(_cost(config, phase, towers).training_flops for config, phase in jobs))
    times = [PhaseTime(phase, step) for (_, phase), step in zip(own + other, timer(own + other), strict=True)]
    return ScheduleTimes(times[: len(own)], times[len(own) :], flops[1] / flops[0])


def _cost(config: PretrainConfig, phase: PhaseConfig, towers: Towers) -> PhaseCost:
    return phase_cost(phase, towers, passes=passes_of(config, phase))


def time_phases(
    jobs: list[Job], device: Device, batch: int, seconds: float = 4.0, repeats: int = 3, compile: bool = False
) -> list[StepTime]:
    """Measure the step of every phase on random pairs, alternating.

    `batch` pairs of the phase that costs most, and of the others as many more as make equal FLOPs, since smaller images
    leave memory for larger pieces (but never more than the phase's own batch). Phases that compute the same are
    measured once. The update is timed apart: its share of a step shrinks as the batch grows. All towers and optimiser
    states are in memory at once.

    Raises:
        ConfigError: for settings that cannot be used.
    """
    keys, steps, works = [], {}, {}
    costs = [_cost(config, phase, describe_towers(config.model)) for config, phase in jobs]
    per_pair = [cost.training_flops / cost.samples for cost in costs]
    for (config, phase), flops in zip(jobs, per_pair, strict=True):
        shape = PhaseConfig(
            steps=1, image_size=phase.image_size, context_length=phase.context_length, lr=1e-6, warmup_steps=0,
            batch_size=min(round(batch * max(per_pair) / flops), phase.batch_size),
            token_dropping=phase.token_dropping, keep_tokens=phase.keep_tokens,
            cropped_positions=phase.cropped_positions, objective=phase.objective, optim=phase.optim,
        )  # fmt: skip
        keys.append(key := repr((config.model, config.objective, config.optim, shape)))
        if key not in steps:
            steps[key] = _make_step(config, shape, device, compile)
            works[key] = _steps_of(steps[key], config, shape)
    updates = {key: _updates_of(step) for key, step in steps.items()}
    # Steps first: an update needs gradients.
    whole = alternate(works, seconds, repeats)
    alone = alternate(updates, seconds / 4, repeats)
    results = {}
    for key, step in steps.items():
        per_step, update = (statistics.median(wall / n for n, wall, _ in times[key]) for times in (whole, alone))
        results[key] = StepTime(step.phase.batch_size, max(0.0, per_step - update), update)
    return [results[key] for key in keys]


def _make_step(config: PretrainConfig, phase: PhaseConfig, device: Device, compile: bool) -> TrainStep:
    torch.manual_seed(config.run.seed)
    objective = build_objective(config, build_model(config.model), phase)
    objective.enter_phase(phase)
    objective.to(device.torch_device).train()
    return TrainStep(objective, phase, config.optim_of(phase), device, compile=compile or config.run.compile)


def _steps_of(step: TrainStep, config: PretrainConfig, phase: PhaseConfig) -> Callable[[int], None]:
    pairs = random_batch(step.objective, config, phase, config.run.seed)

    def run(steps: int) -> None:
        for index in range(steps):
            step(pairs, index)
        wait_for(step.objective)

    return run


def _updates_of(step: TrainStep) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in range(steps):
            step.optimizer.step()
            step.device.cut()
        wait_for(step.objective)

    return run


def schedule_to_markdown(times: ScheduleTimes) -> str:
    """A table of phases, then the hours of both schedules and their ratio."""
    head = ["schedule", "phase", "px", "text", "steps", "batch", "measured on", "forward + backward, s", "update, s"]
    lines = table_header([*head, "hours"])
    for name, phases in (("schedule", times.schedule), ("baseline", times.baseline)):
        for item in phases:
            p, step = item.phase, item.step
            row = [name, p.name, p.image_size, p.context_length, f"{p.steps:,}", f"{p.batch_size:,}"]
            row += [f"{step.pairs} pairs", f"{step.compute:.4g}", f"{step.update:.4g}", f"{item.hours:,.4g}"]
            lines.append(table_line(row))
    own, other = times.hours
    lines += ["", f"schedule {own:,.4g} h, baseline {other:,.4g} h of this device: **{times.ratio:.2f} times** "]
    lines[-1] += f"({times.flops_ratio:.2f} by counting FLOPs)"
    return "\n".join(lines)
