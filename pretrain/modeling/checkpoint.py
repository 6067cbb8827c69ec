"""Checkpoint folders in open_clip's format: the contract between pretraining, the detector and everyone else.

A folder holds `open_clip_config.json` and `open_clip_model.safetensors`; `open_clip.create_model_and_transforms(
"local-dir:FOLDER")` reads it without this package. Reading accepts any such folder, not only ours.

open_clip builds timm's image towers at one size each (the native one), so `open_clip_model.safetensors` is always at
that size. Towers trained last at another size have their own position table beside it, in a file that only this package
reads: here they come back as they were, elsewhere with resampled positions. `head_file` adds a third file.
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
from pretrain.parsing import parse_json

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_MAX_IMAGE_SIZE = 8192  # pixels: a position table has an entry for every patch
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
    write_tensors(folder / WEIGHTS_FILE, state)
    if size != native:
        belongs_to = {"weights_sha256": fingerprint(folder / WEIGHTS_FILE)}
        write_tensors(folder / POSITIONS_FILE, {_POSITIONS: own_table}, belongs_to)
    else:
        (folder / POSITIONS_FILE).unlink(missing_ok=True)
    definition = {"model_cfg": definition, "preprocess_cfg": preprocess, "trained_image_size": size}
    write_atomically(folder / CONFIG_FILE, json.dumps(definition, indent=1) + "\n")  # last: it makes the folder valid
    return folder


def copy_checkpoint(source: str | Path, target: str | Path, half: bool = False) -> Path:
    """Copy a checkpoint folder (ours or any in open_clip's format), all that belongs to the towers; each file whole or
    absent.

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
            write_tensors(target / file.name, {name: _halved(value) for name, value in load_file(file).items()})
        elif file.name != CONFIG_FILE:
            with replacing(target / file.name) as temporary:
                shutil.copyfile(file, temporary)
    (target / POSITIONS_FILE).unlink(missing_ok=True)
    if (source / POSITIONS_FILE).is_file():  # bound to the weights by their hash, which half precision changes
        table = {name: _halved(v) if half else v for name, v in load_file(source / POSITIONS_FILE).items()}
        write_tensors(target / POSITIONS_FILE, table, {"weights_sha256": fingerprint(target / WEIGHTS_FILE)})
    write_atomically(target / CONFIG_FILE, (source / CONFIG_FILE).read_text())
    return target


def _halved(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, complete or not at all; OSError if it cannot be written."""
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
        config = _read_config(config_path, weights.stat().st_size)
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", device=device)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:  # open_clip raises many types for damaged files and shapes that do not fit
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder} cannot be loaded ({reason}); its configuration and weights must belong together"
        ) from error
    preprocess = config["preprocess_cfg"]
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


def _read_config(path: Path, weight_bytes: int) -> dict:
    """The configuration, where it is one that can be tried: of the right types, and no larger than its weights.

    open_clip builds whatever it says, so a folder of others could fill the memory, or have files fetched and run.
    """
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy the folder again") from error
    model = config.get("model_cfg") if isinstance(config, dict) else None
    towers = [model.get(name) for name in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else []
    preprocess = config.get("preprocess_cfg", {}) if isinstance(config, dict) else None
    if not towers or not all(isinstance(tower, dict) for tower in towers) or not isinstance(preprocess, dict):
        raise CheckpointError(f"{path} has no model_cfg with vision_cfg and text_cfg: it is no open_clip configuration")
    if "trust_remote_code" in json.dumps(config):
        raise CheckpointError(f"{path} asks for code from elsewhere (trust_remote_code), which is not run: remove that")
    needed = _least_parameters(path, model)
    if needed > weight_bytes:
        raise CheckpointError(f"{path} describes {needed:.1e} parameters or more, and its weights are {weight_bytes} "
                              "bytes: they are cut off, or of another model; copy the folder again")  # fmt: skip
    for name in ("mean", "std"):
        values = preprocess.get(name, [0.5] * 3)
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
            raise CheckpointError(f"{path}: preprocess_cfg.{name} is {str(values)[:60]}; it must be three numbers")
    sizes = {
        "preprocess_cfg.size": preprocess.get("size", 224),
        "trained_image_size": config.get("trained_image_size", 224),
    }
    for name, value in sizes.items():
        sides = value if isinstance(value, list) and len(value) == 2 else [value]
        if not all(type(side) is int and 1 <= side <= _MAX_IMAGE_SIZE for side in sides):
            raise CheckpointError(f"{path}: {name} is {str(value)[:60]}; it must be 1 to {_MAX_IMAGE_SIZE} pixels")
    return {**config, "preprocess_cfg": preprocess}


def _least_parameters(path: Path, model: dict) -> int:
    """A lower bound of the parameters that the numbers of a model's configuration ask for; no parameter is under a
    byte."""

    def number(tower: dict, name: str, default: int, limit: int) -> int:
        value = tower.get(name, default)
        value = max(value) if isinstance(value, list) and value and all(type(v) is int for v in value) else value
        if type(value) is not int or not 0 <= value <= limit:
            raise CheckpointError(f"{path}: {name} is {str(value)[:60]}; it must be a whole number up to {limit}")
        return value

    embed_dim, text, image = number(model, "embed_dim", 0, 10**6), model["text_cfg"], model["vision_cfg"]
    number(image, "image_size", 224, _MAX_IMAGE_SIZE)
    needed = 0
    if not text.get("hf_model_name"):
        width, layers = number(text, "width", 512, 10**6), number(text, "layers", 12, 10**4)
        tokens = number(text, "vocab_size", 49408, 10**8) + number(text, "context_length", 77, 10**6)
        needed += width * (tokens + embed_dim) + 12 * layers * width * width
    if not image.get("timm_model_name"):
        width = number(image, "width", 768, 10**6)
        layers = image.get("layers", 12)
        # Four numbers are the stages of a ResNet, whose blocks are narrow.
        needed += 0 if isinstance(layers, list) else 12 * number(image, "layers", 12, 10**4) * width * width
    return needed


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
    try:
        with safe_open(path, framework="pt") as file:
            made_for = (file.metadata() or {}).get("weights_sha256")
            table = file.get_tensor(_POSITIONS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy the whole folder again") from error
    if made_for != weights_fingerprint:
        raise CheckpointError(f"{path} belongs to other weights than {WEIGHTS_FILE}: copy the whole folder again")
    try:
        set_image_size(model, size)
        with torch.no_grad():
            model.visual.trunk.pos_embed.copy_(table)
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not fit a tower of {size} px ({reason}): copy the folder again") from error
