"""Fine-tuning a detector on a user's own boxes: where it starts, what it sees, what is kept of the words it knew.

The loop is `trainer`'s; weights between before and after are made in `interpolation`; what fine-tuning did to the other
words is measured by `tools/retention.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovd.data.mixing import Source, merge, read_with_split
from ovd.detector_folder import detector_folder, read_detector
from ovd.engine.interpolation import interpolate_detectors
from ovd.modeling.rcnn import OpenVocabularyRCNN
from ovd.text.vocabulary import normalize_word, prompt_phrase
from pretrain.atomic import write_atomically
from pretrain.config import ConfigError

TRAINING, VALIDATION, TUNED = "training.json", "validation.json", "finetuned"
WORDS = ("own", "all")


def check_changes(architecture: Mapping[str, Any]) -> None:
    """Refuse changes of a detector's description that would lose what it has learned.

    Raises:
        ConfigError: there is such a change.
    """
    if architecture.get("freeze_backbone"):
        # A frozen tower is not stored with a detector but taken from its image-text model, untrained.
        raise ConfigError("freeze_backbone would undo the tower's own training: set optimizer.backbone_lr_factor to 0")


def load_for_training(
    detector: str | Path, architecture: dict[str, Any] | None = None, masks: bool = True
) -> OpenVocabularyRCNN:
    """A detector's network, to train on.

    Args:
        detector: folder, or the name of one that ships.
        architecture: fields of `DetectorConfig` to change, such as vlm_mode "frozen_copy", whose image-text score the
            fine-tuning cannot touch (that of "crops" it never touches).
        masks: False where the data has no masks: the mask head stays as it is.

    Raises:
        ValueError: a change that the weights do not fit, or that would lose them.
    """
    changes = dict(architecture or {})
    check_changes(changes)
    model, _, _ = read_detector(detector_folder(detector), changes)
    if not masks:
        model.roi_heads.mask_on = False  # in this process alone: `architecture` says that there are masks
        for name, parameter in model.roi_heads.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not name.startswith("mask_head."))
    return model


def prepare_data(cfg: Any, output: Path) -> None:
    """Write `training.json` (own boxes, and replayed ones) and, where it is given, `validation.json`.

    Reads cfg.data.{annotations, images, validation, words} and cfg.data.replay.{annotations, images, share}.

    Raises:
        ConfigError: no annotations, or a share or a choice that is none.
        ValueError: see `read_ground_truth`.
    """
    data = cfg.data
    if not data.annotations:
        raise ConfigError("data.annotations is empty: give your COCO-format file, and its pictures in data.images")
    if data.words not in WORDS:
        raise ConfigError(f"data.words is {data.words!r}: {' or '.join(WORDS)}")
    if not 0 <= cfg.finetune.interpolation <= 1:
        raise ConfigError(f"finetune.interpolation is {cfg.finetune.interpolation}: it lies between 0 and 1")
    sources = [Source(data.annotations, data.images)]
    if data.replay.annotations:
        if not 0 < data.replay.share < 1:
            raise ConfigError(f"data.replay.share is {data.replay.share}: give a share of the pictures between 0 and 1")
        sources.append(Source(data.replay.annotations, data.replay.images))
    words = read_detector(detector_folder(cfg.model.detector))[2] if data.words == "all" else ()
    write_atomically(output / TRAINING, json.dumps(merge(sources, words)))
    if data.validation:
        write_atomically(output / VALIDATION, json.dumps(read_with_split(data.validation)))


def replay_shares(replay_annotations: str, share: float) -> list[float]:
    """Shares of own and replayed pictures, for `build_train_loader`; empty without replay."""
    return [1.0 - share, share] if replay_annotations else []


def joined_names(before: list[str], more: list[str]) -> list[str]:
    """Names of the base classes after fine-tuning: those of before, then those that are new."""
    known = {normalize_word(prompt_phrase(name)) for name in before}
    return before + [name for name in more if normalize_word(prompt_phrase(name)) not in known]


def interpolate(cfg: Any, output: Path, folder: Path) -> None:
    """Put the detector between before and after into `folder`, as cfg.finetune.interpolation says."""
    before = detector_folder(cfg.model.detector)
    interpolate_detectors(before, output / TUNED, cfg.finetune.interpolation, folder, cfg.train.half)
