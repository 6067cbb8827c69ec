"""Why a region got its scores: the best words with the detector's part, the image-text model's part and their weight.

Source of the parts: F-VLM (equation 4), see `ovd/modeling/score_fusion.py`. Nothing is computed here that inference
does not compute too; the API is `OpenVocabularyDetector.explain`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ovd.evaluation.results import text_table
from ovd.modeling.rcnn import OpenVocabularyRCNN
from ovd.modeling.roi_heads import RegionScores


@dataclass(frozen=True)
class WordScore:
    """One word's part in the scores of a region; all numbers but the weight are probabilities.

    Attributes:
        word: the word.
        detector: the detector's probability z.
        image_text: the image-text model's probability p, None without such scores.
        weight: w of z^(1-w) * p^w; alpha for base words, beta for the others, 0 without image-text scores.
        fused: after fusion and renormalisation.
        score: fused times objectness^delta: what is reported where scores are not calibrated.
        is_base: the word counts as trained on.
        reported: False for words that only compete for the scores.
    """

    word: str
    detector: float
    image_text: float | None
    weight: float
    fused: float
    score: float
    is_base: bool
    reported: bool


@dataclass(frozen=True)
class Explanation:
    """The scores of one region.

    Attributes:
        box: (4,) x1 y1 x2 y2 in pixels of the upright picture: the box given, or that of the detection.
        words: the best words by score, best first.
        background: the detector's background probability.
        background_fused: the same after fusion and renormalisation.
        objectness: of the proposal, 0..1; for a box given, of the proposal that overlaps it most.
        overlap: intersection over union of that proposal with the region that was scored; 1 for a detection.
        delta: exponent of the objectness.
    """

    box: tuple[float, float, float, float]
    words: list[WordScore]
    background: float
    background_fused: float
    objectness: float
    overlap: float
    delta: float

    def table(self) -> str:
        """The words as a Markdown table, and the numbers that are the same for all of them below it."""
        body = []
        for w in self.words:
            note = "" if w.reported else ", competes only"
            image_text = "-" if w.image_text is None else f"{w.image_text:.4f}"
            numbers = [f"{w.detector:.4f}", image_text, f"{w.weight:.2f}", f"{w.fused:.4f}", f"{w.score:.4f}"]
            body.append([f"{w.word} ({'base' if w.is_base else 'novel'}{note})", *numbers])
        head = ["word", "detector z", "image-text p", "weight w", "fused", "raw score"]
        box = ", ".join(f"{value:.1f}" for value in self.box)
        return (
            f"{text_table(head, body)}\n"
            "raw score: before any calibration, as predict(picture, calibrated=False) gives it\n"
            f"box: {box}\n"
            f"background: detector {self.background:.4f}, fused {self.background_fused:.4f}\n"
            f"objectness: {self.objectness:.4f} (proposal with overlap {self.overlap:.2f}), exponent {self.delta:g}\n"
        )

    __str__ = table


@torch.no_grad()
def explain_box(
    model: OpenVocabularyRCNN, inputs: dict, words: Sequence[str], box: Sequence[float], top: int = 10
) -> Explanation:
    """Score one box as if it were a proposal.

    Args:
        model: in evaluation mode, with a vocabulary.
        inputs: {"image": (3, H, W), "height", "width"} as for `OpenVocabularyRCNN.inference`.
        words: name of every class, competitors last.
        box: x1 y1 x2 y2 in pixels of the original picture.
        top: words to list.

    Raises:
        ValueError: no box of four finite numbers, or one without area inside the picture.
    """
    given = torch.as_tensor(box, dtype=torch.float32).reshape(-1)
    size = (inputs["height"], inputs["width"])
    inside = Boxes(given[None].clone()) if given.shape == (4,) and torch.isfinite(given).all() else None
    if inside is not None:
        inside.clip(size)
    if inside is None or not bool(inside.nonempty()):
        raise ValueError(
            f"box {given.tolist()} has no area inside the picture of {size[1]} x {size[0]} pixels; "
            "give x1, y1, x2, y2 in pixels with x1 < x2 and y1 < y2"
        )
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor, images.image_sizes)
    found, _ = model.proposal_generator(images, features, None)
    scale = _scale(images.image_sizes[0], size).to(model.device)
    region = Boxes(inside.tensor.to(model.device) * scale)
    proposal = Instances(images.image_sizes[0])
    proposal.proposal_boxes = region
    overlap = torch.zeros(1)
    proposal.objectness_logits = torch.full((1,), -torch.inf, device=model.device)  # objectness 0: nothing near
    if len(found[0]):
        overlap, nearest = pairwise_iou(region, found[0].proposal_boxes).max(dim=1)
        if overlap > 0:
            proposal.objectness_logits = found[0].objectness_logits[nearest]
    part = model.roi_heads.score_regions(images, features, [proposal])[0]
    return _explain(model, part, 0, words, tuple(inside.tensor[0].tolist()), float(overlap), top)


def explain_detection(
    model: OpenVocabularyRCNN, inputs: dict, words: Sequence[str], index: int, top: int = 10
) -> Explanation:
    """Explain the detection number `index`, counted from 0, best first; arguments as in `explain_box`.

    Raises:
        ValueError: there are not so many detections.
    """
    if index < 0:
        raise ValueError(f"detection {index} was asked for, but they are counted from 0; give its place")
    output = model.inference([inputs], return_parts=True, max_detections=index + 1)[0]
    instances, part = output["instances"], output["parts"]
    if index >= len(instances):
        raise ValueError(f"detection {index} was asked for, but the picture has {len(instances)}; give a smaller one")
    box, label = instances.pred_boxes.tensor[index], int(instances.pred_classes[index])
    heads = model.roi_heads
    scores = part.fused(heads.is_base, heads.alpha, heads.beta, heads.objectness_delta)[:, 1 + label]
    refined = Boxes(part.boxes.clone())
    refined.clip(part.image_size)
    scale = _scale(part.image_size, (inputs["height"], inputs["width"])).to(box.device)
    # A detection does not carry its region: it is the one with the same box and score.
    distance = (refined.tensor / scale - box).abs().sum(dim=1) + 1e3 * (scores - instances.scores[index]).abs()
    return _explain(model, part, int(distance.argmin()), words, tuple(box.tolist()), 1.0, top)


def _scale(input_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(4,) factors from pixels of the picture to pixels of the network's input; sizes are (height, width)."""
    x, y = input_size[1] / size[1], input_size[0] / size[0]
    return torch.tensor([x, y, x, y])


def _explain(
    model: OpenVocabularyRCNN,
    part: RegionScores,
    region: int,
    words: Sequence[str],
    box: tuple[float, float, float, float],
    overlap: float,
    top: int,
) -> Explanation:
    heads = model.roi_heads
    fused = part.fused(heads.is_base, heads.alpha, heads.beta, 0.0)[region]
    final = part.fused(heads.is_base, heads.alpha, heads.beta, heads.objectness_delta)[region]
    listed = []
    for i in fused[1:].topk(min(top, len(words))).indices.tolist():
        is_base, p = bool(heads.is_base[i]), part.image_text
        listed.append(
            WordScore(
                word=words[i],
                detector=float(part.detector[region, 1 + i]),
                image_text=None if p is None else float(p[region, 1 + i]),
                weight=0.0 if p is None else (heads.alpha if is_base else heads.beta),
                fused=float(fused[1 + i]),
                score=float(final[1 + i]),
                is_base=is_base,
                reported=i < heads.num_reported,
            )
        )
    return Explanation(
        box=box,
        words=listed,
        background=float(part.detector[region, 0]),
        background_fused=float(fused[0]),
        objectness=float(part.objectness[region]),
        overlap=overlap,
        delta=heads.objectness_delta,
    )
