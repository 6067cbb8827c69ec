"""ViLD's distillation: region embeddings learn the image tower's embeddings of the regions' own crops.

Source: ViLD (Gu et al., 2022, section 3.3): L1 between normalised embeddings, on proposals whether labelled or not, so
that regions of classes without annotations are learned too; crops at 1x and 1.5x are averaged. No word and no
annotation takes part. Embeddings come from the training picture itself, or from files made beforehand by
`precompute_regions`. What is drawn as a proposal is decided elsewhere: see `ovd/modeling/roi_heads.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data.transforms import Transform
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from pretrain.atomic import replacing

_MIN_VISIBLE = 0.5  # share of a region that must be left after a crop for its embedding still to describe it


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L1 norm of the difference of normalised embeddings, averaged over regions (ViLD, equation 3).

    Args:
        student: (R, D) region embeddings; normalised here.
        teacher: (R, D) image embeddings of the same regions; normalised here, no gradient flows into them.

    Returns:
        Scalar float32; 0 with a gradient when there are no regions.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"region embeddings are {tuple(student.shape)} but the teacher's are {tuple(teacher.shape)}; distil from "
            "the image-text model that this detector is built on"
        )
    if len(student) == 0:
        return student.float().sum() * 0.0
    student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.detach().float(), dim=-1)
    return (student - teacher).abs().sum(dim=-1).mean()


class RegionTeacher:
    """The frozen image tower as the teacher of regions.

    No module, so that its copy of the tower is neither in checkpoints nor among the parameters; made when first used,
    so that a detector that only detects never holds it.

    Args:
        make_head: builds the module with `embed_regions(pixels, boxes) -> (R, D)`, e.g. a `CropTextHead`.
        embed_dim: width D of the embeddings.
        box_scales: the embeddings of crops of these sizes, relative to the box, are averaged.
    """

    def __init__(
        self, make_head: Callable[[], nn.Module], embed_dim: int, box_scales: Sequence[float] = (1.0, 1.5)
    ) -> None:
        if not box_scales or min(box_scales) <= 0:
            raise ValueError(f"distillation_box_scales is {tuple(box_scales)}; give at least one positive factor")
        self.make_head, self.embed_dim, self.box_scales = make_head, embed_dim, tuple(box_scales)
        self.head: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Normalised embeddings (R, D) of B lists of xyxy boxes in (B, 3, H, W) normalised pixels."""
        if not sum(len(b) for b in boxes):
            return pixels.new_zeros(0, self.embed_dim)
        if self.head is None:
            self.head = self.make_head().eval().requires_grad_(False)
        self.head.to(pixels.device)
        total = sum(self.head.embed_regions(pixels, [_scale(b, s) for b in boxes]) for s in self.box_scales)
        return F.normalize(total, dim=-1)


def _scale(boxes: Tensor, factor: float) -> Tensor:
    """Scale (N, 4) xyxy boxes about their centres."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * factor
    return torch.cat([centre - half, centre + half], dim=1)


def precompute_regions(
    inputs: Iterable[dict], embed: Callable[[dict], tuple[Tensor, Tensor]], folder: str | Path, teacher: str = ""
) -> int:
    """Write one file of regions for each picture; pictures that have one already are left out, so it can be resumed.

    Args:
        inputs: {"image_id", …} of the TRAINING pictures, without augmentation.
        embed: gives the boxes (R, 4), xyxy in pixels of the original picture, and their embeddings (R, D): for example
            `OpenVocabularyRCNN.embed_proposals`.
        folder: where; made when missing.
        teacher: fingerprint of the image-text model, which `read_regions` compares.

    Returns:
        Number of files written.
    """
    folder, written = Path(folder), 0
    folder.mkdir(parents=True, exist_ok=True)
    for one in inputs:
        target = folder / f"{one['image_id']}.npz"
        if target.is_file():
            continue
        boxes, embeddings = (x.detach().float().cpu().numpy() for x in embed(one))
        with replacing(target) as path, open(path, "wb") as file:
            np.savez(file, boxes=boxes, embeddings=embeddings.astype(np.float16), teacher=np.array(teacher))
        written += 1
    return written


def read_regions(folder: str | Path, image_id: int | str, teacher: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (R, 4), xyxy pixels of the original picture, and embeddings (R, D), both float32, of one picture.

    Raises:
        ValueError: the file is missing or broken, or another image-text model than `teacher` made it (None: any may).
    """
    path = Path(folder) / f"{image_id}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            boxes, embeddings, made_by = file["boxes"], file["embeddings"], str(file["teacher"])
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path} holds no regions ({error}); compute them with precompute_regions") from error
    if teacher is not None and made_by != teacher:
        raise ValueError(
            f"{path} was made by the image-text model {made_by!r}, but this detector has {teacher!r}; remove the "
            "folder and compute the regions again"
        )
    return boxes.astype(np.float32), embeddings.astype(np.float32)


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
