"""The state that a run continues from: the same one for every process, and only of the same run."""

import platform
import zlib
from pathlib import Path

import torch

from pretrain.config import ConfigError
from pretrain.engine.checkpoint import STATE_FILE, load_state
from pretrain.engine.device import Device
from pretrain.engine.processes import Processes
from pretrain.modeling.checkpoint import CheckpointError


def starting_state(folder: Path, resume: bool, processes: Processes, device: Device) -> dict | None:
    """The folder's last state with `resume`, on every process alike; None to start from scratch.

    Under torch.distributed only rank 0, which writes the state, reads it, and sends it to the others: machines need not
    share the folder. torch-xla has nothing to send gigabytes with, so there each process reads, and all compare.

    Raises:
        ConfigError: if the folder has a state and `resume` is off, or if the processes find different states.
        CheckpointError: if the state cannot be read.
    """
    if processes.kind == "torch":
        state, error = processes.from_main(_read(folder, resume) if processes.is_main else None)
    else:
        state, error = _read(folder, resume)
        if processes.kind in ("xla", "spmd") and not _is_everywhere(_summary(state, error), processes, device):
            found = f"phase {state['phase']}, step {state['step']}" if state else "no state that can be used"
            raise ConfigError(
                f"process {processes.rank} on {platform.node()} finds {found} in {folder}, and others find something "
                "else: set run.output to a folder that all machines share"
            )
    if error:
        raise error
    return state


def _read(folder: Path, resume: bool) -> tuple[dict | None, Exception | None]:
    """The state or None, and why this cannot go on: every process must learn of it, or it would wait for ever."""
    if not resume and (folder / STATE_FILE).exists():
        message = f"{folder} already holds a run: add --resume to continue it, or set run.output elsewhere"
        return None, ConfigError(message)
    try:
        return (load_state(folder) if resume else None), None
    except CheckpointError as error:
        return None, error


def _summary(state: dict | None, error: Exception | None) -> list[int]:
    """Numbers below 2 ** 31 that are the same for the same state."""
    if state is None:
        return [2 if error else 0, 0, 0, 0]
    return [1, state["phase"], state["step"], zlib.crc32(repr([state["config"], state["data"]]).encode()) >> 1]


def _is_everywhere(numbers: list[int], processes: Processes, device: Device) -> bool:
    """Whether all processes of torch-xla have these numbers."""
    own = torch.tensor(numbers, dtype=torch.int32)
    both = torch.cat([own, -own])  # the largest of -x is the smallest of x
    if processes.kind == "spmd":
        largest = largest_of_rows(both.repeat(device.devices, 1), device)
    else:
        import torch_xla.core.xla_model as xm

        largest = xm.all_reduce(xm.REDUCE_MAX, both.to(device.torch_device)).cpu()
    return torch.equal(largest, both)


def largest_of_rows(rows: torch.Tensor, device: Device) -> torch.Tensor:
    """The largest number of each column over the rows (devices, n) of all hosts of one program."""
    return device.move({"rows": rows})["rows"].amax(0).cpu()
