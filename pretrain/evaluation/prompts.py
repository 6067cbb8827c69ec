"""Prompt templates: sentences with {} in place of a class name."""

from collections.abc import Sequence
from pathlib import Path

from open_clip import OPENAI_IMAGENET_TEMPLATES

from pretrain.config import ConfigError


def imagenet_templates() -> list[str]:
    """The 80 templates of CLIP's ImageNet ensemble, as open_clip carries them."""
    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def read_templates(path: str | Path) -> list[str]:
    """One template a line; empty lines are skipped.

    Raises:
        ConfigError: if there is no such file, or it has no template, or a line lacks {}.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no file of prompt templates at {path}: write one template a line, with {{}} for the name")
    templates = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not templates:
        raise ConfigError(f"{path} is empty: write one template a line, with {{}} for the name")
    return check_templates(templates, str(path))


def check_templates(templates: Sequence[str], source: str) -> list[str]:
    """The templates, if each has the place for the name.

    Raises:
        ConfigError: names the source and the first template without {}.
    """
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"{source} {template!r} has no {{}}: it marks the place of the class name")
    return list(templates)


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The prompts of one name. Plain replacement: a name or a template may hold other braces."""
    return [template.replace("{}", name) for template in templates]
