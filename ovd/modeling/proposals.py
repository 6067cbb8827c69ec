"""Class-agnostic region proposals: Detectron2's RPN with settings small enough for a CPU.

Source: Faster R-CNN with ViTDet's settings. The centerness proposals of OLN, which do not push unlabelled objects down,
are not in this file.
"""

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead


def build_rpn(
    shapes: dict[str, ShapeSpec],
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256),
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    batch_size_per_image: int = 64,
    pre_nms_topk: tuple[int, int] = (200, 100),
    post_nms_topk: tuple[int, int] = (100, 60),
    nms_threshold: float = 0.7,
) -> RPN:
    """Build a region proposal network over pyramid levels.

    Args:
        shapes: level name -> shape, finest level first, all with the same number of channels.
        anchor_sizes: side in pixels of the square anchor of each level.
        aspect_ratios: height / width of the anchors at every place.
        batch_size_per_image: anchors sampled for the loss in a picture.
        pre_nms_topk: proposals kept on each level before NMS, (training, test).
        post_nms_topk: proposals kept in a picture after NMS, (training, test).
        nms_threshold: IoU above which the weaker proposal is dropped.
    """
    if len(anchor_sizes) != len(shapes):
        raise ValueError(f"{len(anchor_sizes)} anchor sizes for {len(shapes)} pyramid levels; give one size a level")
    channels = next(iter(shapes.values())).channels
    generator = DefaultAnchorGenerator(
        sizes=[[size] for size in anchor_sizes],
        aspect_ratios=[list(aspect_ratios)],
        strides=[shape.stride for shape in shapes.values()],
        offset=0.5,
    )
    return RPN(
        in_features=list(shapes),
        head=StandardRPNHead(in_channels=channels, num_anchors=len(aspect_ratios)),
        anchor_generator=generator,
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=batch_size_per_image,
        positive_fraction=0.5,
        pre_nms_topk=tuple(pre_nms_topk),
        post_nms_topk=tuple(post_nms_topk),
        nms_thresh=nms_threshold,
    )
