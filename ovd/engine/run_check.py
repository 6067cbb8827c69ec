"""Checks of what a configuration says of its detector and evaluation, made before the training that it would waste.

Nothing is built or embedded here.
"""

import copy
from typing import Any

import torch
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ovd.detector_folder import detector_folder, read_architecture
from ovd.engine.evaluate import check_evaluation, check_fixed_ap
from ovd.engine.finetune import check_changes
from ovd.modeling.detector_config import DetectorConfig
from ovd.precision import find_dtype
from pretrain.config import ConfigError


def check_config(cfg: Any) -> None:
    """Refuse what can be seen to be wrong without data, a detector or a device.

    Raises:
        ConfigError: a field of model.architecture or evaluation with a value that it cannot have.
    """
    if not isinstance(cfg.get("evaluation"), DictConfig):
        raise ConfigError(f"evaluation is {cfg.get('evaluation')!r}: it must be a group of fields")
    check_evaluation(cfg.evaluation)
    _description(_architecture_fields(cfg) or {})


def check_run(cfg: Any, device: str) -> None:
    """Refuse a training, or the evaluation after it, that could not be done.

    Args:
        device: of the run.

    Raises:
        ConfigError: see `check_config`; or fields that do not go with each other, the detector or the device.
    """
    check_config(cfg)
    architecture = planned_architecture(cfg)
    if architecture is not None:  # else the model is of the user's own kind
        check_masks(architecture.mask_on and cfg.model.get("masks", True), cfg.data.train)
        made_for(architecture.image_size, cfg.data.train, "data.train")
    if cfg.data.get("validation", True) == "":  # fine-tuning without a set to measure on
        return
    measured = cfg.evaluation
    try:
        find_dtype(measured.get("precision", "float32"), torch.device(device))
    except ValueError as error:
        raise ConfigError(f"evaluation.{error}") from error
    if architecture is not None:
        made_for(architecture.image_size, cfg.data.test, "data.test")
        kept = (measured.get("inference") or {}).get("detections_per_image", architecture.detections_per_image)
        check_fixed_ap(measured.get("fixed_ap", False), kept)


def planned_architecture(cfg: Any) -> DetectorConfig | None:
    """The description of the detector that is to be trained; None where cfg.model is not built from one.

    Raises:
        ConfigError: a field or value that is none, or, to fine-tune, no such detector or a change that it cannot have.
    """
    given = _architecture_fields(cfg)
    if cfg.model.get("detector") is None:
        return None if given is None else _description(given)
    check_changes(given or {})
    return _description(read_architecture(detector_folder(cfg.model.detector)) | (given or {}))


def _architecture_fields(cfg: Any) -> dict[str, Any] | None:
    """Fields of `DetectorConfig` that cfg.model.architecture gives; None where it is something else."""
    given = cfg.model.get("architecture")
    if not isinstance(given, DictConfig):
        return None
    try:
        given = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"model.architecture: {str(error).splitlines()[0]}") from error
    called = given.pop("_target_", DetectorConfig)
    return given if (locate(called) if isinstance(called, str) else called) is DetectorConfig else None


def _description(given: dict[str, Any]) -> DetectorConfig:
    try:
        return DetectorConfig.from_dict(given)
    except ValueError as error:
        raise ConfigError(f"model.architecture: {error}") from error


def made_for(size: int, loader: Any, field: str) -> Any:
    """A copy of a loader's description with pictures as large as the detector was made for.

    Args:
        size: the detector's image_size.
        field: of the config, for the message.

    Raises:
        ConfigError: the description has another size (0 is none): training, evaluation and `predict` would disagree.
    """
    loader = copy.deepcopy(loader)
    if "image_size" not in loader.get("mapper", ()):  # a loader of the user's own
        return loader
    given = loader.mapper.image_size
    if given not in (0, size):
        raise ConfigError(
            f"{field}.mapper.image_size is {given}, but the detector was made for {size}: set it to {size}, or train "
            f"one with model.architecture.image_size={given}"
        )
    loader.mapper.image_size = size
    return loader


def check_masks(mask_on: bool, loader: Any) -> None:
    """Refuse training pictures without the masks that a detector learns from.

    Raises:
        ConfigError: the detector has a mask head to be trained, and the loader is told to leave masks out.
    """
    if mask_on and not loader.get("mapper", {}).get("with_masks", True):
        raise ConfigError(
            "data.train.mapper.with_masks is False, but model.architecture.mask_on is True and masks are learned from "
            "masks: set model.architecture.mask_on=False too (to fine-tune, data.masks=False alone)"
        )
