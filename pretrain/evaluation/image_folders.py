"""Labelled images in one folder per class (torchvision's ImageFolder layout), with names from the folders or a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from pretrain.config import ConfigError


@dataclass(frozen=True)
class LabelledImages:
    """Images to classify: `images` are relative to `root`, `labels` are places in `classes`."""

    root: Path
    images: list[str]
    labels: list[int]
    classes: list[str]  # what stands in the prompts


def class_folders(root: str | Path) -> list[str]:
    """The names of the sub-folders, in numeric order if all are numbers ("2" before "10"), else alphabetically.

    Raises:
        ConfigError: if there is no such folder or it has no sub-folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(f"no folder of images at {root}")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ConfigError(f"{root} has no sub-folders: put the images of each class into a folder of its own")
    return sorted(names, key=int) if all(is_number(name) for name in names) else names


def is_number(name: str) -> bool:
    """Whether a folder's name is a class number."""
    return name.isascii() and name.isdigit()


def collect_images(root: str | Path, label_of: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """Image files below the given folders of `root`, sub-folders included, with their labels.

    Raises:
        ConfigError: if there is none.
    """
    samples = make_dataset(str(root), dict(label_of), extensions=IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise ConfigError(
            f"no images in the {len(label_of)} class folders of {root}: {', '.join(IMG_EXTENSIONS)} count"
        )
    return [str(Path(path).relative_to(root)) for path, _ in samples], [label for _, label in samples]


def read_image_folder(root: str | Path, names_file: str | Path | None = None) -> LabelledImages:
    """One class per sub-folder, named after it (_ becomes a space) or by a file.

    Args:
        root: its sub-folders hold the images.
        names_file: JSON (a list in the order of the folders, or folder to name), or text: a name a line in the order of
            the folders, or "folder<TAB>name" lines.

    Raises:
        ConfigError: if folders and names do not belong together.
    """
    folders = class_folders(root)
    classes = [folder.replace("_", " ") for folder in folders]
    if names_file is not None:
        names = _read_names(Path(names_file))
        if isinstance(names, dict):
            missing = [folder for folder in folders if folder not in names]
            if missing:
                raise ConfigError(f"{names_file} has no name for {len(missing)} folders of {root}, e.g. {missing[0]!r}")
            classes = [names[folder] for folder in folders]
        elif len(names) != len(folders):
            raise ConfigError(
                f"{names_file} has {len(names)} names and {root} has {len(folders)} folders: write one name a folder, "
                'or "folder<TAB>name" lines'
            )
        else:
            classes = names
    images, labels = collect_images(root, {folder: label for label, folder in enumerate(folders)})
    return LabelledImages(Path(root), images, labels, classes)


def _read_names(path: Path) -> list[str] | dict[str, str]:
    if not path.is_file():
        raise ConfigError(f"no file of class names at {path}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON ({error})") from error
        values = names.values() if isinstance(names, dict) else names
        if not isinstance(names, (list, dict)) or not all(isinstance(name, str) for name in values):
            raise ConfigError(f"{path} must hold a list of names, or an object of folder to name")
        return names
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [line.split("\t", 1) for line in lines]
    if lines and all(len(pair) == 2 for pair in pairs):
        return {folder.strip(): name.strip() for folder, name in pairs}
    return lines
