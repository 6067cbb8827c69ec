"""Resumable training states: one file, complete or absent, loaded without unpickling code."""

import os
from pathlib import Path
from typing import Any

import torch

from pretrain.modeling.checkpoint import CheckpointError

STATE_FILE = "state.pt"


def _on_cpu(value: Any) -> Any:
    """The same nest of dictionaries and lists, tensors on the CPU (an XLA tensor loads only beside torch-xla)."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value


def save_state(folder: Path, state: dict) -> None:
    """Write the state to a temporary file, flush it to disk, and rename it over the previous one."""
    temporary = folder / f".{STATE_FILE}.part"
    with temporary.open("wb") as file:
        torch.save(_on_cpu(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / STATE_FILE)


def load_state(folder: Path) -> dict | None:
    """The last complete state, or None if there is none.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged archives
        raise CheckpointError(f"{path} cannot be read; delete it to start again") from error
