"""What the training loop knows of an objective: a module that owns what it trains and turns a batch into a loss."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from pretrain.config import PhaseConfig


class Objective(nn.Module, ABC):
    """Contract of every objective.

    `forward(batch)` takes {"image": (B, 3, S, S) uint8 RGB, "tokens": (B, L) int64} and returns a dictionary with
    "loss" (a scalar to minimise) and any number of scalar tensors to log. Nothing in it may wait for the device.
    """

    @abstractmethod
    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss and metrics of one batch."""

    def enter_phase(self, phase: PhaseConfig) -> None:
        """Adapt what is trained to the phase's image size and text length; called before its optimiser is made."""

    def after_step(self) -> None:
        """Called after every optimiser step (clamps, moving averages)."""
