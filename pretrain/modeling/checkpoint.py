"""Checkpoint folders in open_clip's format: the contract between pretraining, the detector and everyone else.

A folder holds `open_clip_config.json` and `open_clip_model.safetensors`; `open_clip.create_model_and_transforms(
"local-dir:FOLDER")` reads it without this package. Reading accepts any such folder, not only ours.

open_clip builds timm's image towers at one size each (the native one), so `open_clip_model.safetensors` is always at
that size. Towers trained last at another size have their own position table beside it, in a file that only this package
reads: here they come back as they were, elsewhere with resampled positions.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, CustomTextCLIP
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain.atomic import replacing, write_atomically
from pretrain.config import ModelConfig
from pretrain.modeling.clip import build_model, open_clip_config, set_image_size
from pretrain.modeling.position_embedding import resample_grid

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
POSITIONS_FILE = "image_positions.safetensors"
_POSITIONS = "visual.trunk.pos_embed"


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
    preprocess: dict = field(default_factory=dict)  # open_clip's PreprocessCfg, its defaults filled in


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(folder: str | Path, model: CustomTextCLIP, config: ModelConfig, half: bool = False) -> Path:
    """Write the towers as a checkpoint folder; each file is complete or absent.

    Args:
        folder: created if absent; its files are replaced.
        model: the towers, at any image size and text length.
        config: what `build_model` made them from.
        half: store float16 (half the size; loaded back as float32).

    Raises:
        OSError: if a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    definition = open_clip_config(config)
    native = definition["vision_cfg"]["image_size"]
    preprocess = {
        "mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD), "size": native, "mode": "RGB",
        "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if half:
        state = {name: _halved(value) for name, value in state.items()}
    size, trunk, own_table = model.visual.image_size[0], model.visual.trunk, state[_POSITIONS]
    if size != native:
        prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        grid = native // trunk.patch_embed.patch_size[0]
        state[_POSITIONS] = resample_grid(own_table.float(), grid, prefix).to(own_table.dtype)
    _write_tensors(folder / WEIGHTS_FILE, state)
    if size != native:
        belongs_to = {"weights_sha256": fingerprint(folder / WEIGHTS_FILE)}
        _write_tensors(folder / POSITIONS_FILE, {_POSITIONS: own_table}, belongs_to)
    else:
        (folder / POSITIONS_FILE).unlink(missing_ok=True)
    definition = {"model_cfg": definition, "preprocess_cfg": preprocess, "trained_image_size": size}
    write_atomically(folder / CONFIG_FILE, json.dumps(definition, indent=1) + "\n")  # last: it makes the folder valid
    return folder


def copy_checkpoint(source: str | Path, target: str | Path, half: bool = False) -> Path:
    """Copy a checkpoint folder (ours or any in open_clip's format), all that belongs to it; each file whole or absent.

    Args:
        source: the folder.
        target: created if absent; may be the source itself, which is then left alone.
        half: store float16 (half the size; loaded back as float32).

    Raises:
        CheckpointError: if the source is no checkpoint folder.
        OSError: if a file cannot be read or written.
    """
    source, target = Path(source), Path(target)
    if not (source / CONFIG_FILE).is_file():
        raise CheckpointError(f"{source} is not a checkpoint folder: it has no {CONFIG_FILE}")
    if target.exists() and target.samefile(source):
        return target
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("open_clip_*"), key=lambda file: file.name == CONFIG_FILE):  # that one last
        if half and file.suffix == ".safetensors":
            _write_tensors(target / file.name, {name: _halved(value) for name, value in load_file(file).items()})
        elif file.name != CONFIG_FILE:
            with replacing(target / file.name) as temporary:
                shutil.copyfile(file, temporary)
    (target / POSITIONS_FILE).unlink(missing_ok=True)
    if (source / POSITIONS_FILE).is_file():  # bound to the weights by their hash, which half precision changes
        table = {name: _halved(v) if half else v for name, v in load_file(source / POSITIONS_FILE).items()}
        _write_tensors(target / POSITIONS_FILE, table, {"weights_sha256": fingerprint(target / WEIGHTS_FILE)})
    write_atomically(target / CONFIG_FILE, (source / CONFIG_FILE).read_text())
    return target


def _halved(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{path} cannot be written ({error})") from error


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
    weights_fingerprint = fingerprint(weights)
    if config.get("trained_image_size", size) != size:
        size = config["trained_image_size"]
        _restore_positions(folder / POSITIONS_FILE, model, size, weights_fingerprint)
    return ImageTextModel(
        model=model.eval(),
        tokenizer=tokenizer,
        image_size=size if isinstance(size, int) else size[0],
        mean=tuple(preprocess.get("mean", OPENAI_DATASET_MEAN)),
        std=tuple(preprocess.get("std", OPENAI_DATASET_STD)),
        embed_dim=config["model_cfg"]["embed_dim"],
        fingerprint=weights_fingerprint,
        preprocess={**model.visual.preprocess_cfg, "size": model.visual.image_size},
    )


def initial_model(config: ModelConfig) -> CustomTextCLIP:
    """Towers to start training from: those of the checkpoint folder `config.init`, or freshly initialised ones.

    Raises:
        CheckpointError: if the folder cannot be loaded, or holds other towers than `config` describes.
        ConfigError: as `build_model`.
    """
    model = build_model(config)
    if config.init is None:
        return model
    start = load_checkpoint(config.init)
    set_image_size(model, start.image_size)
    try:
        model.load_state_dict(start.model.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model.init {config.init} holds other towers than model.image, model.text and model.embed_dim describe "
            f"({reason}): copy those fields from the run that made it"
        ) from error
    return model


def _restore_positions(path: Path, model: nn.Module, size: int, weights_fingerprint: str) -> None:
    """Give the image tower the size and position table that it was trained with last."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing (the towers were trained at {size} px): copy the whole folder again")
    with safe_open(path, framework="pt") as file:
        if file.metadata().get("weights_sha256") != weights_fingerprint:
            raise CheckpointError(f"{path} belongs to other weights than {WEIGHTS_FILE}: copy the whole folder again")
        table = file.get_tensor(_POSITIONS)
    set_image_size(model, size)
    with torch.no_grad():
        model.visual.trunk.pos_embed.copy_(table)
