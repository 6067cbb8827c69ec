"""OTTER's label smoothing baseline (arXiv 2112.09445, section 4): the contrastive loss with smoothed labels.

loss = (CE(s·I·Tᵀ, Y) + CE(s·T·Iᵀ, Y)) / 2 with Y = 1 - smoothing on the diagonal and smoothing / (B - 1) elsewhere,
and s as in `info_nce`. OTTER's code adds the two directions up: twice this.
"""

from dataclasses import dataclass

import torch
from open_clip import CustomTextCLIP

from pretrain.config import ConfigError, ModelConfig, PhaseConfig
from pretrain.losses.soft_targets import smoothed_targets, soft_contrastive, true_pairs
from pretrain.objectives.info_nce import InfoNCE


@dataclass
class LabelSmoothingOptions:
    """Options of `label_smoothing`."""

    smoothing: float = 0.1  # probability taken from the pair and spread over the others of the batch, in 0–1


class LabelSmoothing(InfoNCE):
    """`InfoNCE` with smoothed labels.

    Raises:
        ConfigError: for a smoothing outside its range.
    """

    def __init__(self, model: CustomTextCLIP, config: ModelConfig, options: LabelSmoothingOptions | None = None):
        super().__init__(model, config)
        self.options = options or LabelSmoothingOptions()
        if not 0 <= self.options.smoothing < 1:
            raise ConfigError(
                f"objective.options.smoothing is {self.options.smoothing}: it must be at least 0 and below 1"
            )

    def enter_phase(self, phase: PhaseConfig) -> None:
        """See `InfoNCE`; a batch must hold another text to give probability to."""
        if self.options.smoothing and phase.batch_size < 2:
            raise ConfigError(
                f"batch_size of phase {phase.name} is {phase.batch_size}: label_smoothing needs at least 2 "
                "(or smoothing 0)"
            )
        super().enter_phase(phase)

    def _pair_loss(self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        targets = smoothed_targets(true_pairs(len(image), image.device, gather=True), self.options.smoothing)
        return soft_contrastive(image, text, scale, targets, targets, gather=True)
