"""Measure training speed: a few real optimiser steps of the real towers, on random pixels and words; needs no data."""

import os
import time
from dataclasses import dataclass, replace

import torch

from pretrain.config import PhaseConfig, PretrainConfig
from pretrain.engine.benchmark_train import random_batch
from pretrain.engine.cost import Towers, phase_cost
from pretrain.engine.device import Device
from pretrain.engine.memory import largest_micro_batch
from pretrain.engine.step import TrainStep
from pretrain.modeling.clip import build_model
from pretrain.objectives import build_objective, passes_of

_CPU_BATCH = 32  # pairs at most: a processor gains nothing from more


@dataclass(frozen=True)
class Speed:
    """What a device did in one phase.

    Attributes:
        batch: pairs of a step, encoded at once.
        steps: how many were timed, after a warm-up of two.
        pairs_per_second: of forward, backward and update.
        flops_per_second: 3 forward passes of both towers over that time (a second forward pass is not counted).
        device: the device and its precision, in words.
    """

    batch: int
    steps: int
    pairs_per_second: float
    flops_per_second: float
    device: str


def device_memory(device: Device) -> int:
    """Bytes that a measurement may use: most of a GPU, a quarter of the main memory."""
    if device.kind == "cuda":
        return int(0.85 * torch.cuda.get_device_properties(device.torch_device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def measure_phase(
    config: PretrainConfig, phase: PhaseConfig, towers: Towers, device: Device, batch: int = 0, seconds: float = 5.0
) -> Speed:
    """Train on random pairs for a while and time it.

    Args:
        config: model, objective and optimiser.
        phase: image size, text length and token dropping; its batch is replaced.
        towers: from `describe_towers`.
        device: where.
        batch: pairs of a step; 0: the phase's micro batch, or what the memory estimate says fits.
        seconds: roughly how long to time.
    """
    if not batch:
        actual = replace(config, run=replace(config.run, precision="bf16" if device.bf16 else "fp32"))
        fits = largest_micro_batch(phase, towers, actual, device_memory(device))
        batch = max(1, min(phase.micro_batch_size or fits, fits, _CPU_BATCH if device.kind == "cpu" else fits))
    phase = replace(phase, batch_size=batch, micro_batch_size=0)
    torch.manual_seed(config.run.seed)
    objective = build_objective(config, build_model(config.model), phase)
    objective.enter_phase(phase)
    objective.to(device.torch_device).train()
    step = TrainStep(objective, phase, config.optim_of(phase), device, compile=config.run.compile)
    pairs = random_batch(objective, config, phase, config.run.seed)
    for index in range(2):  # the first allocates and compiles, the second still may
        step(pairs, index)
    _wait(objective)
    started, done = time.perf_counter(), 0
    while done < 1 or time.perf_counter() - started < seconds:
        step(pairs, done)
        done += 1
        # Queued work must not run ahead of the clock, nor every step wait for the device.
        if done % 4 == 0 or device.kind == "cpu":
            _wait(objective)
    _wait(objective)
    rate = batch * done / (time.perf_counter() - started)
    cost = phase_cost(phase, towers, passes=passes_of(config, phase))
    flops = (cost.training_flops + cost.teacher_flops) / cost.samples
    return Speed(batch, done, rate, rate * flops, device.describe())


def _wait(module: torch.nn.Module) -> None:
    """Return when the last update has happened: reading an updated value waits on every kind of device."""
    float(next(module.parameters()).detach().flatten()[0])
