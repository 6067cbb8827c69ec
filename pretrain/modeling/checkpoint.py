"""Checkpoint folders in open_clip's format: the contract between pretraining, the detector and everyone else.

A folder holds `open_clip_config.json` and `open_clip_model.safetensors`; `open_clip.create_model_and_transforms(
"local-dir:FOLDER")` reads it without this package. Reading accepts any such folder, not only ours.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, CustomTextCLIP
from safetensors.torch import save_file
from torch import nn

from pretrain.atomic import replacing, write_atomically
from pretrain.config import ModelConfig
from pretrain.modeling.clip import open_clip_config, set_context_length, set_image_size

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


@dataclass
class ImageTextModel:
    """A loaded checkpoint folder: the towers and what is needed to feed them."""

    model: nn.Module  # open_clip's CLIP or CustomTextCLIP, in eval mode
    tokenizer: Callable[[list[str]], torch.Tensor]  # texts to (N, context_length) int64
    image_size: int  # pixels
    mean: tuple[float, float, float]  # on the 0–1 scale
    std: tuple[float, float, float]
    embed_dim: int
    fingerprint: str  # SHA-256 of the weights file


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(folder: str | Path, model: CustomTextCLIP, config: ModelConfig, half: bool = False) -> Path:
    """Write the towers as a checkpoint folder; each file is complete or absent.

    Args:
        folder: created if absent; its two files are replaced.
        model: the towers, at any image size and text length.
        config: what `build_model` made them from.
        half: store float16 (half the size; loaded back as float32).

    Raises:
        CheckpointError: if the image tower is not at its native size (open_clip builds it at that size only).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    definition = open_clip_config(config)
    native, current = definition["vision_cfg"]["image_size"], model.visual.image_size[0]
    if native != current:
        raise CheckpointError(
            f"the image tower is at {current} px, and open_clip builds {config.image.timm_model} at {native} px: make "
            f"image_size {native} the last phase's, or call set_image_size first"
        )
    preprocess = {
        "mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD), "size": native, "mode": "RGB",
        "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(state, temporary)
    text = json.dumps({"model_cfg": definition, "preprocess_cfg": preprocess}, indent=1)
    write_atomically(folder / CONFIG_FILE, text + "\n")
    return folder


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> ImageTextModel:
    """Read a checkpoint folder (ours or any in open_clip's format) in evaluation mode.

    Raises:
        CheckpointError: if a file is missing or damaged, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint folder: it has no {CONFIG_FILE}; give a folder that tools/pretrain.py wrote "
            "(runs/…/checkpoint) or any open_clip folder"
        )
    weights = next((p for p in (folder / WEIGHTS_FILE, folder / "open_clip_pytorch_model.bin") if p.is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}: the checkpoint is incomplete, copy it again")
    try:
        config = json.loads(config_path.read_text())
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", device=device)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:  # open_clip raises many types for damaged files and shapes that do not fit
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder} cannot be loaded ({reason}); its configuration and weights must belong together"
        ) from error
    preprocess = config.get("preprocess_cfg", {})
    size = preprocess.get("size", config["model_cfg"]["vision_cfg"].get("image_size", 224))
    return ImageTextModel(
        model=model.eval(),
        tokenizer=tokenizer,
        image_size=size if isinstance(size, int) else size[0],
        mean=tuple(preprocess.get("mean", OPENAI_DATASET_MEAN)),
        std=tuple(preprocess.get("std", OPENAI_DATASET_STD)),
        embed_dim=config["model_cfg"]["embed_dim"],
        fingerprint=fingerprint(weights),
    )


def restore_full_shape(model: CustomTextCLIP, config: ModelConfig) -> None:
    """Bring towers back to the native image size and full text length, as a checkpoint folder holds them."""
    set_image_size(model, open_clip_config(config)["vision_cfg"]["image_size"])
    set_context_length(model, config.text.context_length)
