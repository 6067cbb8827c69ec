"""A region classifier whose weights are text embeddings, so that its classes are words changed at run time.

Source: ViLD (section 3.2, learned background embedding), F-VLM and RO-ViT (cosine with a temperature).
This file does not make the text embeddings: see `ovd/text/embeddings.py`. Logit columns follow Detectron2: C classes,
then the background.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# CLIP clamps its own logit scale at 100; above it the softmax gradient dies.
MAX_SCALE = 100.0


def check_text_embeddings(embeddings: Tensor, embed_dim: int) -> Tensor:
    """Check a (C, D) matrix of text embeddings and return it as normalised float32.

    Raises:
        ValueError: not a matrix, no rows, another width than `embed_dim`, values that are not finite, or a zero row.
    """
    if embeddings.dim() != 2 or embeddings.shape[0] == 0:
        raise ValueError(
            f"text embeddings have shape {tuple(embeddings.shape)}, but a (classes, {embed_dim}) matrix with at least "
            "one class is needed; embed a vocabulary that is not empty"
        )
    if embeddings.shape[1] != embed_dim:
        raise ValueError(
            f"text embeddings are {embeddings.shape[1]} wide, but this detector classifies in {embed_dim} dimensions; "
            "embed the vocabulary with the text tower that belongs to this detector"
        )
    embeddings = embeddings.detach().float()
    if not torch.isfinite(embeddings).all():
        bad = (~torch.isfinite(embeddings).all(dim=1)).nonzero()[:, 0].tolist()
        raise ValueError(f"text embeddings of the classes {bad[:5]} are not finite; compute them again in float32")
    norms = embeddings.norm(dim=1)
    if (norms == 0).any():
        raise ValueError(f"text embedding of class {int((norms == 0).nonzero()[0])} is all zeros; compute it again")
    return embeddings / norms[:, None]


class TextClassifier(nn.Module):
    """Classify region features by cosine similarity with text embeddings and one learned background embedding.

    logits = scale * cos(W x, [text embeddings; background]), similarities in float32.

    Args:
        input_dim: width of the region feature.
        embed_dim: width D of the joint image-text space.
        scale: initial factor on the cosine, the inverse of the temperature.
        learn_scale: train log(scale), clamped to `MAX_SCALE`; False keeps it.
    """

    def __init__(self, input_dim: int, embed_dim: int, scale: float = 50.0, learn_scale: bool = True) -> None:
        super().__init__()
        if not 0 < scale <= MAX_SCALE:
            raise ValueError(f"classifier scale is {scale}, but it lies in 0..{MAX_SCALE:g}; choose one there")
        self.embed_dim = embed_dim
        self.projection = nn.Linear(input_dim, embed_dim)
        self.background_embedding = nn.Parameter(torch.randn(embed_dim) * embed_dim**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)
        # Not persistent: the vocabulary is an input, a checkpoint must load whatever its size.
        self.register_buffer("text_embeddings", torch.zeros(0, embed_dim), persistent=False)
        nn.init.normal_(self.projection.weight, std=input_dim**-0.5)
        nn.init.zeros_(self.projection.bias)

    @property
    def num_classes(self) -> int:
        """Number C of words in the vocabulary, the background not counted; 0 before one is set."""
        return self.text_embeddings.shape[0]

    def set_text_embeddings(self, embeddings: Tensor) -> None:
        """Make the rows of a (C, D) matrix the classes; they are normalised here. Raises ValueError as documented in
        `check_text_embeddings`."""
        self.text_embeddings = check_text_embeddings(embeddings, self.embed_dim).to(self.projection.weight.device)

    def forward(self, features: Tensor) -> Tensor:
        """Region features (N, input_dim) -> float32 logits (N, C + 1), the background last."""
        if self.num_classes == 0:
            raise ValueError("the detector has no vocabulary yet; call set_text_embeddings before running it")
        embeddings = self.projection(features)
        with torch.autocast(device_type=embeddings.device.type, enabled=False):
            region = F.normalize(embeddings.float(), dim=-1)
            background = F.normalize(self.background_embedding.float(), dim=-1)
            classes = torch.cat([self.text_embeddings.float(), background[None]])
            scale = self.log_scale.float().clamp(max=math.log(MAX_SCALE)).exp()
            return scale * region @ classes.T
