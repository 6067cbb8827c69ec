"""Region heads of the open-vocabulary detector: train on base classes, fuse with image-text scores at inference.

Source: F-VLM (figure 2): the region proposals, not the refined boxes, are scored by the image-text model.
This file does not rescale boxes or masks to the original picture: Detectron2's postprocessing does.
"""

from dataclasses import dataclass

import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.roi_heads import StandardROIHeads
from detectron2.structures import ImageList, Instances
from torch import Tensor

from ovd.modeling.score_fusion import apply_objectness, background_first, background_last, fuse_scores
from ovd.modeling.vlm_head import ImageTextHead


@dataclass
class RegionScores:
    """Everything the final scores of one picture are made of, so that they can be made again with other weights.

    Attributes:
        proposals: (R, 4) proposal boxes, xyxy pixels of the network's input.
        boxes: (R, 4) refined boxes, xyxy pixels of the network's input.
        detector: (R, 1 + C) detector probabilities z, background in column 0.
        image_text: (R, 1 + C) image-text probabilities p with a zero column 0, or None without image-text scores.
        objectness: (R,) objectness of the proposals in 0..1.
        image_size: (height, width) of the network's input without padding.
    """

    proposals: Tensor
    boxes: Tensor
    detector: Tensor
    image_text: Tensor | None
    objectness: Tensor
    image_size: tuple[int, int]

    def fused(self, is_base: Tensor, alpha: float, beta: float, delta: float) -> Tensor:
        """Final scores (R, 1 + C): `fuse_scores`, then `apply_objectness`; z alone without image-text scores."""
        scores = self.detector
        if self.image_text is not None:
            scores = fuse_scores(self.detector, self.image_text, is_base, alpha, beta)
        return apply_objectness(scores, self.objectness, delta)


class OpenVocabularyROIHeads(StandardROIHeads):
    """Detectron2's region heads whose classes are a matrix of text embeddings.

    Contract as `StandardROIHeads`; besides, `set_text_embeddings` must have been called, and `score_regions` and
    `select_detections` split inference in two so that scores can be kept and fused again.

    Args:
        image_text_head: scores proposals with the image-text model; None leaves the detector alone.
        alpha, beta: fusion weights of base and novel classes.
        objectness_delta: exponent of the objectness factor, 0 for none.
        max_candidates: best (region, class) pairs kept for NMS in a picture, which bounds its cost in the vocabulary.
        kwargs: as for `StandardROIHeads`.
    """

    def __init__(
        self,
        *,
        image_text_head: ImageTextHead | None,
        alpha: float = 0.35,
        beta: float = 0.65,
        objectness_delta: float = 0.0,
        max_candidates: int = 20_000,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.image_text_head = image_text_head
        self.alpha, self.beta, self.objectness_delta = alpha, beta, objectness_delta
        self.max_candidates = max_candidates
        self.num_reported = 0
        self.register_buffer("is_base", torch.zeros(0, dtype=torch.bool), persistent=False)

    def set_text_embeddings(
        self, embeddings: Tensor, is_base: Tensor | None = None, num_reported: int | None = None
    ) -> None:
        """Change the vocabulary.

        Args:
            embeddings: (C, D) text embeddings in the joint space.
            is_base: (C,) bool, True for classes trained on; None means all are (as in training).
            num_reported: only the first so many classes are detected; the others just compete for the scores. None
                reports all.
        """
        if is_base is None:
            is_base = torch.ones(len(embeddings), dtype=torch.bool)
        if is_base.shape != (len(embeddings),):
            raise ValueError(
                f"is_base has shape {tuple(is_base.shape)} for {len(embeddings)} classes; give one entry for each class"
            )
        self.box_predictor.set_text_embeddings(embeddings)
        if self.image_text_head is not None:
            self.image_text_head.set_text_embeddings(embeddings)
        self.is_base = is_base.bool().to(self.is_base.device)
        self.num_reported = len(embeddings) if num_reported is None else num_reported
        # Detectron2 marks background regions with this number.
        self.num_classes = self.box_predictor.num_classes

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ):
        """(sampled proposals, losses) in training, (detections, {}) at inference, as in Detectron2."""
        if self.box_predictor.cls_score.num_classes == 0:
            raise ValueError("the detector has no vocabulary yet; call set_text_embeddings before running it")
        if self.training:
            return super().forward(images, features, proposals, targets)
        instances = self.select_detections(self.score_regions(images, features, proposals))
        return self.forward_with_given_boxes(features, instances), {}

    def score_regions(
        self, images: ImageList, features: dict[str, Tensor], proposals: list[Instances]
    ) -> list[RegionScores]:
        """Compute detector and image-text probabilities, refined boxes and objectness of all proposals."""
        boxes = [p.proposal_boxes for p in proposals]
        counts = [len(b) for b in boxes]
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        refined = self.box_predictor.predict_boxes((logits, deltas), proposals)
        z = background_first(logits.softmax(dim=-1)).split(counts)
        p = [None] * len(counts)
        if self.image_text_head is not None:
            feature_map = self.image_text_head.feature_map(features, images.tensor, images.image_sizes)
            p = self.image_text_head.probabilities(feature_map, [b.tensor for b in boxes]).split(counts)
        return [
            RegionScores(
                proposals=boxes[i].tensor,
                boxes=refined[i],
                detector=z[i],
                image_text=p[i],
                objectness=proposals[i].objectness_logits.float().sigmoid(),
                image_size=proposals[i].image_size,
            )
            for i in range(len(counts))
        ]

    def select_detections(self, regions: list[RegionScores]) -> list[Instances]:
        """Fuse the scores, then per-class NMS and the best detections of each picture."""
        scores = [r.fused(self.is_base, self.alpha, self.beta, self.objectness_delta) for r in regions]
        silent = (
            torch.arange(len(self.is_base) + 1, device=self.is_base.device) > self.num_reported
        )  # column 0 is background
        scores = [s.masked_fill(silent, 0.0) for s in scores]
        predictor = self.box_predictor
        instances, _ = fast_rcnn_inference(
            [r.boxes for r in regions],
            [background_last(self._keep_candidates(s)) for s in scores],
            [r.image_size for r in regions],
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return instances

    def _keep_candidates(self, scores: Tensor) -> Tensor:
        """Set all class scores below the best `max_candidates` to 0; NMS never sees scores of 0."""
        classes = scores[:, 1:]
        if classes.numel() <= self.max_candidates:
            return scores
        lowest = classes.flatten().topk(self.max_candidates, sorted=False).values.min()
        return torch.cat([scores[:, :1], classes.where(classes >= lowest, 0.0)], dim=1)
