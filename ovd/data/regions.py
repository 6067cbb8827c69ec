"""Regions of training pictures with the image tower's embeddings, made once and kept in files, for distillation.

Source: ViLD (Gu et al., 2022, section 3.3), which computes them before training. `tools/prepare_data.py regions` writes
them (`ovd/engine/region_files.py`). The loss is in `ovd/losses/distillation.py`; there the same embeddings can be made
during training instead.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from detectron2.data.transforms import Transform
from detectron2.structures import Boxes, Instances
from torch import Tensor

from pretrain.atomic import replacing

_MIN_VISIBLE = 0.5  # share of a region that must be left after a crop for its embedding still to describe it


def precompute_regions(
    inputs: Iterable[dict],
    embed: Callable[[dict], tuple[Tensor, Tensor] | None],
    folder: str | Path,
    teacher: str = "",
) -> int:
    """Write one file of regions for each picture; pictures that have one already are left out, so it can be resumed.

    Args:
        inputs: {"image_id", …} of the TRAINING pictures, without augmentation.
        embed: gives the boxes (R, 4), xyxy in pixels of the original picture, and their embeddings (R, D): for example
            `OpenVocabularyRCNN.embed_proposals`. None: no file for this picture.
        folder: where; made when missing.
        teacher: fingerprint of the image-text model, which `read_regions` compares.

    Returns:
        Number of files written.

    Raises:
        ValueError: a file that is there already is broken, or of another teacher.
    """
    folder, written = Path(folder), 0
    folder.mkdir(parents=True, exist_ok=True)
    for one in inputs:
        target = folder / f"{one['image_id']}.npz"
        if target.is_file():
            _read(target, (), teacher)
            continue
        found = embed(one)
        if found is None:
            continue
        boxes, embeddings = (x.detach().float().cpu().numpy() for x in found)
        with replacing(target) as path, open(path, "wb") as file:
            np.savez(file, boxes=boxes, embeddings=embeddings.astype(np.float16), teacher=np.array(teacher))
        written += 1
    return written


def read_regions(folder: str | Path, image_id: int | str, teacher: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (R, 4), xyxy pixels of the original picture, and embeddings (R, D), both float32, of one picture.

    Raises:
        ValueError: the file is missing or broken, or another image-text model than `teacher` made it (None: any may).
    """
    boxes, embeddings = _read(Path(folder) / f"{image_id}.npz", ("boxes", "embeddings"), teacher)
    return boxes.astype(np.float32), embeddings.astype(np.float32)


def _read(path: Path, names: Sequence[str], teacher: str | None) -> list[np.ndarray]:
    """The arrays of these names; errors as in `read_regions`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays, made_by = [file[name] for name in names], str(file["teacher"])
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise ValueError(
            f"{path} holds no regions ({error}); remove it where it is there, and run tools/prepare_data.py regions"
        ) from error
    if teacher is not None and made_by != teacher:
        raise ValueError(
            f"{path} was made by the image-text model {made_by!r}, but this detector has {teacher!r}; remove the "
            "folder and run tools/prepare_data.py regions again, or give the folder of this model's regions"
        )
    return arrays


def place_regions(
    boxes: np.ndarray, embeddings: np.ndarray, transforms: Transform, size: tuple[int, int], limit: int = 300
) -> Instances:
    """Move regions of a picture into its augmented version, as the "regions" of a training input.

    A mirrored or rescaled region keeps its embedding, as in ViLD; one that a crop has cut by more than half is dropped.

    Args:
        boxes, embeddings: as from `read_regions`.
        transforms: what was applied to the picture.
        size: (height, width) of the augmented picture.
        limit: random regions kept, at most.

    Returns:
        `Instances` with `proposal_boxes` and `teacher_embeddings`.
    """
    moved = torch.as_tensor(transforms.apply_box(boxes.reshape(-1, 4)), dtype=torch.float32).reshape(-1, 4)
    whole, inside = Boxes(moved), Boxes(moved.clone())
    inside.clip(size)
    visible = inside.nonempty(1.0) & (inside.area() >= _MIN_VISIBLE * whole.area())
    chosen = visible.nonzero()[:, 0]
    chosen = chosen[torch.randperm(len(chosen))[:limit]]
    return Instances(size, proposal_boxes=inside[chosen], teacher_embeddings=torch.as_tensor(embeddings)[chosen])
