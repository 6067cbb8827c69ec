"""Image-text retrieval on Flickr30K and COCO: recall at 1, 5 and 10 both ways, and the mean of the two R@1 (RECLIP).

Annotations are the JSON of Karpathy's splits. An image is a hit if any of its captions is among the first k, a caption
if its one image is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore
from pretrain.evaluation.encoder import Encoder, evaluation_mode
from pretrain.evaluation.ranking import expected_hits

RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class CaptionedImages:
    """Images with their captions: `owners[i]` is the place in `images` of the image that caption i describes."""

    images: list[str]
    captions: list[str]
    owners: list[int]
    left_out: int  # captions that are empty; an image without any caption is left out with them


@dataclass(frozen=True)
class RetrievalResult:
    """Recalls are fractions in 0–1, by k; what could not be read is left out of both directions."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    images: int
    captions: int
    broken: int = 0

    @property
    def mean_recall_at_1(self) -> float:
        """RECLIP's single number for a data set."""
        return (self.image_to_text[1] + self.text_to_image[1]) / 2

    def to_dict(self) -> dict[str, float | int]:
        """For result files."""
        recalls = {f"image_to_text_r{k}": value for k, value in self.image_to_text.items()}
        recalls |= {f"text_to_image_r{k}": value for k, value in self.text_to_image.items()}
        counts = {"images": self.images, "captions": self.captions, "broken": self.broken}
        return {**recalls, "mean_r1": self.mean_recall_at_1, **counts}


def read_karpathy(
    path: str | Path, root: str | Path, split: str = "test", captions_per_image: int = 5
) -> CaptionedImages:
    """One split of `dataset_flickr30k.json` or `dataset_coco.json`.

    Args:
        path: the JSON.
        root: the images' folder; COCO's `filepath` sub-folders may be there or not.
        split: train, val, test (COCO also restval).
        captions_per_image: the first so many of an image (COCO has a few images with six or seven, and the usual
            protocol takes five); 0 takes all.

    Raises:
        ConfigError: if the file is not such a JSON or has no image of the split.
    """
    path, root = Path(path), Path(root)
    if not path.is_file():
        raise ConfigError(f"no captions at {path}: give Karpathy's dataset_flickr30k.json or dataset_coco.json")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["images"]
        found = sorted({entry["split"] for entry in entries})
        chosen = [entry for entry in entries if entry["split"] == split]
        texts = [[sentence["raw"].strip() for sentence in entry["sentences"]] for entry in chosen]
        names = [_image_name(entry, root) for entry in chosen]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a JSON of Karpathy's splits (images[] with split, filename, sentences[].raw): "
            f"{type(error).__name__} {error}"
        ) from error
    if not chosen:
        raise ConfigError(f"{path} has no image of split {split!r}; its splits: {', '.join(found) or 'none'}")
    data = CaptionedImages([], [], [], left_out=sum(not text for image in texts for text in image))
    for name, image in zip(names, texts, strict=True):
        kept = [text for text in image if text][: captions_per_image or None]
        if kept:
            data.owners.extend([len(data.images)] * len(kept))
            data.captions.extend(kept)
            data.images.append(name)
    if not data.images:
        raise ConfigError(f"{path}: no image of split {split!r} has a caption")
    return data


def _image_name(entry: dict, root: Path) -> str:
    inside = Path(entry.get("filepath") or "", entry["filename"])
    # COCO's own archives make `filepath`; who has all images in one folder need not rearrange them.
    return entry["filename"] if not (root / inside).exists() and (root / entry["filename"]).exists() else str(inside)


def recalls(
    queries_QD: torch.Tensor, gallery_CD: torch.Tensor, query_owner_Q: torch.Tensor, gallery_owner_C: torch.Tensor,
    chunk: int = 256,
) -> dict[int, float]:  # fmt: skip
    """Share of the queries that find a gallery item with the same owner among the first k of `RECALLS`.

    Similarities are made for `chunk` queries at a time, so memory grows with the gallery only.
    """
    hits = dict.fromkeys(RECALLS, 0.0)
    for start in range(0, len(queries_QD), chunk):
        scores = queries_QD[start : start + chunk] @ gallery_CD.T
        right = query_owner_Q[start : start + chunk, None] == gallery_owner_C
        for k in RECALLS:
            hits[k] += float(expected_hits(scores, right, k).sum())
    return {k: total / len(queries_QD) for k, total in hits.items()}


def evaluate_retrieval(
    encoder: Encoder, data: CaptionedImages, store: ImageStore, templates: Sequence[str] = ("{}",)
) -> RetrievalResult:
    """Encode everything once, rank in chunks.

    Args:
        data: an image that cannot be read is left out with its captions, and counted.
        templates: exactly one, for a prefix such as "a photo of {}".

    Raises:
        ConfigError: if there is more than one template.
        ValueError: if not one image can be read.
    """
    if len(templates) != 1:
        raise ConfigError(f"retrieval takes one template for the captions, not {len(templates)}")
    broken = len(encoder.broken)
    with evaluation_mode(encoder.model):
        parts = list(encoder.images(data.images, store))
        places, images_ID = torch.cat([p for p, _ in parts]), torch.cat([f for _, f in parts])
        whole = set(places.tolist())
        kept = [i for i, owner in enumerate(data.owners) if owner in whole]
        with encoder.bar(len(kept), "caption") as bar:
            texts_TD = encoder.texts([templates[0].replace("{}", data.captions[i]) for i in kept], bar)
        owners = torch.tensor([data.owners[i] for i in kept], device=encoder.feature_device)
        return RetrievalResult(
            image_to_text=recalls(images_ID, texts_TD, places, owners),
            text_to_image=recalls(texts_TD, images_ID, owners, places),
            images=len(images_ID), captions=len(kept), broken=len(encoder.broken) - broken,
        )  # fmt: skip
