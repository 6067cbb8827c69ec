"""Resumable training states: one file, complete or absent, loaded without unpickling code."""

from pathlib import Path
from typing import Any

import torch

from pretrain.atomic import replacing
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
    """Replace the folder's state; a crash at any moment leaves the old one or the new one."""
    with replacing(folder / STATE_FILE) as temporary:
        torch.save(_on_cpu(state), temporary)


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
