"""The file of a checkpoint folder that holds a second pair of heads (clip-rocket's projectors), so that the spaces "h"
and "ensemble" can be judged after training. open_clip and the detector never read it: to them the folder is the towers.

Like the position table, it is bound to the weights by their hash. Copies of a folder leave it out: it may be larger
than the towers, and only evaluation reads it.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pretrain.modeling.checkpoint import WEIGHTS_FILE, CheckpointError, ImageTextModel, fingerprint, write_tensors
from pretrain.modeling.head_encoder import Heads
from pretrain.modeling.projector import Projector
from pretrain.modeling.tower_features import feature_widths

HEADS_FILE = "heads.safetensors"
_PARTS = ("image", "text")
_SCALE = "logit_scale"


def save_heads(folder: str | Path, heads: Heads | None) -> None:
    """Add the heads to a checkpoint folder; None removes those of an earlier training.

    Args:
        folder: holds the towers that the heads were trained with.
        heads: both `Projector`s without a norm after their last layer.

    Raises:
        OSError: if a file cannot be read or written.
    """
    folder = Path(folder)
    if heads is None:
        (folder / HEADS_FILE).unlink(missing_ok=True)
        return
    states = {part: getattr(heads, part).state_dict() for part in _PARTS}
    tensors = {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}
    if heads.logit_scale is not None:
        tensors[_SCALE] = heads.logit_scale
    about = {"weights_sha256": fingerprint(folder / WEIGHTS_FILE), "ensemble_weight": repr(heads.ensemble_weight)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_tensors(folder / HEADS_FILE, tensors, about)


def load_heads(folder: str | Path, checkpoint: ImageTextModel) -> Heads:
    """Read the heads of a checkpoint folder, in evaluation mode on the CPU.

    Args:
        folder: the folder.
        checkpoint: what `load_checkpoint` read from it.

    Raises:
        CheckpointError: if the file is missing, damaged, or belongs to other weights or towers.
    """
    path = Path(folder) / HEADS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: this checkpoint has the space z alone (--space z); clip_rocket writes the file when "
            "its training ends"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy the whole folder again") from error
    if about.get("weights_sha256") != checkpoint.fingerprint:
        raise CheckpointError(f"{path} belongs to other weights than {WEIGHTS_FILE}: copy the whole folder again")
    try:
        widths = feature_widths(checkpoint.model)
        image, text = (_projector(tensors, part, width) for part, width in zip(_PARTS, widths, strict=True))
        weight, scale = float(about["ensemble_weight"]), tensors.get(_SCALE)
        if not 0 <= weight <= 1 or (scale is not None and scale.shape != ()):
            raise ValueError(f"ensemble_weight {weight}, {_SCALE} {scale}")
    except (AttributeError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not fit the towers ({reason}): copy the whole folder again") from error
    return Heads(image, text, weight, scale)


def in_space(checkpoint: ImageTextModel, folder: str | Path, space: str) -> ImageTextModel:
    """A loaded checkpoint as it is ("z"), or with its model seen through the folder's heads ("h", "ensemble").

    Raises:
        CheckpointError: as `load_heads`.
    """
    if space == "z":
        return checkpoint
    return replace(checkpoint, model=load_heads(folder, checkpoint).encoder(checkpoint.model, space).eval())


def _projector(tensors: dict[str, torch.Tensor], part: str, inputs: int) -> Projector:
    """The projector that one part of the file is the state of; its shape is that of its matrices."""
    state = {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
    # By number: as text, layer 10 would stand before layer 2.
    matrices = [state[f"{n}.weight"] for n in sorted(int(k.split(".")[0]) for k, v in state.items() if v.ndim == 2)]
    if not matrices:
        raise ValueError(f"it has no {part} head")
    hidden, outputs = matrices[0].shape[0], matrices[-1].shape[0]
    widths = [inputs, *[hidden] * (len(matrices) - 1), outputs]
    if (given := [tuple(m.shape) for m in matrices]) != list(zip(widths[1:], widths, strict=False)):
        raise ValueError(f"the {part} head's matrices are {given}")  # before memory for others is asked for
    projector = Projector(inputs, hidden, outputs, len(matrices))
    projector.load_state_dict(state)
    return projector.eval()
