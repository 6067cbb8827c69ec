"""A trained detector as one function of tensors: pixels and text embeddings in, detections out.

Source: `ovd.modeling.rcnn` and `ovd.modeling.roi_heads`, whose trained modules are run as they are. Not here: resizing
the picture, embedding words, pasting masks; these are the consumer's (`examples/onnx_detect.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovd.detector import OpenVocabularyDetector
from ovd.export.backbone import TensorPyramid, TensorViT
from ovd.export.selection import NOTHING, TensorProposals, apart_by_class, clip, pool_regions, suppress, top
from ovd.modeling.backbone import FEATURE
from ovd.modeling.rcnn import OpenVocabularyRCNN
from ovd.modeling.roi_heads import ENSEMBLE_ALPHA, ENSEMBLE_BETA
from ovd.modeling.score_fusion import apply_objectness, background_first
from ovd.modeling.temperature import temper

# Candidates for the last NMS, per detection wanted and at least.
_CANDIDATES, _AT_LEAST = 4, 1000


class TensorDetector(nn.Module):
    """Detect in one picture, with the vocabulary as an input.

    Contract: image (1, 3, H, W) uint8 RGB, text_embeddings (C, D) rows of length 1, is_base (C,) bool, num_reported
    (1,) int64, vlm_background (D,) of length 1, or zeros for none -> boxes (N, 4) xyxy pixels of the image, scores
    (N,), labels (N,) int64, and with a mask head masks (N, M, M) in 0..1, best first. Each mask covers its box. H and W
    are at most `image_size`; classes from `num_reported` on compete for the scores and are not reported. At most
    `limit` detections.

    Args:
        model: the trained network; its modules are shared.
    """

    def __init__(self, model: OpenVocabularyRCNN) -> None:
        super().__init__()
        heads = model.roi_heads
        self.backbone, self.proposals = TensorPyramid(model.backbone), TensorProposals(model.proposal_generator)
        self.heads = heads
        head = heads.image_text_head
        tower = getattr(head, "tower", None)
        self.divisor = model.backbone.size_divisibility
        self.tower = None if tower is None else TensorViT(tower, self.divisor)
        # What a frozen copy or crops look at; a map that the detector has anyway is not computed again.
        self.reads_pixels = head is not None and not hasattr(head, "output_size")
        self.register_buffer("mean", model.pixel_mean.detach().reshape(1, 3, 1, 1).clone())
        self.register_buffer("std", model.pixel_std.detach().reshape(1, 3, 1, 1).clone())
        predictor = heads.box_predictor
        limit, most = predictor.test_topk_per_image, heads.max_candidates
        self.limit = most if limit < 0 else limit
        self.candidates = min(most, max(_CANDIDATES * self.limit, _AT_LEAST))
        self.extent = float(model.architecture.image_size + 1)

    def forward(
        self, image: Tensor, text_embeddings: Tensor, is_base: Tensor, num_reported: Tensor, vlm_background: Tensor
    ) -> tuple[Tensor, ...]:
        """See the class."""
        height, width = image.shape[-2:]
        images = (image.float() - self.mean) / self.std
        down, across = ((side + self.divisor - 1) // self.divisor * self.divisor for side in (height, width))
        images = F.pad(images, (0, across - width, 0, down - height))
        features = self.backbone(images, height, width)
        proposals, logits = self.proposals(features, height, width)
        words = (text_embeddings, is_base, vlm_background)
        scores, refined = self._score(images, features, proposals, logits, words, height, width)
        reported = torch.arange(text_embeddings.shape[0], device=image.device) < num_reported
        scores = torch.where(reported[None] & (logits > NOTHING)[:, None], scores, NOTHING)
        boxes, scores, labels = self._select(clip(refined, height, width), scores)
        threshold = self.heads.box_predictor.test_score_thresh
        # Empty boxes are dropped last, as Detectron2's postprocessing does.
        found = (scores > max(threshold, NOTHING)) & ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
        results = [boxes, scores, labels]
        if self.heads.mask_on:
            pooled = pool_regions(
                self.heads.mask_pooler, [features[name] for name in self.heads.mask_in_features], boxes
            )
            results.append(self.heads.mask_head.layers(pooled)[:, 0].sigmoid())
        index = found.nonzero()[:, 0]
        return tuple(result[index] for result in results)

    def _score(
        self,
        images: Tensor,
        features: dict[str, Tensor],
        boxes: Tensor,
        logits: Tensor,
        words: tuple[Tensor, Tensor, Tensor],
        height: int,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """(K, C) final scores of the proposals and (K, 4) refined boxes; `words` as the last inputs of `forward`."""
        (text, is_base, background), heads, predictor = words, self.heads, self.heads.box_predictor
        pooled = pool_regions(heads.box_pooler, [features[name] for name in heads.box_in_features], boxes)
        region = heads.box_head(pooled)
        refined = predictor.box2box_transform.apply_deltas(predictor.bbox_pred(region), boxes)
        independent = predictor.cls_score.classification == "sigmoid"
        z = self._class_probabilities(region, text)
        if heads.distilled_head is not None:
            second = heads.distilled_head
            p = (second.scale * second(pooled) @ text.T).softmax(dim=-1)
            z = fuse(z, p, is_base, ENSEMBLE_ALPHA, ENSEMBLE_BETA, not independent)
        z = temper(z, heads.detector_temperature, independent)
        head = heads.image_text_head
        if head is not None:
            feature_map = images if self.reads_pixels else features[FEATURE]
            if self.tower is not None:
                feature_map = self.tower(images, height, width)
            seen = head.scale * head.embed_regions(feature_map, [boxes])
            # Without a background, its logit of -inf leaves the softmax to the words.
            absent = torch.where((background == 0).all(), -torch.inf, 0.0)
            rest = seen @ background[:, None] + absent
            p = torch.cat([rest, seen @ text.T], dim=1).softmax(dim=-1)[:, 1:]
            z = fuse(z, p, is_base, heads.alpha, heads.beta, not independent)
        return apply_objectness(z, logits.sigmoid(), heads.objectness_delta)[:, 1:], refined

    def _class_probabilities(self, region: Tensor, text: Tensor) -> Tensor:
        """(K, 1 + C) probabilities of `TextClassifier` with these words, the background in column 0."""
        classifier = self.heads.box_predictor.cls_score
        region = classifier.scale() * classifier.embed(region)
        if classifier.classification == "sigmoid":
            # No background: its probability is 0.
            return F.pad((region @ text.T + classifier.bias).sigmoid(), (1, 0))
        background = F.normalize(classifier.background_embedding.float(), dim=-1)
        return background_first((region @ torch.cat([text, background[None]]).T).softmax(dim=-1))

    def _select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best (limit,) after NMS within each class: boxes, scores (`NOTHING` where there are fewer), labels."""
        num_classes = scores.shape[1]
        best, place = top(scores.flatten(), self.candidates)
        region = place // num_classes
        label = place - region * num_classes  # the ONNX exporter knows no remainder by a size
        found = boxes[region]
        apart = apart_by_class(found, label, self.extent)
        # Greedy NMS only looks at better candidates, so the best few give exactly the first detections.
        best = suppress(apart, best, self.heads.box_predictor.test_nms_thresh)
        best, index = top(best, self.limit)
        return found[index], best, label[index]


def fuse(z: Tensor, p: Tensor, is_base: Tensor, alpha: float, beta: float, renormalise: bool) -> Tensor:
    """`ovd.modeling.score_fusion.fuse_scores` without its checks and its loop.

    Args:
        z: (K, 1 + C) probabilities, the background in column 0.
        p: (K, C) probabilities, without background.
        is_base: (C,) bool.
        alpha, beta: weights of p for base and novel classes.
        renormalise: make rows sum to 1.
    """
    weight = torch.where(is_base, alpha, beta)
    fused = torch.cat([z[:, :1], z[:, 1:] ** (1 - weight) * p**weight], dim=1)
    if renormalise:
        fused = fused / fused.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return fused


class BakedDetector(nn.Module):
    """A `TensorDetector` with its vocabulary inside: image (1, 3, H, W) uint8 RGB -> boxes, scores, labels, masks."""

    def __init__(self, detector: TensorDetector, vocabulary: dict[str, Tensor]) -> None:
        super().__init__()
        self.detector = detector
        for name, value in vocabulary.items():
            self.register_buffer(name, value)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """See `TensorDetector`."""
        return self.detector(image, self.text_embeddings, self.is_base, self.num_reported, self.vlm_background)


def vocabulary_tensors(detector: OpenVocabularyDetector) -> dict[str, Tensor]:
    """The inputs besides the picture that stand for the detector's present vocabulary: "text_embeddings" (C, D),
    "is_base" (C,), "num_reported" (1,), "vlm_background" (D,), zeros where there is none; behind the words come those
    that only compete."""
    heads = detector.model.roi_heads
    background = torch.zeros(heads.box_predictor.cls_score.embed_dim)
    if heads.image_text_head is not None and len(heads.image_text_head.background):
        background = heads.image_text_head.background[0].detach().cpu().clone()
    return {
        "text_embeddings": heads.box_predictor.cls_score.text_embeddings.detach().cpu().clone(),
        "is_base": heads.is_base.detach().cpu().clone(),
        "num_reported": torch.tensor([heads.num_reported]),
        "vlm_background": background,
    }
