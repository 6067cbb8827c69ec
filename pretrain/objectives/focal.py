"""RO-ViT's objective (arXiv 2305.07011, section 3.2): a sigmoid focal loss over all pairs in place of the softmax."""

import math
from dataclasses import dataclass

import torch
from open_clip import CustomTextCLIP

from pretrain.config import ConfigError, ModelConfig
from pretrain.losses.focal import focal_contrastive
from pretrain.objectives.info_nce import InfoNCE, check_chunk_size


@dataclass
class FocalOptions:
    """Options of `focal`; the defaults are those of the authors' code."""

    alpha: float = 0.5  # weight of matching pairs; 1 - alpha is that of the others
    gamma: float = 1.0  # how much less easy pairs count; 0: plain binary cross entropy
    chunk_size: int = 0  # rows of the similarity matrix held at once; 0: all


class FocalContrastive(InfoNCE):
    """`InfoNCE` with the focal loss.

    Raises:
        ConfigError: for an option outside its range.
    """

    def __init__(self, model: CustomTextCLIP, config: ModelConfig, options: FocalOptions | None = None):
        super().__init__(model, config)
        self.options = options or FocalOptions()
        check_chunk_size(self.options.chunk_size)
        alpha, gamma = self.options.alpha, self.options.gamma
        if not 0 <= alpha <= 1 or not 0 <= gamma < math.inf:
            raise ConfigError(
                f"objective.options: alpha {alpha} must be between 0 and 1, and gamma {gamma} at least 0 "
                "(RO-ViT's: 0.5 and 1)"
            )

    def _pair_loss(self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        options = self.options
        return focal_contrastive(
            image, text, scale, alpha=options.alpha, gamma=options.gamma, chunk_size=options.chunk_size, gather=True
        )
