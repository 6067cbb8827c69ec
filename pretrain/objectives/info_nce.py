"""RECLIP's objective (arXiv 2304.06028): the plain symmetric contrastive loss with a learned temperature.

What makes it RECLIP is the curriculum, not the loss: small images and short texts first, then a short phase at high
resolution. loss = (CE(s·I·Tᵀ, diag) + CE(s·T·Iᵀ, diag)) / 2, with s = exp(logit_scale) <= 1 / min_temperature.
"""

import math

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP

from pretrain.config import ModelConfig, PhaseConfig
from pretrain.data.transforms import normalise
from pretrain.losses.contrastive import info_nce
from pretrain.modeling.clip import set_context_length, set_image_size
from pretrain.objectives.base import Objective


class InfoNCE(Objective):
    """Owns the two towers. See `Objective` for the contract."""

    def __init__(self, model: CustomTextCLIP, config: ModelConfig):
        super().__init__()
        self.model = model
        self._max_log_scale = math.log(1 / config.min_temperature)

    def enter_phase(self, phase: PhaseConfig) -> None:
        """Resample the image positions and set the text length."""
        set_image_size(self.model, phase.image_size)
        set_context_length(self.model, phase.context_length)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss, the share of images whose own text is the nearest, and the scale."""
        image_features = F.normalize(self.model.visual(normalise(batch["image"])).float(), dim=-1)
        text_features = F.normalize(self.model.text(batch["tokens"]).float(), dim=-1)
        scale = self.model.logit_scale.exp()
        loss = info_nce(image_features, text_features, scale)
        with torch.no_grad():
            nearest = (image_features @ text_features.T).argmax(1)
            accuracy = (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean()
        return {"loss": loss, "batch_accuracy": accuracy, "logit_scale": scale.detach()}

    def after_step(self) -> None:
        """Keep the temperature above its floor (CLIP, section 2.5)."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, self._max_log_scale)
