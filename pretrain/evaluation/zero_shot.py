"""Zero-shot classification: an image's class is the name whose text feature is nearest to the image's feature.

Class features are the mean of the normalised features of each prompt template, normalised again (CLIP, section 3.1.4).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore
from pretrain.data.tokenizer import build_tokenizer
from pretrain.evaluation.encoder import OWN_PREPROCESS, Encoder, evaluation_mode
from pretrain.evaluation.prompts import fill
from pretrain.evaluation.ranking import expected_hits


@dataclass(frozen=True)
class ZeroShotResult:
    """Accuracies are fractions in 0–1 of the images that could be read."""

    top1: float
    top5: float
    images: int  # without the broken ones
    classes: int  # to choose from
    mean_per_class: float = math.nan  # top-1, averaged over the classes that have images
    classes_with_images: int = 0
    broken: int = 0  # images that could not be read

    @property
    def chance(self) -> float:
        """Expected top-1 of a guess."""
        return 1 / self.classes

    def to_dict(self) -> dict[str, float | int]:
        """For metrics files."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "mean_per_class": self.mean_per_class,
            "images": self.images,
            "broken": self.broken,
            "classes": self.classes,
            "classes_with_images": self.classes_with_images,
            "chance": self.chance,
        }


def class_features(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """(C, D) normalised text features of the names under a prompt ensemble.

    A name that occurs twice (open_clip's ImageNet names have two such pairs) is encoded once, so that the tie between
    its classes is exact.

    Raises:
        ConfigError: if there is no name or no template.
    """
    if not names or not templates:
        raise ConfigError(f"{len(names)} class names and {len(templates)} prompt templates: give at least one of each")
    unique = list(dict.fromkeys(names))
    together = max(1, encoder.batch_size // len(templates))
    parts = []
    with encoder.bar(len(unique) * len(templates), "prompt") as bar:
        for start in range(0, len(unique), together):
            group = unique[start : start + together]
            features = encoder.texts([prompt for name in group for prompt in fill(templates, name)], bar)
            parts.append(F.normalize(features.view(len(group), len(templates), -1).mean(1), dim=-1))
    place = {name: index for index, name in enumerate(unique)}
    return torch.cat(parts)[[place[name] for name in names]]


def classify(
    encoder: Encoder, images: Sequence[str], labels: Sequence[int], store: ImageStore, classes: Sequence[str],
    templates: Sequence[str],
) -> ZeroShotResult:  # fmt: skip
    """Top-1, top-5 and mean per-class accuracy; ties count as if broken at random (see `ranking.py`).

    Args:
        images: names that `store` reads; one that cannot be read is left out and counted.
        labels: the true class of each, a place in `classes`.
        classes: names for the prompts.

    Raises:
        ConfigError: if there are no images, classes or templates.
        ValueError: if not one image can be read.
    """
    if not images:
        raise ConfigError("no image to classify: the table, split or folder is empty")
    broken = len(encoder.broken)
    truth = torch.tensor(labels, device=encoder.feature_device)
    top1 = torch.zeros(len(classes), dtype=torch.float64)
    top5, count = torch.zeros_like(top1), torch.zeros_like(top1)
    with evaluation_mode(encoder.model):
        text_CD = class_features(encoder, classes, templates)
        numbers = torch.arange(len(classes), device=encoder.feature_device)
        for places, features_BD in encoder.images(images, store):
            label_B = truth[places]
            scores_BC, right_BC = features_BD @ text_CD.T, label_B[:, None] == numbers
            label_B = label_B.cpu()
            top1.index_add_(0, label_B, expected_hits(scores_BC, right_BC, 1).cpu())
            top5.index_add_(0, label_B, expected_hits(scores_BC, right_BC, 5).cpu())
            count.index_add_(0, label_B, torch.ones(len(label_B), dtype=torch.float64))
    seen = count > 0
    return ZeroShotResult(
        top1=float(top1.sum() / count.sum()), top5=float(top5.sum() / count.sum()), images=int(count.sum()),
        classes=len(classes), mean_per_class=float((top1[seen] / count[seen]).mean()),
        classes_with_images=int(seen.sum()), broken=len(encoder.broken) - broken,
    )  # fmt: skip


def evaluate_zero_shot(
    model: nn.Module, rows: Sequence[Mapping[str, str]], classes: Sequence[str], store: ImageStore,
    templates: Sequence[str], device: torch.device, batch_size: int = 256,
    tokenizer: Callable[[list[str]], torch.Tensor] | None = None, preprocess: Mapping | None = None,
) -> ZeroShotResult:  # fmt: skip
    """How often the rows' captions are found among `classes`.

    Args:
        model: towers at the image size and text length they are to be judged at; put back into its mode afterwards.
        rows: table rows; `caption` is the true class and must be in `classes`.
        classes: distinct names.
        tokenizer: texts to (N, context_length) int64; None: open_clip's own at the model's text length.
        preprocess: fields of open_clip's `PreprocessCfg`; None: as this package trains (squares without a crop). Its
            size is the model's in any case.
    """
    index = {name: i for i, name in enumerate(classes)}
    tokenizer = tokenizer or build_tokenizer(model.context_length)
    encoder = Encoder(model, tokenizer, preprocess or OWN_PREPROCESS, device, batch_size=batch_size)
    labels = [index[row["caption"]] for row in rows]
    return classify(encoder, [row["image"] for row in rows], labels, store, classes, templates)
