"""Read a detector's LazyConfig and its overrides, with one clear sentence for what is wrong in them."""

import difflib
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ovd.engine.evaluate import FUSION_SETTINGS, INFERENCE_SETTINGS
from ovd.engine.run_check import check_config
from ovd.modeling.detector_config import DetectorConfig
from pretrain.config import ConfigError

REQUIRED = ("model", "data", "text", "optimizer", "schedule", "evaluation", "train")
# Groups that may stand empty in a file, and what an override may put there.
_OPEN = {
    "evaluation.fusion": FUSION_SETTINGS,
    "evaluation.inference": tuple(INFERENCE_SETTINGS),
    "model.architecture": tuple(field.name for field in fields(DetectorConfig)),
}


def load_config(path: str | Path, overrides: list[str] = ()) -> Any:
    """Load a config file and apply `key=value` overrides.

    Raises:
        ConfigError: for a missing or broken file, a part that every detector config needs, an unknown field (the
            message names the nearest), or a value that the detector or the evaluation after the training cannot have.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise ConfigError(f"no configuration file {path}{hint}")
    if path.suffix != ".py":
        raise ConfigError(f"{path} is not a detector configuration: those are Python files below configs/ovd")
    try:
        cfg = LazyConfig.load(str(path))
    except (SyntaxError, ImportError, AttributeError, NameError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as a configuration: {str(error).splitlines()[0]}") from error
    missing = [name for name in REQUIRED if name not in cfg]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}: start from configs/ovd/mini_lvis.py")
    for override in overrides:
        _check_override(cfg, override)
    try:
        cfg = LazyConfig.apply_overrides(cfg, list(overrides))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"overrides {' '.join(overrides)}: {str(error).splitlines()[0]}") from error
    check_config(cfg)
    return cfg


def _check_override(cfg: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    node, known_part = cfg, ""
    for part in key.split("."):
        names = _settable(node, known_part)
        if part not in names:
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names) or 'nothing'}"
            raise ConfigError(f"unknown field {key!r}: {hint}")
        known_part = f"{known_part}.{part}".lstrip(".")
        node = OmegaConf.to_container(node, resolve=False).get(part)
        node = OmegaConf.create(node, flags={"allow_objects": True}) if isinstance(node, dict) else node


def _settable(node: Any, path: str) -> list[str]:
    """Names that an override may set in a node: those written there, and the parameters of what it calls."""
    if not isinstance(node, DictConfig):
        return []
    names = [str(name) for name in node]
    called = OmegaConf.to_container(node, resolve=False).get("_target_")
    if called is not None:
        called = locate(called) if isinstance(called, str) else called
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names += [p.name for p in inspect.signature(called).parameters.values() if p.kind in named]
    return list(dict.fromkeys([*names, *_OPEN.get(path, ())]))
