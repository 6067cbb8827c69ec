"""Zero-shot classification: an image's class is the name whose text feature is nearest to the image's feature.

Class features are the mean of the normalised features of each prompt template, normalised again (CLIP, section 3.1.4).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, CustomTextCLIP

from pretrain.data.folder import ImageStore
from pretrain.data.tokenizer import build_tokenizer
from pretrain.data.transforms import evaluation_view, normalise


@dataclass(frozen=True)
class ZeroShotResult:
    """Accuracies are fractions in 0–1."""

    top1: float
    top5: float
    images: int
    classes: int

    @property
    def chance(self) -> float:
        """Expected top-1 of a guess."""
        return 1 / self.classes

    def to_dict(self) -> dict[str, float | int]:
        """For metrics files."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "images": self.images,
            "classes": self.classes,
            "chance": self.chance,
        }


def class_features(
    model: CustomTextCLIP, names: Sequence[str], templates: Sequence[str], device: torch.device, batch_size: int = 512,
    tokenizer: Callable[[list[str]], torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """(C, D) normalised text features of the names under a prompt ensemble (`tokenizer` as in `evaluate_zero_shot`)."""
    tokenizer = tokenizer or build_tokenizer(model.context_length)
    prompts = [template.format(name) for name in names for template in templates]
    parts = [
        F.normalize(model.encode_text(tokenizer(prompts[i : i + batch_size]).to(device)).float(), dim=-1)
        for i in range(0, len(prompts), batch_size)
    ]
    ensemble = torch.cat(parts).view(len(names), len(templates), -1).mean(1)
    return F.normalize(ensemble, dim=-1)


def topk_hits(similarities: torch.Tensor, labels: torch.Tensor, k: int) -> int:
    """How many rows of (N, C) similarities have their label among the k largest."""
    return int((similarities.topk(min(k, similarities.shape[1]), dim=1).indices == labels[:, None]).any(1).sum())


@torch.no_grad()
def evaluate_zero_shot(
    model: CustomTextCLIP, rows: Sequence[dict[str, str]], classes: Sequence[str], store: ImageStore,
    templates: Sequence[str], device: torch.device, batch_size: int = 256,
    tokenizer: Callable[[list[str]], torch.Tensor] | None = None, mean: Sequence[float] = OPENAI_DATASET_MEAN,
    std: Sequence[float] = OPENAI_DATASET_STD,
) -> ZeroShotResult:  # fmt: skip
    """Top-1 and top-5 of the rows' captions among `classes`.

    Args:
        model: towers at the image size and text length they are to be judged at; put back into its mode afterwards.
        rows: table rows; `caption` is the true class and must be in `classes`.
        classes: distinct names.
        tokenizer: texts to (N, context_length) int64; None: open_clip's own at the model's text length.
        mean, std: what the image tower was trained with, on the 0–1 scale.
    """
    index = {name: i for i, name in enumerate(classes)}
    training = model.training
    model.eval()
    text = class_features(model, classes, templates, device, tokenizer=tokenizer)
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]  # a pair in open_clip's towers, a number in some older ones
    top1 = top5 = 0
    for chunk in _chunks(rows, batch_size):
        images = torch.stack([evaluation_view(store.read(row["image"]), size) for row in chunk]).to(device)
        features = F.normalize(model.encode_image(normalise(images, mean, std)).float(), dim=-1)
        labels = torch.tensor([index[row["caption"]] for row in chunk], device=device)
        similarities = features @ text.T
        top1 += topk_hits(similarities, labels, 1)
        top5 += topk_hits(similarities, labels, 5)
    model.train(training)
    return ZeroShotResult(top1 / len(rows), top5 / len(rows), len(rows), len(classes))


def _chunks(rows: Sequence, size: int) -> Iterable[Sequence]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
