"""Training time of a study's runs on a quiet machine, measured apart from the runs themselves.

The runs of a study take hours and are rarely alone on their machine, which would blur the very ratio that a study of
cheap training is about. So every distinct phase is timed by itself: a few steps of the real loop, data included, all
phases in turn and several times over, medians kept. A run's training time is then the sum of its steps.
"""

import json
import os
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from pretrain.atomic import write_atomically
from pretrain.config import ConfigError, PhaseConfig, PretrainConfig
from pretrain.data.loader import build_loader
from pretrain.data.pairs import Pairs, load_pairs
from pretrain.engine.device import Device
from pretrain.engine.equal_time import TIMING_FILE, Timing, phase_key, stored_timing
from pretrain.engine.run_folder import git_revision
from pretrain.engine.step import TrainStep
from pretrain.engine.study import Study, describe_machine
from pretrain.modeling.clip import build_model
from pretrain.objectives import build_objective, caption_reader

_WARM_UP = 3  # steps: the first ones allocate, and the loader fills its queue


def distinct_phases(study: Study) -> dict[str, tuple[PretrainConfig, PhaseConfig]]:
    """Every phase of the study's runs once, by key."""
    return {phase_key(job.config, phase): (job.config, phase) for job in study.jobs for phase in job.config.phases}


def time_study(study: Study, repeats: int = 3, steps: int = 8) -> Timing:
    """Measure every distinct phase and keep the result in the study's output folder.

    Args:
        repeats: measurements of each phase, alternating with all the others'.
        steps: timed steps of a measurement.

    Raises:
        ConfigError: for a study of equal times that has been timed.
    """
    if study.config.seconds and read_timing(study):
        raise ConfigError(
            f"the study is already timed, and the runs' steps depend on it: delete "
            f"{Path(study.config.output) / TIMING_FILE} to start it afresh"
        )
    phases, load_before = distinct_phases(study), os.getloadavg()[0]
    pairs: dict[str, Pairs] = {}
    found: dict[str, list[float]] = {key: [] for key in phases}
    with tqdm(total=repeats * len(phases), unit="measurement", desc="timing", disable=None) as bar:
        for _ in range(repeats):
            for key, (config, phase) in phases.items():
                reader = caption_reader(config)
                same = repr((config.data, bool(reader)))
                if same not in pairs:
                    pairs[same] = load_pairs(config.data, [], caption_reader=reader)
                found[key].append(_seconds_per_step(config, phase, pairs[same], steps))
                bar.update()
    timing = Timing(
        seconds={key: statistics.median(values) for key, values in found.items()},
        spread={key: (min(values), max(values)) for key, values in found.items()},
        date=time.strftime("%Y-%m-%d"),
        machine=describe_machine(),
        git_revision=git_revision(),
        load_before=load_before,
    )
    write_atomically(Path(study.config.output) / TIMING_FILE, json.dumps(asdict(timing), indent=1) + "\n")
    return timing


def _seconds_per_step(config: PretrainConfig, phase: PhaseConfig, data: Pairs, steps: int) -> float:
    """Mean over consecutive steps of the real loop: loading, forward, backward, update, and reading the loss."""
    device = Device(config.run.device, config.run.precision, config.run.parallel)
    objective = build_objective(config, build_model(config.model), phase)
    objective.enter_phase(phase)
    objective.to(device.torch_device).train()
    phase = replace(phase, steps=_WARM_UP + steps)
    live = TrainStep(objective, phase, config.optim_of(phase), device, compile=config.run.compile)
    views = objective.views(config.data, phase, data.backgrounds)
    loader = build_loader(data.training, data.store, views, config.data, phase, seed=0)
    started = 0.0
    for step, batch in enumerate(loader):
        output = live(batch, step)
        if step >= _WARM_UP - 1:
            float(output["loss"].detach())  # waits for the device
        if step == _WARM_UP - 1:
            started = time.perf_counter()
    return (time.perf_counter() - started) / steps


def read_timing(study: Study) -> Timing | None:
    """The kept measurement, if it has every phase of the study as it is now."""
    timing = stored_timing(study.config.output)
    return timing if timing and distinct_phases(study).keys() <= timing.seconds.keys() else None
