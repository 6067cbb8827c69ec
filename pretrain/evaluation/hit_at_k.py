"""Flat hit@K, OTTER's measure (arXiv 2112.09445, section 4.2): is one of an image's labels among the K best classes?

An image may have several labels, a class several names (synonyms); a class is ranked once, by its best name. (OTTER's
code ranks names, so that the synonyms of one class take several of the K places.) Suffixes: Q images, N names,
C classes, L labels of an image.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore
from pretrain.evaluation.encoder import Encoder, evaluation_mode
from pretrain.evaluation.ranking import expected_hits
from pretrain.evaluation.zero_shot import class_features

HITS = (1, 2, 5, 10)
PADDING = -1  # in a row of labels: no label


@dataclass(frozen=True)
class MultiLabelImages:
    """Images with their labels: `labels[i]` are places in `names`, which has the names of each class."""

    images: list[str]
    labels: list[list[int]]
    names: list[list[str]]
    left_out: int = 0  # rows without a label


@dataclass(frozen=True)
class HitResult:
    """Hits are fractions in 0–1, by K, of the images that could be read."""

    hits: dict[int, float]
    chance: float  # expected hit@1 of a guess
    images: int  # without the broken ones
    classes: int
    names: int
    labels_per_image: float
    broken: int = 0
    left_out: int = 0

    def to_dict(self) -> dict[str, float | int]:
        """For result files."""
        others = {name: value for name, value in vars(self).items() if name != "hits"}
        return {**{f"hit_at_{k}": value for k, value in self.hits.items()}, **others}


def hit_at_k(
    scores_QN: torch.Tensor, class_of_N: torch.Tensor, labels_QL: torch.Tensor, ks: Sequence[int] = HITS
) -> dict[int, torch.Tensor]:
    """For each K and image, whether one of its labels is among the K best classes.

    Args:
        scores_QN: larger is better.
        class_of_N: int64, the class of each name, from 0; its largest is the last class.
        labels_QL: int64, classes; unused places hold -1. An image without any label is a miss.
        ks: each at least 1.

    Returns:
        (Q,) float64 for each K: 0 or 1, or a probability where classes score alike (see `ranking.py`).

    Raises:
        ValueError: for a label that is no class.
    """
    classes = int(class_of_N.max()) + 1
    if labels_QL.max() >= classes or labels_QL.min() < PADDING:
        raise ValueError(
            f"labels from {int(labels_QL.min())} to {int(labels_QL.max())} with {classes} classes: use 0 to "
            f"{classes - 1}, and {PADDING} for no label"
        )
    scores_QC = scores_QN.new_full((len(scores_QN), classes), -torch.inf)
    scores_QC.scatter_reduce_(1, class_of_N.expand_as(scores_QN), scores_QN, "amax")
    right_QC = torch.zeros(len(scores_QN), classes + 1, dtype=torch.bool, device=scores_QN.device)
    right_QC.scatter_(1, labels_QL.masked_fill(labels_QL == PADDING, classes), True)
    return {k: expected_hits(scores_QC, right_QC[:, :classes], k) for k in ks}


def pad_labels(labels: Sequence[Sequence[int]]) -> torch.Tensor:
    """(Q, L) int64, L the most labels of an image."""
    longest = max((len(row) for row in labels), default=0) or 1
    return torch.tensor([[*row, *[PADDING] * (longest - len(row))] for row in labels])


def label_rows(
    rows: Sequence[Mapping[str, str]], every_row: Sequence[Mapping[str, str]], column: str,
    names: Mapping[str, Sequence[str]] | None = None,
) -> MultiLabelImages:  # fmt: skip
    """Labels from a table's column, several separated by "|".

    Args:
        rows: the images to judge.
        every_row: the classes are all labels that occur in these, if `names` does not say them.
        column: where the labels are.
        names: class to its names; None: a class is its own name.

    Raises:
        ConfigError: if there is no such column, no label, or a label has no names.
    """
    if column not in every_row[0]:
        raise ConfigError(f"--labels {column}: the table has no such column; it has {', '.join(every_row[0])}")
    if names is None:
        names = {label: [label] for label in sorted({label for row in every_row for label in _labels(row, column)})}
    place = {label: index for index, label in enumerate(names)}
    unknown = sorted({label for row in rows for label in _labels(row, column)} - place.keys())
    if unknown:
        raise ConfigError(f"{len(unknown)} labels of column {column!r} have no names, e.g. {unknown[0]!r}: add them")
    kept = [(row["image"], [place[label] for label in found]) for row in rows if (found := _labels(row, column))]
    if not kept:
        raise ConfigError(f"no row has a label in column {column!r}")
    images, labels = (list(part) for part in zip(*kept, strict=True))
    return MultiLabelImages(images, labels, [list(synonyms) for synonyms in names.values()], len(rows) - len(kept))


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Class to its names: JSON {class: name or [names]}, or lines "class<TAB>name|name".

    Raises:
        ConfigError: if the file is missing or another kind, or a class has no name.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no file of class names at {path}")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            found = {c: [names] if isinstance(names, str) else list(names) for c, names in json.loads(text).items()}
        else:
            pairs = [line.split("\t") for line in text.splitlines() if line.strip()]
            found = {label.strip(): names.split("|") for label, names in pairs}
        found = {label: [n.strip() for n in names if n.strip()] for label, names in found.items()}
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f'{path} must hold "class<TAB>name|name" lines, or JSON {{class: [names]}}') from error
    empty = [label for label, names in found.items() if not names]
    if empty or not found:
        raise ConfigError(f"{path}: class {empty[0]!r} has no name" if empty else f"{path} names no class")
    return found


def evaluate_hits(
    encoder: Encoder, data: MultiLabelImages, store: ImageStore, templates: Sequence[str]
) -> HitResult:  # fmt: skip
    """Flat hit@K over all classes; an image that cannot be read is left out and counted.

    Raises:
        ValueError: if not one image can be read.
    """
    broken, device = len(encoder.broken), encoder.feature_device
    class_of = [label for label, synonyms in enumerate(data.names) for _ in synonyms]
    class_of_N, labels = torch.tensor(class_of, device=device), pad_labels(data.labels).to(device)
    total, images, right = dict.fromkeys(HITS, 0.0), 0, 0
    with evaluation_mode(encoder.model):
        text_ND = class_features(encoder, [name for synonyms in data.names for name in synonyms], templates)
        for places, features_QD in encoder.images(data.images, store):
            for k, hits in hit_at_k(features_QD @ text_ND.T, class_of_N, labels[places]).items():
                total[k] += float(hits.sum())
            images += len(places)
            right += sum(len(set(data.labels[place])) for place in places.tolist())
    return HitResult(
        hits={k: value / images for k, value in total.items()}, chance=right / images / len(data.names), images=images,
        classes=len(data.names), names=len(class_of), labels_per_image=right / images,
        broken=len(encoder.broken) - broken, left_out=data.left_out,
    )  # fmt: skip


def _labels(row: Mapping[str, str], column: str) -> list[str]:
    return [label.strip() for label in (row.get(column) or "").split("|") if label.strip()]
