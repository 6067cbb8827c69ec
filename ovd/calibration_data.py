"""Which detections are right, at which score, for vocabularies of many sizes: what `ovd/calibration.py` is fitted on.

The network runs once a picture, with all words; a softmax over fewer words is the same softmax renormalised, so any
number of smaller vocabularies costs next to nothing. In every second draw one word is an object of the picture, the
others are drawn from the base classes, and beyond these from LVIS's other names.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from ovd.active_vocabulary import word_forms
from ovd.calibration import ScoreCalibration, fit_curve, inference_settings
from ovd.data.images import read_image
from ovd.data.lvis import read_ground_truth
from ovd.detector import OpenVocabularyDetector
from ovd.known_vocabularies import known_vocabulary
from ovd.modeling.roi_heads import RegionScores
from ovd.modeling.selection import select_best
from ovd.text.vocabulary import normalize_word

SIZES = (1, 5, 20, 80, 200, 1203)
_OVERLAP = 0.5  # intersection over union from which a box is right
_LEAST_SCORE, _LIMIT = 0.005, 50  # of a picture's detections that are counted
_DRAWS = 8  # of vocabularies of one word for a picture; of N words the N^0.5-th part, at least 2

Key = tuple[bool, int]  # (the base classes compete, number of words reported)


@dataclass
class Picture:
    """What the network says about one picture, and what is there.

    Attributes:
        regions: scores of all words, base classes first.
        boxes: (G, 4) of the objects, xyxy in pixels of the network's input.
        labels: (G,) place of the object's class among the words, -1 for a class that is no base class.
        absent: places of words verified to be absent; None where everything is annotated.
    """

    regions: RegionScores
    boxes: Tensor
    labels: Tensor
    absent: set[int] | None


@dataclass
class Outcomes:
    """Detections of one kind of vocabulary: (N,) scores, (N,) whether they are right, (N,) number of the picture."""

    scores: np.ndarray
    right: np.ndarray
    pictures: np.ndarray

    def of(self, pictures: Iterable[int]) -> "Outcomes":
        """Those in some of the pictures."""
        chosen = np.isin(self.pictures, list(pictures))
        return Outcomes(self.scores[chosen], self.right[chosen], self.pictures[chosen])


def calibration_words(detector: OpenVocabularyDetector, size: int) -> tuple[list[str], int]:
    """Base classes, then LVIS's other names until there are `size` words; and the number of base classes.

    Raises:
        ValueError: the detector names no base classes.
    """
    if not detector.base_names:
        raise ValueError(
            "the detector names no base classes, which scores are calibrated on; train it with their names"
        )
    base, taken = [], set()
    for name in detector.base_names:
        if normalize_word(name) not in taken:
            base.append(name)
            taken.add(normalize_word(name))
    if len(base) >= size:
        return base, len(base)
    forms = word_forms(base)
    others = [w for w in known_vocabulary("lvis").words if not word_forms([w]) & forms]
    return base + others[: size - len(base)], len(base)


def read_pictures(
    detector: OpenVocabularyDetector,
    annotations: str | Path,
    images: str | Path,
    count: int,
    sizes: Sequence[int] = SIZES,
    exhaustive: bool = False,
    seed: int = 0,
    progress: Callable[[Sequence], Iterable] | None = None,
) -> tuple[list[Picture], int]:
    """Run the network over annotated pictures with all words; the detector's vocabulary is changed.

    Args:
        detector: with base classes.
        annotations: LVIS or COCO file.
        images: folder that its file names start from.
        count: pictures, drawn at random.
        sizes: of vocabularies to be drawn later; the largest says how many words are needed.
        exhaustive: every base object is annotated whatever `neg_category_ids` say.
        seed: of the draw.
        progress: wraps the list for display.

    Returns:
        The pictures, and the number of base classes.

    Raises:
        ValueError: no picture with a base object.
        ImageError: a picture cannot be read.
    """
    truth = read_ground_truth(annotations)
    words, num_base = calibration_words(detector, max(sizes))
    places = {normalize_word(word): i for i, word in enumerate(words[:num_base])}
    of_category = {c["id"]: places.get(normalize_word(c["name"]), -1) for c in truth["categories"]}
    found: dict[int, list[dict]] = {}
    for annotation in truth["annotations"]:
        if not annotation.get("iscrowd"):
            found.setdefault(annotation["image_id"], []).append(annotation)
    usable = [i for i in truth["images"] if any(of_category[a["category_id"]] >= 0 for a in found.get(i["id"], []))]
    if not usable:
        raise ValueError(
            f"{annotations} has no picture with an object of the detector's base classes; give its own set"
        )
    chosen = np.random.default_rng(seed).permutation(len(usable))[:count]
    detector.set_vocabulary(words, competitors=False)
    pictures = []
    for i in progress(chosen) if progress else chosen:
        image = usable[int(i)]
        path = Path(images) / (image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:]))
        absent = None
        if "neg_category_ids" in image and not exhaustive:
            absent = {of_category[c] for c in image["neg_category_ids"] if c in of_category} - {-1}
        pictures.append(_read_picture(detector, path, found[image["id"]], of_category, absent))
    return pictures, num_base


def _read_picture(
    detector: OpenVocabularyDetector, path: Path, objects: Sequence[dict], of_category: dict, absent: set[int] | None
) -> Picture:
    inputs = detector._inputs(read_image(path))
    with detector._network(detector._current()) as model:
        regions = model.inference([inputs], return_parts=True, max_detections=0)[0]["parts"]
    regions = RegionScores(**{k: v.float().cpu() if isinstance(v, Tensor) else v for k, v in vars(regions).items()})
    boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    boxes *= torch.tensor([regions.image_size[1] / inputs["width"], regions.image_size[0] / inputs["height"]] * 2)
    return Picture(regions, boxes, torch.tensor([of_category[o["category_id"]] for o in objects]), absent)


def restrict(regions: RegionScores, words: Tensor, background: bool = True) -> RegionScores:
    """The scores there would have been with some of the words only.

    Args:
        regions: scores of all words.
        words: (C,) their places, in the new order.
        background: the image-text score keeps its background, if it has any.
    """
    tiny = torch.finfo(torch.float32).tiny
    columns = torch.cat([torch.zeros(1, dtype=torch.long), 1 + words])
    z, p = regions.detector[:, columns], regions.image_text
    if not regions.independent:
        z = z / z.sum(dim=1, keepdim=True).clamp_min(tiny)
    if p is not None:
        p = p[:, columns]
        if not background:
            p[:, 0] = 0
        p = p / p.sum(dim=1, keepdim=True).clamp_min(tiny)
    return replace(regions, detector=z, image_text=p)


def collect_outcomes(
    detector: OpenVocabularyDetector,
    pictures: Sequence[Picture],
    num_base: int,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
) -> dict[Key, Outcomes]:
    """Draw vocabularies of each size for each picture, with and without competing base classes, and judge detections.

    Args:
        detector: whose fusion weights hold.
        pictures, num_base: from `read_pictures`.
        sizes: words reported; those beyond the words there are become as many as there are.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    total = pictures[0].regions.detector.shape[1] - 1
    always = detector.model.architecture.vlm_background  # else it stands in for competitors only
    found: dict[Key, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for number, picture in enumerate(pictures):
        own = np.unique(picture.labels[picture.labels >= 0].numpy())
        for size in sorted({min(s, total) for s in sizes}):
            for draw in range(max(2, round(_DRAWS / size**0.5))):
                words = _draw(rng, own if draw % 2 == 0 else (), size, num_base, total)
                rest = np.setdiff1d(np.arange(num_base), words)
                for compete in (False, True):
                    columns = torch.from_numpy(np.concatenate([words, rest]) if compete else words)
                    background = always or not compete
                    scores, right = _judge(detector, picture, columns, size, num_base, background)
                    entry = (scores, right, np.full(len(scores), number))
                    found.setdefault((compete, size), []).append(entry)
    return {key: Outcomes(*(np.concatenate(part) for part in zip(*v, strict=True))) for key, v in found.items()}


def _draw(rng: np.random.Generator, own: Sequence[int], size: int, num_base: int, total: int) -> np.ndarray:
    """Places of `size` words: one of `own` if there is any, base classes, and others once those are used up."""
    first = [int(rng.choice(own))] if len(own) else []
    rest = rng.permutation(np.setdiff1d(np.arange(num_base), first))
    return np.concatenate([first, rest, np.arange(num_base, total)]).astype(np.int64)[:size]


def _judge(
    detector: OpenVocabularyDetector,
    picture: Picture,
    words: Tensor,
    reported: int,
    num_base: int,
    background: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the detections that can be judged, best first, and whether they are right."""
    heads, regions = detector.model.roi_heads, restrict(picture.regions, words, background)
    fused = regions.fused(words < num_base, heads.alpha, heads.beta, heads.objectness_delta)[:, 1 : 1 + reported]
    threshold = max(_LEAST_SCORE, heads.box_predictor.test_score_thresh)
    nms = heads.box_predictor.test_nms_thresh
    best = select_best(regions.boxes, fused, regions.image_size, threshold, nms, _LIMIT)
    labels = words[best.pred_classes]
    overlaps = box_iou(best.pred_boxes.tensor, picture.boxes)
    free, scores, right = torch.ones(len(picture.boxes), dtype=torch.bool), [], []
    present = set(picture.labels.tolist())
    for i, label in enumerate(labels.tolist()):
        mine = overlaps[i] * (free & (picture.labels == label))
        hit = bool((mine >= _OVERLAP).any())
        if hit:
            free[mine.argmax()] = False
        elif label >= num_base and bool((overlaps[i][picture.labels < 0] >= _OVERLAP).any()):
            continue  # an object whose name is none of the base classes: perhaps this one
        elif picture.absent is not None and label not in present and label not in picture.absent:
            continue  # nobody has looked whether it is there
        scores.append(float(best.scores[i]))
        right.append(hit)
    return np.array(scores), np.array(right, dtype=bool)


def fit_calibration(
    detector: OpenVocabularyDetector, outcomes: dict[Key, Outcomes], measured: dict[str, Any] | None = None
) -> ScoreCalibration:
    """One curve for each kind of vocabulary."""
    curves: dict[bool, dict[int, Any]] = {}
    for (compete, size), one in outcomes.items():
        curves.setdefault(compete, {})[size] = fit_curve(one.scores, one.right)
    return ScoreCalibration(curves, inference_settings(detector.model.architecture), measured or {})


def precision_above(outcomes: Outcomes, threshold: float, key: Key, calibration: ScoreCalibration | None) -> dict:
    """Share of the detections with at least this (calibrated) score that are right, and how many those are."""
    scores = outcomes.scores
    if calibration is not None:
        scores = calibration.apply(scores, key[1], key[0])
    chosen = scores >= threshold
    count = int(chosen.sum())
    return {"precision": float(outcomes.right[chosen].mean()) if count else None, "detections": count}
