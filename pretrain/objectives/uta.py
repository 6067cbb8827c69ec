"""UTA, unmasked token alignment (arXiv 2405.19009): a student sees some patches and matches a frozen CLIP there.

A reversed block-wise mask keeps K of N patches. The student encodes those alone, with their own positions and no mask
token; the teacher encodes the whole image. With s and f the tokens of both in the teacher's joint space,
loss = - mean over the kept patches and the pooled token of cos(s_t, f_t).
The pooled token is what each tower embeds an image by: its class token, or the average of its patches.

The paper's student has a class token (`model.image.pool: token`).

As the student lives in the teacher's joint space, it classifies with the teacher's text tower, which is why `model` has
that one, frozen. No captions are read: images without are trained on, where no other phase needs captions. Contrastive
fine-tuning is a further phase with `info_nce` and its `fixed_temperature` at 0.01. The authors published no training
code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from open_clip import CustomTextCLIP
from PIL import Image

from pretrain.config import ConfigError, DataConfig, ModelConfig, PhaseConfig
from pretrain.data.transforms import normalise
from pretrain.data.views import Views
from pretrain.losses.token_alignment import token_cosines
from pretrain.modeling.clip import set_context_length, set_image_size
from pretrain.modeling.frozen_teacher import check_grids, load_teacher, teacher_again
from pretrain.modeling.image_tower import encode_image_and_patches
from pretrain.modeling.masking import keep_reversed_blocks
from pretrain.objectives.base import Objective, Passes


@dataclass
class UTAOptions:
    """Options of `uta`."""

    teacher: str = ""  # a checkpoint folder, with the student's patch size, embed_dim and text tower
    mask_ratio: float = 0.4  # share of the patches that the student does not see; 0.4 for ViT-B, 0.5 for ViT-L


class TeacherAlignment(Objective):
    """What learning from a frozen teacher's patch features has in common; a subclass says which tokens are compared.

    `model` is the student's image tower with the teacher's text tower.
    """

    not_carried = ("model.", "teacher.")  # another phase may have another teacher

    def __init__(self, model: CustomTextCLIP, config: ModelConfig, teacher: str, recipe: dict | None = None):
        super().__init__()
        self.teacher = teacher_again(recipe, model) if recipe else load_teacher(teacher, model, config)
        self.model = model

    def recipe(self) -> dict:
        """What the teacher is besides its weights."""
        return self.teacher.recipe

    @classmethod
    def passes(cls, options: "UTAOptions") -> Passes:
        """Images only, by student and teacher."""
        return Passes(texts=0, teacher_images=1)

    def views(self, data: DataConfig, phase: PhaseConfig, backgrounds: Sequence[Image.Image]) -> Views:
        """Images only."""
        return Views(super().views(data, phase, backgrounds).images)

    def enter_phase(self, phase: PhaseConfig) -> None:
        """Resample the positions of both image towers, and set the text length of evaluations."""
        if phase.token_dropping != "none" or phase.cropped_positions:
            raise ConfigError(
                f"phase {phase.name}: token_dropping and cropped_positions are not for {type(self).__name__}, which "
                "chooses its patches by objective.options.mask_ratio; remove them"
            )
        set_image_size(self.model, phase.image_size)
        set_context_length(self.model, phase.context_length)
        try:
            self.teacher.set_image_size(phase.image_size)
        except ValueError as error:
            raise ConfigError(f"phase {phase.name}, the teacher: {error}") from error
        check_grids(self.model, self.teacher)

    def loss(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean over images of "alignment", -1–1; of further per-image numbers (B,) the means, as metrics."""
        metrics = {name: value.detach().mean() for name, value in features.items() if name != "alignment"}
        return {"loss": features["alignment"].mean(), **metrics}

    def _patches(self) -> tuple[int, int]:
        return tuple(self.model.visual.trunk.patch_embed.grid_size)


class UTA(TeacherAlignment):
    """Alignment of the kept tokens. See `Objective` for the contract."""

    def __init__(
        self, model: CustomTextCLIP, config: ModelConfig, options: UTAOptions | None = None, recipe: dict | None = None
    ):  # fmt: skip
        self.options = options or UTAOptions()
        if not 0 <= self.options.mask_ratio < 1:
            raise ConfigError(f"objective.options.mask_ratio is {self.options.mask_ratio}: at least 0, below 1")
        super().__init__(model, config, self.options.teacher, recipe)

    @classmethod
    def passes(cls, options: UTAOptions) -> Passes:
        """The student does not see what is masked."""
        return replace(super().passes(options), dropped=options.mask_ratio)

    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Per image: the mean negative cosine "alignment", and two metrics, (B,) each."""
        images = batch["image"]
        keep = self._keep(images)
        pooled, patches = self.teacher(images)
        if keep is not None:
            patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        own_pooled, own_patches = encode_image_and_patches(self.model.visual, normalise(images), keep)
        cosines = token_cosines(
            torch.cat([own_pooled.unsqueeze(1), own_patches], dim=1), torch.cat([pooled.unsqueeze(1), patches], dim=1)
        )
        return {
            "alignment": -cosines.mean(1),
            "pooled_cosine": cosines[:, 0].detach(),
            "patch_cosine": cosines[:, 1:].mean(1).detach(),
        }

    def _keep(self, images: torch.Tensor) -> torch.Tensor | None:
        """(B, K) indices of the patches that the student sees; None: all."""
        grid = self._patches()
        keep = kept_count(math.prod(grid), self.options.mask_ratio)
        return None if keep == math.prod(grid) else keep_reversed_blocks(len(images), grid, keep, images.device)


def kept_count(patches: int, mask_ratio: float) -> int:
    """K = round((1 - mask_ratio) N) of N patches, at least one."""
    return max(1, round((1 - mask_ratio) * patches))
