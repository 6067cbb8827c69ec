"""The folder that a detector is kept in: written by `save_detector`, read by `read_detector`.

A folder holds `config.yaml` (format, architecture, names of the base classes, how words were prompted),
`model.safetensors` (what training changed), `image_text/` (the image-text model in open_clip's format: text tower,
projection, and the image tower where it is frozen), `base_words.safetensors` (the base classes' text embeddings, which
may be missing: they are then made again) and, once `tools/calibrate.py` has run, `calibration.json`.
This file does not predict, train or evaluate.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ovd.calibration import CALIBRATION
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import OpenVocabularyRCNN, build_detector
from ovd.text.embedding_file import load_embeddings, read_info, save_embeddings
from ovd.text.embeddings import Prompting, Prompts, class_prompts, embed_vocabulary
from ovd.text.vocabulary import Vocabulary
from pretrain.atomic import replacing, write_atomically
from pretrain.config import ConfigError
from pretrain.modeling.checkpoint import ImageTextModel, copy_checkpoint, load_checkpoint
from pretrain.parsing import parse_yaml

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
IMAGE_TEXT = "image_text"
BASE_WORDS = "base_words.safetensors"
_SHIPPED = Path(__file__).resolve().parent / "weights"


def shipped_names() -> list[str]:
    """Names of the detectors that ship with this installation."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG}"))


def detector_folder(name: str | Path, shipped_only: bool = False) -> Path:
    """A detector's folder: the path itself, or one that ships with the package under that name.

    Args:
        shipped_only: a name is never taken for a path.

    Raises:
        ConfigError: there is none.
    """
    for path in (_SHIPPED / name,) if shipped_only else (Path(name), _SHIPPED / name):
        if str(name) and (path / CONFIG).is_file():
            return path
    there = ", ".join(shipped_names()) or "none"
    if shipped_only:
        raise ConfigError(
            f"no detector named {str(name)!r} ships with this installation (there is: {there}); train one with "
            "tools/train_net.py and give its folder"
        )
    raise ConfigError(f"{str(name)!r} is no detector: give a folder with {CONFIG}, or one that ships ({there})")


def read_detector(
    folder: str | Path, changes: dict[str, Any] | None = None
) -> tuple[OpenVocabularyRCNN, ImageTextModel, list[str]]:
    """The network of a folder written by `save_detector` on the CPU, its image-text model, and its base names.

    Args:
        changes: fields of `DetectorConfig` that replace the folder's.

    Raises:
        ValueError: the folder, a file in it, or a field or tensor of it is missing or not as it should be.
    """
    folder = Path(folder)
    config = _read_config(folder)
    image_text = load_checkpoint(folder / IMAGE_TEXT, device="cpu")
    model = build_detector(DetectorConfig.from_dict({**config["architecture"], **(changes or {})}), image_text)
    _load_weights(model, folder / WEIGHTS)
    return model, image_text, config["base_names"]


def save_detector(
    folder: str | Path,
    model: OpenVocabularyRCNN,
    image_text_folder: str | Path,
    architecture: DetectorConfig | dict | None = None,
    base_names: Sequence[str] = (),
    float16: bool = False,
    prompting: Prompting | None = None,
) -> Path:
    """Write a detector checkpoint; every file is written beside its place and renamed, `config.yaml` last.

    Args:
        folder: where; made when missing.
        model: the trained network.
        image_text_folder: open_clip folder that the network was built from; its model and configuration are copied.
        architecture: description that rebuilds the network; None takes the one it was built with.
        base_names: names of the categories trained on, as in the annotation file.
        float16: store weights in half the space; they are loaded as float32.
        prompting: how the words trained on became prompts; None stands for the default of `Prompting`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    copy_checkpoint(image_text_folder, folder / IMAGE_TEXT, half=float16)
    for name in (CALIBRATION, BASE_WORDS):  # they belong to the weights that they were made with
        (folder / name).unlink(missing_ok=True)
    skipped = _frozen_prefixes(model)
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith(skipped)}
    with replacing(folder / WEIGHTS) as path:
        save_file(_stored(tensors, float16), path, {"format": "pt"})
    description = architecture if isinstance(architecture, dict) else asdict(architecture or model.architecture)
    content = {"format": FORMAT, "architecture": description, "base_names": list(base_names)}
    content["text"] = asdict(prompting or Prompting())
    content = json.loads(json.dumps(content))  # tuples and such become plain lists
    write_atomically(folder / CONFIG, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return folder


def read_architecture(folder: str | Path) -> dict[str, Any]:
    """Fields of `DetectorConfig` that a detector was saved with, unchecked.

    Raises:
        ValueError: the folder has no `config.yaml` that can be used.
    """
    return _read_config(Path(folder))["architecture"]


def read_prompting(folder: str | Path) -> Prompting:
    """How the words that a detector was trained on became prompts; the default where its folder does not say.

    Raises:
        ValueError: the folder has no `config.yaml` that can be used.
    """
    return _read_config(Path(folder))["text"]


def write_base_words(folder: str | Path, device: str | torch.device = "cpu") -> Path:
    """Embed a saved detector's base classes with the text tower in its folder and keep the rows beside it.

    With 80 prompts a class that takes a CPU hours, and whoever loads the detector would have to do it again.

    Args:
        folder: of `save_detector`, with at least one base name.
        device: of the text tower meanwhile.
    """
    folder = Path(folder)
    config, image_text = _read_config(folder), load_checkpoint(folder / IMAGE_TEXT, device)
    templates = config["text"].templates
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # words that repeat or are cut: training has said so
        words = Vocabulary.from_words(config["base_names"])
        rows = embed_vocabulary(words, image_text, templates)
    return save_embeddings(folder / BASE_WORDS, rows, words, image_text, templates)


def read_base_words(folder: str | Path, image_text: ImageTextModel) -> dict[Prompts, Tensor]:
    """Rows of `write_base_words` by the prompts they were made of; none where the folder has no such file.

    Raises:
        ValueError: the file is damaged or belongs to another text tower.
    """
    path = Path(folder) / BASE_WORDS
    if not path.is_file():
        return {}
    info = read_info(path)
    rows = load_embeddings(path, info.vocabulary, image_text)
    return dict(zip(class_prompts(info.vocabulary, info.templates, info.use_synonyms), rows, strict=True))


def _frozen_prefixes(model: OpenVocabularyRCNN) -> tuple[str, ...]:
    """Prefixes of the weights that are exact copies of the image-text model's and are built again from it."""
    return ("roi_heads.image_text_head.",) + (("backbone.net.",) if model.backbone.net.frozen else ())


def _stored(tensors: dict[str, Tensor], float16: bool) -> dict[str, Tensor]:
    def convert(value: Tensor) -> Tensor:
        value = value.detach().cpu().contiguous()
        return value.half() if float16 and value.is_floating_point() else value

    return {name: convert(value) for name, value in tensors.items()}


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no detector checkpoint: {CONFIG} is missing; give the folder that holds it")
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML ({error}); save the detector again") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), dict):
        raise ValueError(f"{path} has no architecture; save the detector again with save_detector")
    if config.get("format") != FORMAT:
        raise ValueError(f"{path} has format {config.get('format')!r}, but this version reads {FORMAT}; save it again")
    names = config.get("base_names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: base_names must be a list of words; save the detector again")
    return {"architecture": config["architecture"], "base_names": names, "text": _prompting(config, path)}


def _prompting(config: dict, path: Path) -> Prompting:
    text = config.get("text") or asdict(Prompting())
    templates = text.get("templates") if isinstance(text, dict) else None
    if (
        not isinstance(templates, (list, tuple))
        or not templates
        or not all(isinstance(t, str) and "{}" in t for t in templates)
        or not isinstance(text.get("use_synonyms"), bool)
    ):
        raise ValueError(f"{path}: text must have templates with {{}} and use_synonyms; save the detector again")
    return Prompting(tuple(templates), text["use_synonyms"])


def _load_weights(model: OpenVocabularyRCNN, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole checkpoint folder")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or save the checkpoint again") from error
    skipped = _frozen_prefixes(model)
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(skipped)}
    different = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    wrong = sorted(set(own) ^ set(tensors)) + different
    if wrong:
        raise ValueError(
            f"{path} does not fit its own {CONFIG}: {len(wrong)} tensors are missing, unknown or of another shape "
            f"({', '.join(wrong[:3])}); save the detector again"
        )
    # load_state_dict copies into the float32 parameters, so float16 storage comes back as float32.
    model.load_state_dict(tensors, strict=False)
