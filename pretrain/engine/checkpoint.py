"""Resumable training states: one file, complete or absent, loaded without unpickling code."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from pretrain.atomic import replacing
from pretrain.modeling.checkpoint import CheckpointError

STATE_FILE = "state.pt"


def save_state(folder: Path, state: dict) -> None:
    """Replace the folder's state; a crash at any moment leaves the old one or the new one.

    Args:
        state: tensors on the CPU (an XLA tensor loads only beside torch-xla).

    Raises:
        OSError: if it cannot be written, for want of space or permission.
    """
    with replacing(folder / STATE_FILE) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what torch's archive writer makes of a failed write
            reason = str(error).splitlines()[0]
            raise OSError(
                f"{folder / STATE_FILE} cannot be written ({reason}): make space, then continue with --resume from the "
                "last state, which is whole"
            ) from error


def first_not_finite(values: Any, name: str = "", masks: Collection[str] = ()) -> str:
    """The name of the first tensor with a number that is not finite, in a nest of dictionaries and lists; "" for none.

    Args:
        masks: names of tensors that may hold minus infinity.
    """
    if isinstance(values, torch.Tensor):
        sound = values.isfinite()
        if name in masks:
            sound |= values == -math.inf
        return "" if sound.all() else name
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    found = (first_not_finite(item, f"{name}.{key}" if name else str(key), masks) for key, item in items)
    return next(filter(None, found), "")


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
