"""ImageNet's validation images and its -A, -R, -V2 and -Sketch variants, from the user's own folders.

Names are open_clip's (CLIP's curated ones), WordNet ids and the 200 classes of -A and -R are timm's. ObjectNet is not
here: its classes are not ImageNet's.
"""

from importlib.resources import files
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

from pretrain.config import ConfigError
from pretrain.evaluation.image_folders import LabelledImages, class_folders, collect_images, is_number

IMAGENET_TASKS = ("imagenet", "imagenet-a", "imagenet-r", "imagenet-v2", "imagenet-sketch")
_SUBSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}


def class_synsets(task: str) -> list[str]:
    """The WordNet ids a task's images are classified among, in ImageNet's order: 200 for -A and -R, else 1000.

    Raises:
        ConfigError: if the task is not one of `IMAGENET_TASKS`.
    """
    if task not in IMAGENET_TASKS:
        raise ConfigError(f"task {task!r} is not one of {', '.join(IMAGENET_TASKS)}")
    if task in _SUBSETS:
        return files("timm.data").joinpath("_info", _SUBSETS[task]).read_text(encoding="utf-8").split()
    return list(ImageNetInfo().label_names())


def class_indices(task: str) -> list[int]:
    """The same classes as numbers 0–999."""
    place = {synset: index for index, synset in enumerate(ImageNetInfo().label_names())}
    return [place[synset] for synset in class_synsets(task)]


def read_imagenet(task: str, root: str | Path) -> LabelledImages:
    """A task's images and classes.

    Args:
        task: one of `IMAGENET_TASKS`.
        root: has one sub-folder a class, named by WordNet id; where all 1000 classes take part, numbers 0–999 (as -V2
            comes) do as well. Folders of some classes may be absent; the choice stays among all of the task's.

    Raises:
        ConfigError: if a folder is none of the task's classes, or there are no images.
    """
    synsets = class_synsets(task)
    folders = class_folders(root)
    numbered = all(is_number(folder) for folder in folders)
    if numbered and task not in _SUBSETS:
        # The number is the class: places in a sorted listing would mix them up ("10" sorts before "2").
        label_of = {folder: int(folder) for folder in folders}
    else:
        place = {synset: label for label, synset in enumerate(synsets)}
        label_of = {folder: place.get(folder, -1) for folder in folders}
    wrong = [folder for folder, label in label_of.items() if not 0 <= label < len(synsets)]
    if wrong:
        numbers = "" if task in _SUBSETS else " or numbers 0 to 999"
        raise ConfigError(
            f"{root}/{wrong[0]} is not a class of {task} ({len(wrong)} such folders): its {len(synsets)} class folders "
            f"are WordNet ids from {synsets[0]} to {synsets[-1]}{numbers}"
        )
    images, labels = collect_images(root, label_of)
    return LabelledImages(Path(root), images, labels, [IMAGENET_CLASSNAMES[index] for index in class_indices(task)])
