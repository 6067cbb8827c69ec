"""ViLD's distillation: region embeddings learn the image tower's embeddings of the regions' own crops.

Source: ViLD (Gu et al., 2022, section 3.3): L1 between normalised embeddings, on proposals whether labelled or not, so
that regions of classes without annotations are learned too; crops at 1x and 1.5x are averaged. No word and no
annotation takes part. Embeddings come from the training picture itself, or from files made beforehand
(`ovd/data/regions.py`). What is drawn as a proposal is decided elsewhere: see `ovd/modeling/roi_heads.py`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
