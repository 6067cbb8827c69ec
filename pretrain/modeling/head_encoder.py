"""The towers seen through a second pair of heads, or through both at once, for evaluation; nothing is trained here."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from torch import nn

from pretrain.modeling.tower_features import image_features, project_image, project_text, text_features


class HeadEncoder(nn.Module):
    """Embeddings [sqrt(w) z, sqrt(1 - w) h], with z the towers' own and h the second heads', both normalised.

    The cosine of two such embeddings is w times that of z plus 1 - w times that of h: an ensemble of similarities as
    one encoder. w = 0 leaves h alone.

    Args:
        model: the towers, with `visual` and `context_length` as open_clip has them.
        image_head: (B, W) pooled image features to (B, E).
        text_head: the same for texts.
        weight: w, in 0–1.
        head_logit_scale: logarithm of the inverse temperature that h was trained with; None: the towers' own.
    """

    def __init__(
        self, model: CustomTextCLIP, image_head: nn.Module, text_head: nn.Module, weight: float = 0.0,
        head_logit_scale: torch.Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model, self.image_head, self.text_head, self.weight = model, image_head, text_head, weight
        self.visual = model.visual
        self._head_logit_scale = head_logit_scale

    @property
    def context_length(self) -> int:
        """Tokens of a text."""
        return self.model.context_length

    @property
    def logit_scale(self) -> torch.Tensor:
        """Logarithm of the inverse temperature: of both spaces' inverse temperatures, the mean with their weights."""
        own = self.model.logit_scale.detach()
        if self._head_logit_scale is None:
            return own
        second = self._head_logit_scale.to(own.device)
        return (self.weight * own.exp() + (1 - self.weight) * second.exp()).log()

    def encode_image(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """(B, D) of normalised images; always of length 1, whatever `normalize` says."""
        features = image_features(self.model, images)
        return self._join(project_image(self.model, features) if self.weight else None, self.image_head(features))

    def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """(B, D) of token rows; always of length 1, whatever `normalize` says."""
        features = text_features(self.model, tokens)
        return self._join(project_text(self.model, features) if self.weight else None, self.text_head(features))

    def _join(self, own: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
        second = F.normalize(second.float(), dim=-1)
        if own is None:
            return second
        own = F.normalize(own.float(), dim=-1)
        return torch.cat([self.weight**0.5 * own, (1 - self.weight) ** 0.5 * second], dim=-1)


@dataclass(frozen=True)
class Heads:
    """A second pair of heads that training made, and how it is to be judged.

    Attributes:
        image: (B, W) pooled image features to (B, E).
        text: the same for texts.
        ensemble_weight: w of the ensemble w z + (1 - w) h, in 0–1.
        logit_scale: logarithm of the inverse temperature that h was trained with; None: the towers' own.
    """

    image: nn.Module
    text: nn.Module
    ensemble_weight: float
    logit_scale: torch.Tensor | None = None

    def encoder(self, model: CustomTextCLIP, space: str) -> HeadEncoder:
        """The towers in the space "h" or "ensemble"."""
        weight = self.ensemble_weight if space == "ensemble" else 0.0
        return HeadEncoder(model, self.image, self.text, weight, self.logit_scale)
