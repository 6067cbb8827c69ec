"""The towers of an image-text model as functions of tensors: pixels or tokens in, normalised embeddings out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.modeling.checkpoint import ImageTextModel


class ImageEmbedder(nn.Module):
    """Pictures (N, 3, S, S) uint8 RGB, at the tower's size -> (N, D) rows of length 1."""

    def __init__(self, image_text: ImageTextModel) -> None:
        super().__init__()
        self.model = image_text.model
        for name in ("mean", "std"):
            values = 255.0 * torch.tensor(getattr(image_text, name))
            self.register_buffer(name, values.reshape(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Embed pictures."""
        return F.normalize(self.model.encode_image((image.float() - self.mean) / self.std), dim=-1)


class TextEmbedder(nn.Module):
    """Tokens (N, context length) int64 -> (N, D) rows of length 1."""

    def __init__(self, image_text: ImageTextModel) -> None:
        super().__init__()
        self.model = image_text.model

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed texts."""
        return F.normalize(self.model.encode_text(tokens), dim=-1)
