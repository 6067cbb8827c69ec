"""RECLIP's objective (arXiv 2304.06028): the plain symmetric contrastive loss with a learned temperature.

What makes it RECLIP is the curriculum, not the loss: small images and short texts first, then a short phase at high
resolution. loss = (CE(s·I·Tᵀ, diag) + CE(s·T·Iᵀ, diag)) / 2, with s = exp(logit_scale) <= 1 / min_temperature.

Two things a phase may add, for comparison: dropped image tokens (FLIP, arXiv 2212.00794) and cropped position
embeddings (RO-ViT, arXiv 2305.07011).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP

from pretrain.config import ConfigError, ModelConfig, PhaseConfig
from pretrain.data.transforms import normalise
from pretrain.losses.contrastive import info_nce
from pretrain.modeling.clip import set_context_length, set_image_size
from pretrain.modeling.cropped_positions import crop_positions, sample_boxes
from pretrain.modeling.image_tower import encode_image, patch_positions
from pretrain.modeling.masking import keep_patches
from pretrain.objectives.base import Objective

_ACCURACY_PAIRS = 1024  # a metric must not cost the memory that a chunked loss saves


@dataclass
class InfoNCEOptions:
    """Options of `info_nce`."""

    chunk_size: int = 0  # rows of the similarity matrix held at once; 0: all
    fixed_temperature: float = 0.0  # not learned but this, from the first step (UTA's fine-tuning: 0.01); 0: learned


def check_chunk_size(rows: int) -> None:
    """Raise a ConfigError for an option `chunk_size` below 0."""
    if rows < 0:
        raise ConfigError(f"objective.options.chunk_size is {rows}: rows held at once, or 0 for all")


class InfoNCE(Objective):
    """Owns the two towers. See `Objective` for the contract.

    Raises:
        ConfigError: for an option outside its range.
    """

    def __init__(self, model: CustomTextCLIP, config: ModelConfig, options: InfoNCEOptions | None = None):
        super().__init__()
        self.model = model.requires_grad_(True)  # the phase before may have frozen a tower
        self.options = options or InfoNCEOptions()
        check_chunk_size(self.options.chunk_size)
        self._max_log_scale = math.log(1 / config.min_temperature)
        self._phase = PhaseConfig()
        self._fix_temperature(self.options.fixed_temperature)

    def _fix_temperature(self, temperature: float) -> None:
        """Set the temperature and take it out of training; 0: leave it learned."""
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"objective.options.fixed_temperature is {temperature}: above 0, or 0 to learn it")
        self._is_fixed = temperature > 0
        if self._is_fixed:
            with torch.no_grad():
                self.model.logit_scale.fill_(-math.log(temperature))
            self.model.logit_scale.requires_grad_(False)

    def enter_phase(self, phase: PhaseConfig) -> None:
        """Resample the image positions and set the text length."""
        set_image_size(self.model, phase.image_size)
        set_context_length(self.model, phase.context_length)
        tokens = math.prod(self.model.visual.trunk.patch_embed.grid_size)
        if phase.keep_tokens > tokens:
            raise ConfigError(
                f"keep_tokens {phase.keep_tokens} of phase {phase.name}: an image of {phase.image_size} px has {tokens}"
            )
        self._phase = phase

    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Normalised float32 embeddings "image" and "text", (B, D) each."""
        image = self._encode_image(normalise(batch["image"]))
        text = self.model.text(batch["tokens"])
        return {"image": F.normalize(image.float(), dim=-1), "text": F.normalize(text.float(), dim=-1)}

    def _encode_image(self, images: torch.Tensor) -> torch.Tensor:
        visual, phase = self.model.visual, self._phase
        keep = positions = None
        if phase.token_dropping != "none":
            grid = visual.trunk.patch_embed.grid_size
            keep = keep_patches(phase.token_dropping, len(images), grid, phase.keep_tokens, images.device)
        if phase.cropped_positions:
            boxes = sample_boxes(len(images), device=images.device)
            positions = crop_positions(patch_positions(visual.trunk), boxes)
        return encode_image(visual, images, keep, positions)

    def loss(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss, the share of images whose own text is the nearest of (at most 1,024) texts, and the scale."""
        image, text = features["image"], features["text"]
        scale = self.model.logit_scale.exp()
        with torch.no_grad():
            nearest = (image[:_ACCURACY_PAIRS] @ text[:_ACCURACY_PAIRS].T).argmax(1)
            accuracy = (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean()
        return {"loss": self._pair_loss(image, text, scale), "batch_accuracy": accuracy, "logit_scale": scale.detach()}

    def _pair_loss(self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return info_nce(image, text, scale, chunk_size=self.options.chunk_size, gather=True)

    def after_step(self) -> None:
        """Keep the temperature above its floor (CLIP, section 2.5)."""
        if self._is_fixed:
            return
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, self._max_log_scale)
