"""A region classifier whose weights are text embeddings, so that its classes are words changed at run time.

Source: ViLD (section 3.2, learned background embedding), F-VLM and RO-ViT (cosine with a temperature, background from
an empty prompt), Detic (one sigmoid a class with a learned bias).
This file does not make the text embeddings: see `ovd/text/embeddings.py`. Logit columns follow Detectron2: C classes,
then the background.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# CLIP clips exp(logit_scale) at 100 ("to prevent scaling the logits by more than 100", section 2.5); so is this one.
MAX_SCALE = 100.0
CLASSIFICATIONS = ("softmax", "sigmoid")
_PRIOR = (
    0.01  # probability of every class before training (focal loss, section 4.1), so that the many "no" do not swamp
)


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
    """Classify region features by cosine similarity with text embeddings.

    "softmax": logits = scale * cos(W x, [text embeddings; background]).
    "sigmoid": logits = scale * cos(W x, text embeddings) + bias, every class a yes or no of its own: its probability
    does not depend on the other words. There is no background; its column is -inf, so that its probability is 0.
    Similarities are float32.

    Args:
        input_dim: width of the region feature.
        embed_dim: width D of the joint image-text space.
        scale: initial factor on the cosine, the inverse of the temperature.
        learn_scale: train log(scale), at most log(`MAX_SCALE`); False keeps it.
        background_embedding: (D,) fixed embedding of the background, e.g. of an empty prompt; None learns one.
        classification: one of `CLASSIFICATIONS`.
    """

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        scale: float = 50.0,
        learn_scale: bool = True,
        background_embedding: Tensor | None = None,
        classification: str = "softmax",
    ) -> None:
        super().__init__()
        if not 0 < scale <= MAX_SCALE:
            raise ValueError(f"classifier scale is {scale}, but it lies in 0..{MAX_SCALE:g}; choose one there")
        if classification not in CLASSIFICATIONS:
            raise ValueError(f"classification is {classification!r}; choose one of {', '.join(CLASSIFICATIONS)}")
        self.embed_dim, self.classification = embed_dim, classification
        self.projection = nn.Linear(input_dim, embed_dim)
        # Nothing that would never get a gradient is made a parameter: processes that train together wait for those.
        if classification == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(-math.log((1 - _PRIOR) / _PRIOR)))
        elif background_embedding is None:
            self.background_embedding = nn.Parameter(torch.randn(embed_dim) * embed_dim**-0.5)
        else:
            self.register_buffer("background_embedding", self._check_background(background_embedding))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)
        # Not persistent: the vocabulary is an input, a checkpoint must load whatever its size.
        self.register_buffer("text_embeddings", torch.zeros(0, embed_dim), persistent=False)
        nn.init.normal_(self.projection.weight, std=input_dim**-0.5)
        nn.init.zeros_(self.projection.bias)

    @property
    def num_classes(self) -> int:
        """Number C of words in the vocabulary, the background not counted; 0 before one is set."""
        return self.text_embeddings.shape[0]

    def set_text_embeddings(self, embeddings: Tensor, background_embedding: Tensor | None = None) -> None:
        """Make the rows of a (C, D) matrix the classes; they are normalised here.

        Args:
            embeddings: (C, D).
            background_embedding: (D,) in the place of the fixed background, for embeddings of another prompt or tower;
                None keeps the one there is.

        Raises:
            ValueError: as documented in `check_text_embeddings`, or a background for a classifier that learned its own.
        """
        device = self.projection.weight.device
        checked = check_text_embeddings(embeddings, self.embed_dim).to(device)
        if background_embedding is not None:
            if "background_embedding" not in self._buffers:
                raise ValueError(
                    "a background embedding was given, but this classifier has none that could be replaced (it is "
                    "learned, or the classification is 'sigmoid'); leave it out, or build with background "
                    "'empty_prompt'"
                )
            self.background_embedding = self._check_background(background_embedding).to(device)
        self.text_embeddings = checked

    def _check_background(self, embedding: Tensor) -> Tensor:
        return check_text_embeddings(embedding.reshape(1, -1), self.embed_dim)[0]

    def embed(self, features: Tensor) -> Tensor:
        """Region features (N, input_dim) -> normalised float32 embeddings (N, D) in the joint space."""
        return F.normalize(self.projection(features).float(), dim=-1)

    def scale(self) -> Tensor:
        """Scalar float32 factor on the cosine, at most `MAX_SCALE`; in training the parameter itself is put there."""
        most = math.log(MAX_SCALE)
        if not self.training:
            return self.log_scale.float().clamp(max=most).exp()  # the last step may have left it a little above
        # A clamp in the graph would give a parameter above the limit no gradient, so that it stayed there for ever.
        # Done here and not after a step, it holds for any training loop, and for what a checkpoint brings.
        with torch.no_grad():
            self.log_scale.clamp_(max=most)
        return self.log_scale.float().exp()

    def forward(self, features: Tensor) -> Tensor:
        """Region features (N, input_dim) -> float32 logits (N, C + 1), the background last."""
        if self.num_classes == 0:
            raise ValueError("the detector has no vocabulary yet; call set_text_embeddings before running it")
        region = self.embed(features)
        with torch.autocast(device_type=region.device.type, enabled=False):
            classes = self.text_embeddings.float()
            scale = self.scale()
            if self.classification == "sigmoid":
                return F.pad(scale * region @ classes.T + self.bias.float(), (0, 1), value=-math.inf)
            background = F.normalize(self.background_embedding.float(), dim=-1)
            return scale * region @ torch.cat([classes, background[None]]).T

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (N, C + 1) -> probabilities of the same shape; rows sum to 1 with "softmax" only."""
        return logits.sigmoid() if self.classification == "sigmoid" else logits.softmax(dim=-1)
