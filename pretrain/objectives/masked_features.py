"""Masked feature prediction, the baseline that UTA (arXiv 2405.19009) compares itself with, as in EVA.

Blocks of patches (BEiT's, arXiv 2106.08254) are masked: a learned token takes the place of their content, and the
student, which sees every position, predicts the frozen teacher's features of the masked ones.
loss = - mean over the masked patches of cos(s_t, f_t).
Teacher, joint space and text tower are as in `uta`, so that both differ in nothing but what is masked and compared: the
prediction goes through the tower's own projection, where EVA has a head that is thrown away.
"""

import math
from dataclasses import dataclass

import torch
from open_clip import CustomTextCLIP
from torch import nn

from pretrain.config import ConfigError, ModelConfig
from pretrain.data.transforms import normalise
from pretrain.losses.token_alignment import token_alignment
from pretrain.modeling.image_tower import encode_image_and_patches
from pretrain.modeling.masking import keep_reversed_blocks
from pretrain.objectives.uta import TeacherAlignment, kept_count


@dataclass
class MaskedFeaturesOptions:
    """Options of `masked_features`."""

    teacher: str = ""  # a checkpoint folder, with the student's patch size, embed_dim and text tower
    mask_ratio: float = 0.4  # share of the patches that are masked and predicted


class MaskedFeatures(TeacherAlignment):
    """Prediction of the masked tokens. See `Objective` for the contract; the mask token is not part of `model`."""

    def __init__(
        self, model: CustomTextCLIP, config: ModelConfig, options: MaskedFeaturesOptions | None = None,
        recipe: dict | None = None,
    ):  # fmt: skip
        self.options = options or MaskedFeaturesOptions()
        if not 0 < self.options.mask_ratio < 1:
            raise ConfigError(f"objective.options.mask_ratio is {self.options.mask_ratio}: above 0, below 1")
        super().__init__(model, config, self.options.teacher, recipe)
        self.mask_token = nn.Parameter(torch.empty(model.visual.trunk.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)  # BEiT's

    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Per image: the mean negative cosine "alignment" at the masked patches, and a metric, (B,) each."""
        images, grid = batch["image"], self._patches()
        patches = math.prod(grid)
        count = max(1, patches - kept_count(patches, self.options.mask_ratio))
        # UTA keeps the patches of random blocks; here the same blocks are what is masked.
        hidden = keep_reversed_blocks(len(images), grid, count, images.device)
        masked = torch.zeros(len(images), patches, device=images.device).scatter(1, hidden, 1.0) > 0
        pooled, wanted = self.teacher(images)
        own_pooled, predicted = encode_image_and_patches(
            self.model.visual, normalise(images), masked=masked, mask_token=self.mask_token
        )
        index = hidden.unsqueeze(-1).expand(-1, -1, wanted.shape[-1])
        with torch.no_grad():
            pooled_cosine = -token_alignment(own_pooled.unsqueeze(1), pooled.unsqueeze(1))
        return {
            "alignment": token_alignment(predicted.gather(1, index), wanted.gather(1, index)),
            "pooled_cosine": pooled_cosine,
        }
