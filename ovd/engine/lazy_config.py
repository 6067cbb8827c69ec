"""Read a detector's LazyConfig and its overrides, with one clear sentence for what is wrong in them."""

import difflib
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config import ConfigError

REQUIRED = ("model", "data", "text", "optimizer", "schedule", "evaluation", "train")
# Groups without fields of their own, to which an override may add.
_OPEN = ("evaluation.fusion",)


def load_config(path: str | Path, overrides: list[str] = ()) -> Any:
    """Load a config file and apply `key=value` overrides.

    Raises:
        ConfigError: for a missing or broken file, a part that every detector config needs, or an unknown field; the
            message names the nearest.
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
        return LazyConfig.apply_overrides(cfg, list(overrides))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"overrides {' '.join(overrides)}: {str(error).splitlines()[0]}") from error


def _check_override(cfg: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    node, known_part = cfg, ""
    for part in key.split("."):
        if known_part in _OPEN:
            return
        names = [str(k) for k in node] if isinstance(node, DictConfig) else []
        if part not in names:
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names) or 'nothing'}"
            raise ConfigError(f"unknown field {key!r}: {hint}")
        known_part = f"{known_part}.{part}".lstrip(".")
        node = OmegaConf.to_container(node, resolve=False)[part]
        node = OmegaConf.create(node, flags={"allow_objects": True}) if isinstance(node, dict) else node
