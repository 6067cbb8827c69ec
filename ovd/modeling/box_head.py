"""Region heads that know no classes: box features, box regression shared by all classes, one mask channel.

Source: F-VLM and ViLD (class-agnostic boxes and masks). The class scores come from `TextClassifier`; nothing here is
sized by the vocabulary, so it may change after training.
"""

from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, _log_classification_stats
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from torch import Tensor

from ovd.losses.detection import region_classification_loss
from ovd.modeling.text_classifier import TextClassifier


class TextBoxPredictor(FastRCNNOutputLayers):
    """Detectron2's box predictor with a text classifier and class-agnostic boxes.

    Contract: features (R, input_dim) -> (logits (R, C + 1) with the background last, deltas (R, 4)).

    Args:
        input_dim: width of the box feature.
        classifier: the text classifier, which holds the vocabulary.
        background_weight: weight of background regions in the classification loss.
        test_score_thresh, test_nms_thresh, test_topk_per_image: Detectron2's inference settings.
    """

    def __init__(
        self,
        input_dim: int,
        classifier: TextClassifier,
        background_weight: float = 0.9,
        test_score_thresh: float = 0.0,
        test_nms_thresh: float = 0.5,
        test_topk_per_image: int = 300,
    ) -> None:
        super().__init__(
            ShapeSpec(channels=input_dim),
            box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            num_classes=1,  # only sizes the linear classifier that is replaced below
            cls_agnostic_bbox_reg=True,
            test_score_thresh=test_score_thresh,
            test_nms_thresh=test_nms_thresh,
            test_topk_per_image=test_topk_per_image,
        )
        self.cls_score = classifier
        self.background_weight = background_weight

    def set_text_embeddings(self, embeddings: Tensor) -> None:
        """Make the rows of a (C, D) matrix the classes."""
        self.cls_score.set_text_embeddings(embeddings)
        self.num_classes = self.cls_score.num_classes

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """{"loss_cls", "loss_box_reg"} for sampled proposals with `proposal_boxes`, `gt_classes` and `gt_boxes`."""
        logits, deltas = predictions
        gt_classes = cat([p.gt_classes for p in proposals])
        _log_classification_stats(logits, gt_classes)
        boxes = cat([p.proposal_boxes.tensor for p in proposals])
        # A picture without objects has no gt_boxes; its regions are background and never read theirs.
        gt_boxes = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])
        return {
            "loss_cls": region_classification_loss(logits, gt_classes, self.background_weight),
            "loss_box_reg": self.box_reg_loss(boxes, gt_boxes, deltas, gt_classes),
        }


def build_box_head(channels: int, resolution: int = 7, num_conv: int = 1, conv_dim: int = 64, fc_dim: int = 256):
    """Convolutions with LayerNorm, then one linear layer: (R, channels, resolution, resolution) -> (R, fc_dim)."""
    shape = ShapeSpec(channels=channels, height=resolution, width=resolution)
    return FastRCNNConvFCHead(shape, conv_dims=[conv_dim] * num_conv, fc_dims=[fc_dim], conv_norm="LN")


def build_mask_head(channels: int, resolution: int = 14, num_conv: int = 2, conv_dim: int = 64):
    """Detectron2's mask head with ONE mask channel, so that no class index ever selects a channel:
    (R, channels, resolution, resolution) -> (R, 1, 2 * resolution, 2 * resolution) logits."""
    shape = ShapeSpec(channels=channels, height=resolution, width=resolution)
    return MaskRCNNConvUpsampleHead(shape, num_classes=1, conv_dims=[conv_dim] * (num_conv + 1), conv_norm="LN")
