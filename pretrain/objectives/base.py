"""What the training loop knows of an objective: a module that owns what it trains and turns a batch into a loss."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from pretrain.config import PhaseConfig


class Objective(nn.Module, ABC):
    """Contract of every objective.

    A batch is {"image": (B, 3, S, S) uint8 RGB, "tokens": (B, L) int64}, this process's part of the global batch.
    `forward(batch) = loss(encode(batch))`; the two halves are apart so that the loop can encode a batch in pieces and
    still take the loss over all of it (accumulation with cached embeddings, `engine.step`). Nothing in either may wait
    for the device.
    """

    @abstractmethod
    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Embeddings of the batch, each with B rows; row i depends on pair i alone."""

    @abstractmethod
    def loss(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """ "loss", a scalar to minimise, whose mean over processes is the global batch's; further scalars to log."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss and metrics of one batch."""
        return self.loss(self.encode(batch))

    def enter_phase(self, phase: PhaseConfig) -> None:
        """Adapt what is trained to the phase's image size and text length; called before its optimiser is made."""

    def after_step(self) -> None:
        """Called after every optimiser step (clamps, moving averages)."""
