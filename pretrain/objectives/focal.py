"""RO-ViT's objective (arXiv 2305.07011, section 3.2): a sigmoid focal loss over all pairs in place of the softmax."""

from dataclasses import dataclass

import torch
from open_clip import CustomTextCLIP

from pretrain.config import ModelConfig
from pretrain.losses.focal import focal_contrastive
from pretrain.objectives.info_nce import InfoNCE


@dataclass
class FocalOptions:
    """Options of `focal`; the defaults are those of the authors' code."""

    alpha: float = 0.5  # weight of matching pairs; 1 - alpha is that of the others
    gamma: float = 1.0  # how much less easy pairs count; 0: plain binary cross entropy
    chunk_size: int = 0  # rows of the similarity matrix held at once; 0: all


class FocalContrastive(InfoNCE):
    """`InfoNCE` with the focal loss."""

    def __init__(self, model: CustomTextCLIP, config: ModelConfig, options: FocalOptions | None = None):
        super().__init__(model, config)
        self.options = options or FocalOptions()

    def _pair_loss(self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        options = self.options
        return focal_contrastive(
            image, text, scale, alpha=options.alpha, gamma=options.gamma, chunk_size=options.chunk_size, gather=True
        )
