"""What the training loop knows of an objective: a module that owns what it trains and turns a batch into a loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from open_clip import CustomTextCLIP
from PIL import Image
from torch import nn

from pretrain.config import DataConfig, PhaseConfig
from pretrain.data.views import Views, plain_views
from pretrain.modeling.head_encoder import Heads


@dataclass(frozen=True)
class Passes:
    """How often an objective runs towers over one pair in a step: what a plan of its cost needs to know.

    Where no text is embedded at all, the data need no captions.

    Attributes:
        images: passes through the image tower that are trained.
        texts: passes through the text tower that are trained.
        teacher_images: forward passes through a teacher's image tower, taken to be as large as the student's.
        teacher_texts: the same for texts.
        dropped: share of the patches that a trained pass does not see, besides those that the phase drops.
    """

    images: int = 1
    texts: int = 1
    teacher_images: int = 0
    teacher_texts: int = 0
    dropped: float = 0.0


class Objective(nn.Module, ABC):
    """Contract of every objective.

    `model` is the pair of towers that is evaluated and saved; whatever else is trained or carried along (projectors, a
    moving average, a frozen teacher, counters) is in the state dictionary too, so that resumption is exact. Before the
    first phase an objective of each is made on the meta device, and enters its phase there, to find errors early.

    A batch is {"image": (B, 3, S, S) uint8 RGB, "tokens": (B, L) int64}, or what `views` says, this process's part of
    the global batch.
    `forward(batch) = loss(encode(batch))`; the two halves are apart so that the loop can encode a batch in pieces and
    still take the loss over all of it (accumulation with cached embeddings, `engine.step`). Nothing in either may wait
    for the device.
    """

    model: CustomTextCLIP
    # Why a batch cannot be encoded in pieces, to follow "because "; empty: it can.
    whole_batch: ClassVar[str] = ""
    # Prefixes of state that the next phase does not take over where it has the same objective with other options: the
    # towers are there already, and what options alone decide must follow them.
    not_carried: ClassVar[tuple[str, ...]] = ("model.",)
    # Of that, what is taken over all the same, by whole names.
    carried: ClassVar[tuple[str, ...]] = ()

    def views(self, data: DataConfig, phase: PhaseConfig, backgrounds: Sequence[Image.Image]) -> Views:
        """What the loader makes of every pair."""
        return plain_views(data, phase, backgrounds)

    def recipe(self) -> dict[str, Any]:
        """Plain values that, with the state dictionary, make this objective again where a file that its options name is
        gone; the constructor gets them as `recipe`. Empty: options are enough."""
        return {}

    @classmethod
    def passes(cls, options: Any) -> Passes:
        """What a step costs with these options; one pass through each tower unless a subclass says otherwise."""
        return Passes()

    def encoders(self) -> dict[str, nn.Module]:
        """What zero-shot evaluation judges, by name; "" is the model itself. Each has open_clip's `encode_image`,
        `encode_text` and `context_length`."""
        return {"": self.model}

    def heads(self) -> Heads | None:
        """A second pair of heads that is saved beside the towers for later evaluation; None: there is none."""
        return None

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
