"""Class-agnostic region proposals: Detectron2's RPN, and one that learns only how well a place is localised.

Source: Faster R-CNN with ViTDet's settings ("standard"); OLN as in F-VLM and DITO ("localization"), which trains little
or not at all on background and so does not push objects down that nobody has labelled. The losses are in
`ovd/losses/proposals.py`.
"""

import torch
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ovd.losses.proposals import box_iou_loss, centerness, paired_iou, quality_loss

PROPOSAL_KINDS = ("standard", "localization")
QUALITY_TARGETS = ("centerness", "iou")
BOX_CODINGS = ("distances", "deltas")
BOX_LOSS_WEIGHT = 8.0  # of 1 - IoU (DITO's configuration)


class ClassAgnosticRPN(RPN):
    """Detectron2's RPN with one NMS threshold for training and one for test.

    Args:
        nms_thresholds: (training, test) IoU above which the weaker proposal is dropped; 1.0 drops none.
        kwargs: as for `RPN`.
    """

    def __init__(self, *, nms_thresholds: tuple[float, float], **kwargs) -> None:
        super().__init__(**kwargs)
        self.nms_thresholds = tuple(nms_thresholds)

    def predict_proposals(self, *args, **kwargs) -> list[Instances]:
        """As in Detectron2, with the threshold of the mode that the network is in."""
        self.nms_thresh = self.nms_thresholds[0 if self.training else 1]
        return super().predict_proposals(*args, **kwargs)


class LocalizationRPN(ClassAgnosticRPN):
    """Rank places by localisation quality: the logit's sigmoid is the centerness, or the IoU, of the proposal.

    Contract as `RPN`, with the losses {"loss_rpn_quality", "loss_rpn_loc"}. Only places that match a labelled object
    are sampled; everything else has neither loss nor gradient, unless the background fills what is left of the sample.
    Places whose centre lies outside their object have no centerness and are left out too. Both losses are sums divided
    by the size of full samples, as in DITO.

    Args:
        quality_matcher: labels the places for the quality loss, as `anchor_matcher` does for the box loss.
        quality_target: one of `QUALITY_TARGETS`; "iou" is that of the predicted box with its object.
        fill_background: fill the sample for the quality loss with places that match nothing; their target is 0.
        kwargs: as for `ClassAgnosticRPN`; one anchor at a place. At most batch_size_per_image * positive_fraction
            places of a picture are sampled for each loss.
    """

    def __init__(
        self, *, quality_matcher: Matcher, quality_target: str = "centerness", fill_background: bool = False, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        _check_choice("rpn_quality_target", quality_target, QUALITY_TARGETS)
        self.quality_matcher, self.quality_target = quality_matcher, quality_target
        self.fill_background = fill_background

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each picture: (A, 3) bool, sampled for the quality loss, for the box loss, as background; (A, 4) boxes of
        the matched objects."""
        places = Boxes.cat(anchors)
        labels, matched_boxes = [], []
        for target in gt_instances:
            overlaps = pairwise_iou(target.gt_boxes, places)
            matched, box_labels = self.anchor_matcher(overlaps)
            _, quality_labels = self.quality_matcher(overlaps)
            boxes = target.gt_boxes.tensor[matched] if len(target) else torch.zeros_like(places.tensor)
            inside = centerness(places.get_centers(), boxes) > 0
            limit = int(self.batch_size_per_image * self.positive_fraction)
            samples = [_sample((kind == 1) & inside, limit) for kind in (quality_labels, box_labels)]
            rest = self.batch_size_per_image - int(samples[0].sum()) if self.fill_background else 0
            labels.append(torch.stack([*samples, _sample(quality_labels == 0, rest)], dim=1))
            matched_boxes.append(boxes)
        return labels, matched_boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Arguments as in Detectron2, `gt_labels` and `gt_boxes` as from `label_and_sample_anchors`."""
        logits, deltas = cat(pred_objectness_logits, dim=1), cat(pred_anchor_deltas, dim=1)
        sampled, objects = torch.stack(gt_labels), torch.stack(gt_boxes)
        places = Boxes.cat(anchors).tensor.expand_as(objects)
        for_quality, for_boxes, background = sampled.unbind(dim=-1)
        normalizer = self.batch_size_per_image * len(sampled)
        get_event_storage().put_scalar("rpn/num_pos_anchors", for_boxes.sum().item() / len(sampled))
        if self.quality_target == "centerness":
            middles = (places[for_quality][:, :2] + places[for_quality][:, 2:]) / 2
            target = centerness(middles, objects[for_quality])
        else:
            with torch.no_grad():
                found = self.box2box_transform.apply_deltas(deltas[for_quality].float(), places[for_quality])
                target = paired_iou(found, objects[for_quality])
        boxes = self.box2box_transform.apply_deltas(deltas[for_boxes].float(), places[for_boxes])
        losses = {
            "loss_rpn_quality": quality_loss(logits[for_quality], target, normalizer)
            + quality_loss(logits[background], torch.zeros_like(logits[background]), normalizer),
            "loss_rpn_loc": BOX_LOSS_WEIGHT * box_iou_loss(boxes, objects[for_boxes], normalizer),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}


def _sample(mask: Tensor, limit: int) -> Tensor:
    """Keep a random part of a (A,) bool mask, at most `limit` places."""
    indices = mask.nonzero()[:, 0]
    chosen = indices[torch.randperm(len(indices), device=indices.device)[:limit]]
    return torch.zeros_like(mask).index_fill(0, chosen, True)


def build_rpn(
    shapes: dict[str, ShapeSpec],
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256),
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    batch_size_per_image: int = 64,
    pre_nms_topk: tuple[int, int] = (200, 100),
    post_nms_topk: tuple[int, int] = (100, 60),
    nms_thresholds: tuple[float, float] = (0.7, 0.7),
    kind: str = "standard",
    num_conv: int = 1,
    quality_target: str = "centerness",
    box_coding: str = "distances",
    fill_background: bool = False,
) -> ClassAgnosticRPN:
    """Build a region proposal network over pyramid levels.

    Args:
        shapes: level name -> shape, finest level first, all with the same number of channels.
        anchor_sizes: side in pixels of the square anchor of each level.
        aspect_ratios: height / width of the anchors at every place; "localization" has one square anchor.
        batch_size_per_image: anchors sampled for the loss in a picture.
        pre_nms_topk: proposals kept on each level before NMS, (training, test).
        post_nms_topk: proposals kept in a picture after NMS, (training, test).
        nms_thresholds: IoU above which the weaker proposal is dropped, (training, test); 1.0 switches NMS off.
        kind: one of `PROPOSAL_KINDS`.
        num_conv: 3 x 3 convolutions of the head.
        quality_target: "localization" only, see `LocalizationRPN`.
        box_coding: "localization" only: "distances" from the place to the four sides in units of the anchor's side, or
            "deltas" of centre and size as in Faster R-CNN.
        fill_background: "localization" only, see `LocalizationRPN`.

    Raises:
        ValueError: not one anchor size a level, or an unknown kind, target or coding.
    """
    if len(anchor_sizes) != len(shapes):
        raise ValueError(f"{len(anchor_sizes)} anchor sizes for {len(shapes)} pyramid levels; give one size a level")
    _check_choice("proposals", kind, PROPOSAL_KINDS)
    ratios = (1.0,) if kind == "localization" else tuple(aspect_ratios)
    channels = next(iter(shapes.values())).channels
    generator = DefaultAnchorGenerator(
        sizes=[[size] for size in anchor_sizes],
        aspect_ratios=[list(ratios)],
        strides=[shape.stride for shape in shapes.values()],
        offset=0.5,
    )
    common = {
        "in_features": list(shapes),
        "head": StandardRPNHead(in_channels=channels, num_anchors=len(ratios), conv_dims=[-1] * num_conv),
        "anchor_generator": generator,
        "anchor_matcher": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        "box2box_transform": Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        "batch_size_per_image": batch_size_per_image,
        "pre_nms_topk": tuple(pre_nms_topk),
        "post_nms_topk": tuple(post_nms_topk),
        "nms_thresholds": nms_thresholds,
    }
    if kind == "standard":
        return ClassAgnosticRPN(positive_fraction=0.5, **common)
    return _localization_rpn(common, box_coding, quality_target=quality_target, fill_background=fill_background)


def _localization_rpn(common: dict, box_coding: str, **fields) -> LocalizationRPN:
    _check_choice("rpn_box_coding", box_coding, BOX_CODINGS)
    if box_coding == "distances":
        common["box2box_transform"] = Box2BoxTransformLinear()
        # Half a side in each direction is the anchor itself; at 0 every box would be empty and without a gradient.
        nn.init.constant_(common["head"].anchor_deltas.bias, 0.5)
    return LocalizationRPN(
        # Each object also gets its best places, however small their overlap, so that small objects count.
        quality_matcher=Matcher([0.1, 0.3], [0, -1, 1], allow_low_quality_matches=True),
        positive_fraction=255 / 256,  # the family's share of foreground
        **fields,
        **common,
    )


def _check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{field} is {value!r}; choose one of {', '.join(known)}")
