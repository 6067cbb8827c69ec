"""Region heads of the open-vocabulary detector: train on base classes, fuse with image-text scores at inference.

Source: F-VLM (figure 2): the region proposals, not the refined boxes, are scored by the image-text model. ViLD
(sections 3.3 and 3.4): distillation on proposals whether labelled or not, and the ensemble of two heads.
This file does not rescale boxes or masks to the original picture: Detectron2's postprocessing does.
"""

from dataclasses import dataclass

import torch
from detectron2.modeling.roi_heads.roi_heads import StandardROIHeads
from detectron2.structures import ImageList, Instances
from torch import Tensor

from ovd.losses.distillation import RegionTeacher, distillation_loss
from ovd.modeling.box_head import DistilledHead
from ovd.modeling.score_fusion import apply_objectness, background_first, fuse_scores
from ovd.modeling.selection import select_best
from ovd.modeling.temperature import temper
from ovd.modeling.vlm_head import RegionTextHead

# Weight of the distilled head in ViLD's ensemble, for base and for novel classes (section 3.4).
ENSEMBLE_ALPHA, ENSEMBLE_BETA = 1 / 3, 2 / 3


@dataclass
class Distillation:
    """How regions are distilled in training.

    Attributes:
        teacher: embeds the crops of regions.
        weight: factor on the loss (ViLD: 0.5 to 2).
        regions: proposals, or given regions, distilled in a picture, drawn at random, at most.
    """

    teacher: RegionTeacher
    weight: float
    regions: int

    def __post_init__(self) -> None:
        if self.weight < 0 or self.regions < 1:
            raise ValueError(
                f"distillation_weight is {self.weight} and distillation_regions {self.regions}, but a weight is at "
                "least 0 and regions are at least 1; set distillation to 'off' to go without"
            )


@dataclass
class RegionScores:
    """Everything the final scores of one picture are made of, so that they can be made again with other weights.

    Attributes:
        proposals: (R, 4) proposal boxes, xyxy pixels of the network's input.
        boxes: (R, 4) refined boxes, xyxy pixels of the network's input.
        detector: (R, 1 + C) detector probabilities z, background in column 0; with a second, distilled head both heads'
            ensemble.
        image_text: (R, 1 + C) image-text probabilities p, or None without image-text scores; column 0 is what the
            background of its softmax took, zero where that has none.
        objectness: (R,) objectness of the proposals in 0..1.
        image_size: (height, width) of the network's input without padding.
        independent: z are probabilities of their own (sigmoid), which fusion does not renormalise; their background is
            0. p stays a softmax over the vocabulary (and its background): a contrastive model is not calibrated to say
            yes or no.
    """

    proposals: Tensor
    boxes: Tensor
    detector: Tensor
    image_text: Tensor | None
    objectness: Tensor
    image_size: tuple[int, int]
    independent: bool = False

    def fused(self, is_base: Tensor, alpha: float, beta: float, delta: float) -> Tensor:
        """Final scores (R, 1 + C): `fuse_scores`, then `apply_objectness`; z alone without image-text scores."""
        scores = self.detector
        if self.image_text is not None:
            scores = fuse_scores(self.detector, self.image_text, is_base, alpha, beta, not self.independent)
        return apply_objectness(scores, self.objectness, delta)


class OpenVocabularyROIHeads(StandardROIHeads):
    """Detectron2's region heads whose classes are a matrix of text embeddings.

    Contract as `StandardROIHeads`; besides, `set_text_embeddings` must have been called, and `score_regions` and
    `select_detections` split inference in two so that scores can be kept and fused again.

    Args:
        image_text_head: scores proposals with the image-text model; None leaves the detector alone.
        alpha, beta: fusion weights of base and novel classes.
        objectness_delta: exponent of the objectness factor, 0 for none.
        detector_temperature: of the detector's probabilities at inference, those of the ensemble where there are two
            heads; 1 leaves them.
        max_candidates: best (region, class) pairs kept for NMS in a picture, which bounds its cost in the vocabulary.
        distillation: adds "loss_distill" in training; None adds nothing.
        distilled_head: learns the distillation in the place of the text-classified head, and is fused with it.
        kwargs: as for `StandardROIHeads`.
    """

    def __init__(
        self,
        *,
        image_text_head: RegionTextHead | None,
        alpha: float = 0.35,
        beta: float = 0.65,
        objectness_delta: float = 0.0,
        detector_temperature: float = 1.0,
        max_candidates: int = 20_000,
        distillation: Distillation | None = None,
        distilled_head: DistilledHead | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.image_text_head = image_text_head
        self.alpha, self.beta, self.objectness_delta = alpha, beta, objectness_delta
        self.detector_temperature = detector_temperature
        self.max_candidates = max_candidates
        self.distillation, self.distilled_head = distillation, distilled_head
        self.num_reported = 0
        self.register_buffer("is_base", torch.zeros(0, dtype=torch.bool), persistent=False)

    def set_text_embeddings(
        self,
        embeddings: Tensor,
        is_base: Tensor | None = None,
        num_reported: int | None = None,
        background_embedding: Tensor | None = None,
        vlm_background: Tensor | None = None,
    ) -> None:
        """Change the vocabulary.

        Args:
            embeddings: (C, D) text embeddings in the joint space.
            is_base: (C,) bool, True for classes trained on; None means all are (as in training).
            num_reported: only the first so many classes are detected; the others just compete for the scores. None
                reports all.
            background_embedding: (D,) see `TextClassifier.set_text_embeddings`.
            vlm_background: (D,) for the image-text score; see `RegionTextHead.set_text_embeddings`.
        """
        if is_base is None:
            is_base = torch.ones(len(embeddings), dtype=torch.bool)
        if is_base.shape != (len(embeddings),):
            raise ValueError(
                f"is_base has shape {tuple(is_base.shape)} for {len(embeddings)} classes; give one entry for each class"
            )
        self.box_predictor.set_text_embeddings(embeddings, background_embedding)
        if self.image_text_head is not None:
            self.image_text_head.set_text_embeddings(embeddings, vlm_background)
        if self.distilled_head is not None:
            self.distilled_head.set_text_embeddings(embeddings)
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
        regions: list[Instances] | None = None,
        verified_classes: list[Tensor] | None = None,
    ):
        """(sampled proposals, losses) in training, (detections, {}) at inference, as in Detectron2.

        Args:
            images, features, proposals, targets: as in Detectron2.
            regions: `proposal_boxes` and `teacher_embeddings` to distil instead of the proposals; None computes them.
            verified_classes: for each picture the classes whose presence and absence is known, for the "verified"
                federated loss.
        """
        if self.box_predictor.cls_score.num_classes == 0:
            raise ValueError("the detector has no vocabulary yet; call set_text_embeddings before running it")
        if not self.training:
            instances = self.select_detections(self.score_regions(images, features, proposals))
            return self.forward_with_given_boxes(features, instances), {}
        # Before sampling, which would favour what is labelled.
        losses = self._distillation_losses(images, features, proposals, regions)
        proposals = self.label_and_sample_proposals(proposals, targets)
        if verified_classes is not None:
            for sampled, classes in zip(proposals, verified_classes, strict=True):
                mask = torch.zeros(self.num_classes, dtype=torch.bool, device=sampled.gt_classes.device)
                mask[classes.to(mask.device)] = True
                sampled.verified_classes = mask.expand(len(sampled), -1)
        losses.update(self._forward_box(features, proposals))
        losses.update(self._forward_mask(features, proposals))
        return proposals, losses

    def _distillation_losses(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        regions: list[Instances] | None,
    ) -> dict[str, Tensor]:
        if self.distillation is None:
            return {}
        device, limit = images.tensor.device, self.distillation.regions
        drawn = [p[torch.randperm(len(p), device=device)[:limit]] for p in (proposals if regions is None else regions)]
        boxes = [d.proposal_boxes for d in drawn]
        if regions is None:
            target = self.distillation.teacher(images.tensor, [b.tensor for b in boxes])
        else:
            target = torch.cat([d.teacher_embeddings for d in drawn])
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        if self.distilled_head is None:
            student = self.box_predictor.cls_score.embed(self.box_head(pooled))
        else:
            student = self.distilled_head(pooled)
        return {"loss_distill": self.distillation.weight * distillation_loss(student, target)}

    def score_regions(
        self, images: ImageList, features: dict[str, Tensor], proposals: list[Instances]
    ) -> list[RegionScores]:
        """Compute detector and image-text probabilities, refined boxes and objectness of all proposals."""
        boxes = [p.proposal_boxes for p in proposals]
        counts = [len(b) for b in boxes]
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        refined = self.box_predictor.predict_boxes((logits, deltas), proposals)
        classifier = self.box_predictor.cls_score
        independent = classifier.classification == "sigmoid"
        z = background_first(classifier.probabilities(logits))
        if self.distilled_head is not None:
            distilled = self.distilled_head.probabilities(pooled)
            z = fuse_scores(z, distilled, self.is_base, ENSEMBLE_ALPHA, ENSEMBLE_BETA, not independent)
        z = temper(z, self.detector_temperature, independent).split(counts)
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
                independent=independent,
            )
            for i in range(len(counts))
        ]

    def select_detections(self, regions: list[RegionScores]) -> list[Instances]:
        """Fuse the scores, then per-class NMS and the best detections of each picture."""
        predictor = self.box_predictor
        return [
            select_best(
                r.boxes,
                # Column 0 is the background; classes behind `num_reported` compete silently.
                r.fused(self.is_base, self.alpha, self.beta, self.objectness_delta)[:, 1 : 1 + self.num_reported],
                r.image_size,
                predictor.test_score_thresh,
                predictor.test_nms_thresh,
                predictor.test_topk_per_image,
                self.max_candidates,
            )
            for r in regions
        ]
