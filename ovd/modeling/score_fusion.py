"""Geometric fusion of the detector's class scores with the image-text model's, as in F-VLM (section 3) and RO-ViT.

Public convention of this file: probabilities of shape (N, 1 + C) with the BACKGROUND IN COLUMN 0. Detectron2 keeps the
background in the last column; `background_first` and `background_last` are the only places that convert.
This file does not compute either score: see `text_classifier.py` and `vlm_head.py`.
"""

import torch
from torch import Tensor

_VALUES_AT_ONCE = 4_000_000  # 16 MB in float32


def background_first(scores: Tensor) -> Tensor:
    """Move Detectron2's last (background) column to the front: (N, C + 1) -> (N, 1 + C)."""
    return torch.cat([scores[:, -1:], scores[:, :-1]], dim=1)


def background_last(scores: Tensor) -> Tensor:
    """Move the first (background) column to the end, as Detectron2 wants it: (N, 1 + C) -> (N, C + 1)."""
    return torch.cat([scores[:, 1:], scores[:, :1]], dim=1)


def fuse_scores(
    detector: Tensor,
    image_text: Tensor,
    is_base: Tensor,
    alpha: float = 0.35,
    beta: float = 0.65,
    renormalise: bool = True,
) -> Tensor:
    """Fuse detector and image-text probabilities: z^(1-w) * p^w for each class, then renormalise (F-VLM, equation 4).

    Args:
        detector: (N, 1 + C) probabilities z of the detector, background in column 0.
        image_text: (N, 1 + C) probabilities p of the image-text model; column 0 is not used.
        is_base: (C,) bool, True for the classes trained on. They get w = alpha, the others w = beta.
        alpha: weight of the image-text score for base classes, in 0..1. 0 leaves the detector's score.
        beta: weight of the image-text score for novel classes, in 0..1.
        renormalise: False where the detector's probabilities are independent (sigmoid): rows then need not sum to 1,
            and a class's fused score comes from its own z and p alone.

    Returns:
        (N, 1 + C) float32 probabilities whose rows sum to 1. Before renormalising the background is the detector's.

    Raises:
        ValueError: shapes disagree, a weight is outside 0..1, or a score is negative (logits were given).
    """
    if detector.dim() != 2 or detector.shape != image_text.shape:
        raise ValueError(
            f"detector scores {tuple(detector.shape)} and image-text scores {tuple(image_text.shape)} must be the same "
            "(N, 1 + C); add a background column 0 to both"
        )
    if is_base.shape != (detector.shape[1] - 1,):
        raise ValueError(
            f"is_base has shape {tuple(is_base.shape)} but the scores have {detector.shape[1] - 1} classes besides the "
            "background; give one entry for each class"
        )
    for name, weight in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"{name} is {weight}, but a fusion weight lies in 0..1; choose one there")
    if detector.numel() and (detector.min() < 0 or image_text.min() < 0):
        raise ValueError(
            "a score is below 0, but fuse_scores wants probabilities; take the softmax of the logits first"
        )
    weight = torch.full((detector.shape[1],), float(beta), device=detector.device)
    weight[1:][is_base.to(detector.device)] = float(alpha)
    weight[0] = 0.0  # the background is the detector's
    scores = torch.empty(detector.shape, device=detector.device)
    # In parts, so that beside the result nothing grows with the vocabulary: 1,000 regions x 20,000 words are 80 MB.
    rows = max(1, _VALUES_AT_ONCE // detector.shape[1])
    for start in range(0, len(detector), rows):
        part = slice(start, start + rows)
        fused = detector[part].float() ** (1 - weight) * image_text[part].float() ** weight
        if renormalise:
            # A row of zeros can only come from underflow; the clamp turns it into zeros instead of NaN.
            fused = fused / fused.sum(dim=1, keepdim=True).clamp_min(torch.finfo(fused.dtype).tiny)
        scores[part] = fused
    return scores


def apply_objectness(scores: Tensor, objectness: Tensor, delta: float) -> Tensor:
    """Multiply every score of a region by objectness^delta (DITO's objectness weight).

    Args:
        scores: (N, 1 + C) scores.
        objectness: (N,) objectness in 0..1 (after the sigmoid).
        delta: exponent >= 0; 0 leaves the scores as they are, DITO uses 3 with its centerness.

    Returns:
        (N, 1 + C) scores, no longer summing to 1 when delta > 0.
    """
    if objectness.shape != scores.shape[:1]:
        raise ValueError(
            f"objectness has shape {tuple(objectness.shape)} for {scores.shape[0]} regions; give one value a region"
        )
    if delta < 0:
        raise ValueError(f"delta is {delta}, but the objectness exponent is at least 0; use 0 to switch it off")
    if delta == 0:
        return scores
    return scores * objectness.float().clamp(0, 1)[:, None] ** delta
