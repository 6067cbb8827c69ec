"""The state that a run continues from: the same one for every process, and only of the same run."""

import platform
import re
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, PretrainConfig
from pretrain.engine.checkpoint import STATE_FILE, load_state
from pretrain.engine.device import Device
from pretrain.engine.processes import Processes
from pretrain.modeling.checkpoint import CheckpointError

# How samples are made and encoded, not which.
_WITHOUT_EFFECT = re.compile(r"data\.(workers|preload)|phases\[\d+\]\.micro_batch_size")
# What a run that diverged is continued with.
_MAY_CHANGE = re.compile(
    r"phases\[\d+\]\.(lr|warmup_steps|initial_lr|final_lr|schedule|optim\.grad_clip)|optim\.grad_clip"
)

# What tools/train_net.py leaves; both halves would write config.yaml, metrics.jsonl and summary.md.
_DETECTOR_RUN = ("last_checkpoint", "detector/model.safetensors")


def starting_state(folder: Path, resume: bool, processes: Processes, device: Device) -> dict | None:
    """The folder's last state with `resume`, on every process alike; None to start from scratch.

    Under torch.distributed only rank 0, which writes the state, reads it, and sends it to the others: machines need not
    share the folder. torch-xla has nothing to send gigabytes with, so there each process reads, and all compare.

    Raises:
        ConfigError: if the folder has a state and `resume` is off, if it has a detector's run, or if the processes find
            different states.
        CheckpointError: if the state cannot be read.
    """
    if processes.kind == "torch":
        state, error = processes.from_main(_read(folder, resume) if processes.is_main else None)
    else:
        state, error = _read(folder, resume)
        _compare(state, folder, processes, device)
    if error:
        raise error
    return state


def _read(folder: Path, resume: bool) -> tuple[dict | None, Exception | None]:
    """The state or None, and why this cannot go on: every process must learn of it, or it would wait for ever."""
    if found := next((name for name in _DETECTOR_RUN if (folder / name).exists()), None):
        message = f"{folder} holds the run of a detector ({found}): set run.output elsewhere"
        return None, ConfigError(message)
    if not resume and (folder / STATE_FILE).exists():
        message = f"{folder} already holds a run: add --resume to continue it, or set run.output elsewhere"
        return None, ConfigError(message)
    try:
        return (load_state(folder) if resume else None), None
    except CheckpointError as error:
        return None, error


def _compare(state: dict | None, folder: Path, processes: Processes, device: Device) -> None:
    """Raise ConfigError on every process if they do not all have the same state."""
    found = f"phase {state['phase']}, step {state['step']}" if state else "no state that can be used"
    digest = zlib.crc32(repr([state["config"], state["data"]]).encode()) if state else 0
    said = [text.split("|") for text in processes.texts(f"{found}|{digest}|{platform.node()}", device)]
    rank = next((rank for rank, (*what, _) in enumerate(said) if what != said[0][:2]), None)
    if rank is not None:
        (first, _, home), (other, _, host) = said[0], said[rank]
        raise ConfigError(
            f"process 0 on {home} finds {first} in {folder}, process {rank} on {host} finds {other} (perhaps of "
            "another run): set run.output to a folder that all machines share"
        )


def identity(config: PretrainConfig) -> dict[str, Any]:
    """What a run is, by dotted field: everything but where, how widely and how often things are written."""
    named = {"model": config.model, "data": config.data, "objective": config.objective, "optim": config.optim}
    nested = {name: asdict(part) for name, part in named.items()}
    nested["phases"] = [asdict(phase) for phase in config.phases]
    flat = {**_flat(nested, ""), "run.seed": config.run.seed}
    return {name: value for name, value in flat.items() if not _WITHOUT_EFFECT.fullmatch(name)}


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = [_flat(item, f"{name}.{key}" if name else key) for key, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        parts = [_flat(item, f"{name}[{index}]") for index, item in enumerate(value)]
    else:
        return {name: value}
    return {key: item for part in parts for key, item in part.items()}


def check_state(state: dict, config: PretrainConfig, fingerprints: dict[str, str], folder: Path) -> list[str]:
    """Whether a state is one of this run; returns what has changed since of what may change, as "field is new (was)".

    Raises:
        ConfigError: if it was saved with another configuration or other data.
    """
    saved, now = state["config"], identity(config)
    if not isinstance(saved, dict):
        raise ConfigError(f"{folder} was started by an earlier version of the toolkit: set run.output elsewhere")
    changed = [name for name in {**saved, **now} if name not in saved or name not in now or saved[name] != now[name]]
    described = {name: f"{name} is {now.get(name, 'absent')} (was {saved.get(name, 'absent')})" for name in changed}
    refused = [text for name, text in described.items() if not _MAY_CHANGE.fullmatch(name)]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise ConfigError(
            f"{folder} was started with another configuration: restore {folder}/config.yaml ({'; '.join(refused[:3])}"
            f"{more})"
        )
    if state["data"] != fingerprints:
        raise ConfigError(f"{folder} was started with other data: see {folder}/about.json for what it was")
    return list(described.values())
