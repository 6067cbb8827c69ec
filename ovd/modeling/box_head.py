"""Region heads that know no classes: box features, box regression shared by all classes, one mask channel.

Source: F-VLM and ViLD (class-agnostic boxes and masks, the ensemble's second head). The class scores come from
`TextClassifier`; nothing here is sized by the vocabulary, so it may change after training.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, _log_classification_stats
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from torch import Tensor, nn

from ovd.losses.detection import independent_classification_loss, region_classification_loss
from ovd.modeling.text_classifier import TextClassifier, check_text_embeddings

FEDERATED_LOSSES = ("off", "sampled", "verified")


class TextBoxPredictor(FastRCNNOutputLayers):
    """Detectron2's box predictor with a text classifier and class-agnostic boxes.

    Contract: features (R, input_dim) -> (logits (R, C + 1) with the background last, deltas (R, 4)).

    Args:
        input_dim: width of the box feature.
        classifier: the text classifier, which holds the vocabulary.
        background_weight: weight of background regions in the classification loss.
        test_score_thresh, test_nms_thresh, test_topk_per_image: Detectron2's inference settings.
        federated_loss: for "sigmoid" classification, which classes' "no" counts. "off": all. "sampled": the classes in
            the batch and others drawn by the root of their frequency (Detectron2's rule; it does not read which
            absences were verified). "verified": in each picture only the classes that its annotators have checked,
            from the proposals' field `verified_classes`.
        federated_classes: "sampled": how many classes count, at least.
        smooth_l1_beta: of the box regression's loss: below it the loss is quadratic, 0 is plain L1, 1 Huber's.
    """

    def __init__(
        self,
        input_dim: int,
        classifier: TextClassifier,
        background_weight: float = 0.9,
        test_score_thresh: float = 0.0,
        test_nms_thresh: float = 0.5,
        test_topk_per_image: int = 300,
        federated_loss: str = "off",
        federated_classes: int = 50,
        smooth_l1_beta: float = 0.0,
    ) -> None:
        if federated_loss not in FEDERATED_LOSSES:
            raise ValueError(f"federated_loss is {federated_loss!r}; choose one of {', '.join(FEDERATED_LOSSES)}")
        if federated_loss != "off" and classifier.classification != "sigmoid":
            raise ValueError(
                f"federated_loss {federated_loss!r} leaves classes out, which a softmax cannot; set classification to "
                "'sigmoid', or federated_loss to 'off'"
            )
        super().__init__(
            ShapeSpec(channels=input_dim),
            box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            num_classes=1,  # only sizes the linear classifier that is replaced below
            cls_agnostic_bbox_reg=True,
            test_score_thresh=test_score_thresh,
            test_nms_thresh=test_nms_thresh,
            test_topk_per_image=test_topk_per_image,
            smooth_l1_beta=smooth_l1_beta,
        )
        self.cls_score = classifier
        self.background_weight = background_weight
        self.federated_loss, self.federated_classes = federated_loss, federated_classes
        # Not persistent: it belongs to the training vocabulary.
        self.register_buffer("class_weights", torch.zeros(0), persistent=False)

    def set_text_embeddings(self, embeddings: Tensor, background_embedding: Tensor | None = None) -> None:
        """Make the rows of a (C, D) matrix the classes; see `TextClassifier.set_text_embeddings`."""
        self.cls_score.set_text_embeddings(embeddings, background_embedding)
        self.num_classes = self.cls_score.num_classes
        self.class_weights = torch.ones(self.num_classes, device=self.cls_score.text_embeddings.device)

    def set_class_counts(self, image_counts: Sequence[int]) -> None:
        """Give the number of training pictures of each class, for "sampled"; without it all are drawn alike."""
        if len(image_counts) != self.num_classes:
            raise ValueError(f"{len(image_counts)} counts for {self.num_classes} classes; give one for each class")
        # The exponent is Detectron2's default; the floor lets a class without pictures be drawn too.
        self.class_weights = torch.tensor(image_counts, device=self.class_weights.device).float().clamp(min=1).sqrt()

    def counted_classes(self, gt_classes: Tensor, proposals: list[Instances]) -> Tensor | None:
        """(C,) or (R, C) bool, the classes whose "no" counts in the loss; None for all."""
        if self.federated_loss == "off" or len(gt_classes) == 0:
            return None
        if self.federated_loss == "verified":
            if not all(p.has("verified_classes") for p in proposals):
                raise ValueError(
                    "federated_loss 'verified' needs the classes checked in each picture, but an input has no "
                    "'verified_classes'; give them in the data, or use 'sampled'"
                )
            return cat([p.verified_classes for p in proposals])
        count = min(self.federated_classes, self.num_classes)
        chosen = self.get_fed_loss_classes(gt_classes, count, self.num_classes, self.class_weights)
        mask = torch.zeros(self.num_classes + 1, dtype=torch.bool, device=gt_classes.device)
        return mask.index_fill(0, chosen, True)[:-1]  # the background may be among the chosen

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """{"loss_cls", "loss_box_reg"} for sampled proposals with `proposal_boxes`, `gt_classes` and `gt_boxes`."""
        logits, deltas = predictions
        gt_classes = cat([p.gt_classes for p in proposals])
        _log_classification_stats(logits, gt_classes)
        boxes = cat([p.proposal_boxes.tensor for p in proposals])
        # A picture without objects has no gt_boxes; its regions are background and never read theirs.
        gt_boxes = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])
        if self.cls_score.classification == "sigmoid":
            counted = self.counted_classes(gt_classes, proposals)
            loss_cls = independent_classification_loss(logits, gt_classes, counted, self.background_weight)
        else:
            loss_cls = region_classification_loss(logits, gt_classes, self.background_weight)
        return {
            "loss_cls": loss_cls,
            "loss_box_reg": self.box_reg_loss(boxes, gt_boxes, deltas, gt_classes),
        }


class DistilledHead(nn.Module):
    """The second head of ViLD's ensemble, trained by distillation alone: no annotation biases it to base classes.

    Contract: pooled region features (R, channels, s, s) -> normalised embeddings (R, D), or `probabilities` (R, 1 + C)
    over the vocabulary with a zero background column 0: of one word alone they say nothing, the first head does.

    Args:
        box_head: pooled features -> (R, input_dim); not shared with the text-classified head.
        input_dim: width of the box feature.
        embed_dim: width D of the joint space.
        scale: factor on the cosine.
    """

    def __init__(self, box_head: nn.Module, input_dim: int, embed_dim: int, scale: float) -> None:
        super().__init__()
        self.box_head, self.projection = box_head, nn.Linear(input_dim, embed_dim)
        self.embed_dim, self.scale = embed_dim, float(scale)
        self.register_buffer("text_embeddings", torch.zeros(0, embed_dim), persistent=False)

    def set_text_embeddings(self, embeddings: Tensor) -> None:
        """Make the rows of a (C, D) matrix the classes; they are normalised here."""
        self.text_embeddings = check_text_embeddings(embeddings, self.embed_dim).to(self.projection.weight.device)

    def forward(self, pooled: Tensor) -> Tensor:
        """Normalised float32 embeddings (R, D)."""
        return F.normalize(self.projection(self.box_head(pooled)).float(), dim=-1)

    def probabilities(self, pooled: Tensor) -> Tensor:
        """Softmax over the vocabulary, (R, 1 + C) float32."""
        regions = self(pooled)
        with torch.autocast(device_type=regions.device.type, enabled=False):
            logits = self.scale * regions @ self.text_embeddings.float().T
        return F.pad(logits.softmax(dim=-1), (1, 0))


def build_box_head(channels: int, resolution: int = 7, num_conv: int = 1, conv_dim: int = 64, fc_dim: int = 256):
    """Convolutions with LayerNorm, then one linear layer: (R, channels, resolution, resolution) -> (R, fc_dim)."""
    shape = ShapeSpec(channels=channels, height=resolution, width=resolution)
    return FastRCNNConvFCHead(shape, conv_dims=[conv_dim] * num_conv, fc_dims=[fc_dim], conv_norm="LN")


def build_mask_head(channels: int, resolution: int = 14, num_conv: int = 2, conv_dim: int = 64):
    """Detectron2's mask head with ONE mask channel, so that no class index ever selects a channel:
    (R, channels, resolution, resolution) -> (R, 1, 2 * resolution, 2 * resolution) logits."""
    shape = ShapeSpec(channels=channels, height=resolution, width=resolution)
    return MaskRCNNConvUpsampleHead(shape, num_classes=1, conv_dims=[conv_dim] * (num_conv + 1), conv_norm="LN")
