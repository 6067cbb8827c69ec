"""A random detector of this project and Detectron2's own ViTDet Mask R-CNN of the same sizes, to be timed side by side.

Source of the second: Detectron2's `mask_rcnn_vitdet` configuration (ViT, simple pyramid, LayerNorm in the heads). Both
have the same image tower, weights, windows, pyramid levels, anchors and numbers of regions; the clock and the tables
are in `benchmark_detector.py`.
"""

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from detectron2.engine import SimpleTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.modeling.roi_heads.roi_heads import StandardROIHeads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ovd.engine.benchmark_detector import DetectorBenchmark
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.proposals import build_rpn
from ovd.modeling.rcnn import OpenVocabularyRCNN, build_detector
from pretrain.modeling.checkpoint import ImageTextModel
from pretrain.modeling.plain_tower import PlainTower

PATCH_SIZE = 16
# Of Detectron2's configurations for COCO (0.05) and LVIS (0.02), and lower.
_SCORE_THRESHOLDS = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0)


@dataclass(frozen=True)
class TowerSize:
    """Width, depth and attention heads of an image tower, and the width of the joint space."""

    width: int
    depth: int
    heads: int
    embed_dim: int


TOWERS = {
    "mini": TowerSize(96, 9, 3, 128),
    "vit_ti": TowerSize(192, 12, 3, 192),
    "vit_s": TowerSize(384, 12, 6, 384),
    "vit_b": TowerSize(768, 12, 12, 512),
    "vit_l": TowerSize(1024, 24, 16, 768),
}


def small_heads(image_size: int, window_size: int) -> DetectorConfig:
    """The miniature's heads and numbers of regions, and crops of the size that its towers end at."""
    return DetectorConfig(image_size=image_size, window_size=window_size, vlm_crop_size=64, vlm_scale=50.0)


def published_heads(image_size: int, window_size: int) -> DetectorConfig:
    """The sizes of ViTDet's configuration, which are also those of the published open-vocabulary detectors.

    Crops have 224 px, at which RECLIP's towers end.
    """
    return DetectorConfig(
        image_size=image_size, window_size=window_size, pyramid_channels=256, rpn_num_conv=2, rpn_batch_size=256,
        rpn_pre_nms_topk=(2000, 1000), rpn_post_nms_topk=(1000, 1000), roi_batch_size=512, box_num_conv=4,
        box_conv_dim=256, box_fc_dim=1024, mask_num_conv=4, mask_conv_dim=256, vlm_output_size=14, vlm_crop_size=224,
        vlm_scale=50.0,
    )  # fmt: skip


HEADS = {"small": small_heads, "published": published_heads}


class _Towers(nn.Module):
    """As much of an open_clip model as `build_detector` reads."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual, self.logit_scale = visual, nn.Parameter(torch.zeros(()))


def random_image_text(tower: TowerSize, image_size: int) -> ImageTextModel:
    """An average-pooled image tower without class token, with random weights and positions, and no text tower."""
    trunk = VisionTransformer(
        img_size=image_size, patch_size=PATCH_SIZE, embed_dim=tower.width, depth=tower.depth, num_heads=tower.heads,
        class_token=False, global_pool="avg", num_classes=tower.embed_dim,
    )  # fmt: skip
    model = _Towers(PlainTower(trunk, image_size))
    return ImageTextModel(
        model, None, image_size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, tower.embed_dim, fingerprint=""
    )


def build_reference(own: OpenVocabularyRCNN, num_classes: int, relative_positions: bool = False) -> GeneralizedRCNN:
    """Detectron2's ViTDet Mask R-CNN of the sizes of one of our detectors, with its weights wherever shapes agree.

    Without stochastic depth and the level p6, which ours does not have.

    Args:
        own: without distillation, "standard" proposals, an average-pooled tower without class token or LayerScale.
        num_classes: outputs of its linear classifier, of its box regression (four each) and of its mask head.
        relative_positions: as in ViTDet's configuration; ours has none, so that the towers differ.
    """
    config, net = own.architecture, own.backbone.net
    grid = config.image_size // net.patch_size
    width, depth = net.pos_embed.shape[-1], len(net.blocks)
    whole = net.global_blocks
    tower = ViT(
        img_size=config.image_size, patch_size=net.patch_size, embed_dim=width, depth=depth,
        num_heads=net.blocks[0].attn.num_heads, window_size=config.window_size,
        window_block_indexes=[index for index in range(depth) if index not in whole],
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=relative_positions,
        pretrain_img_size=grid * net.patch_size, pretrain_use_cls_token=False,
    )  # fmt: skip
    scales = (4.0, 2.0, 1.0, 0.5)
    backbone = SimpleFeaturePyramid(
        tower, "last_feat", config.pyramid_channels, scales, norm="LN", square_pad=config.image_size
    )
    shapes = backbone.output_shape()
    model = GeneralizedRCNN(
        backbone=backbone,
        proposal_generator=build_rpn(
            shapes, config.anchor_sizes, batch_size_per_image=config.rpn_batch_size,
            pre_nms_topk=config.rpn_pre_nms_topk, post_nms_topk=config.rpn_post_nms_topk,
            nms_thresholds=config.rpn_nms_thresholds, num_conv=config.rpn_num_conv,
        ),
        roi_heads=_roi_heads(config, shapes, num_classes),
        pixel_mean=own.pixel_mean.flatten().tolist(),
        pixel_std=own.pixel_std.flatten().tolist(),
        input_format="RGB",
    )  # fmt: skip
    _copy_weights(own, model)
    return model


def _roi_heads(config: DetectorConfig, shapes: dict[str, ShapeSpec], num_classes: int) -> StandardROIHeads:
    names, channels = list(shapes), config.pyramid_channels
    pooler = partial(
        ROIPooler, scales=[1 / shapes[name].stride for name in names], sampling_ratio=0, pooler_type="ROIAlignV2"
    )
    return StandardROIHeads(
        num_classes=num_classes,
        batch_size_per_image=config.roi_batch_size,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        box_in_features=names,
        box_pooler=pooler(7),
        box_head=FastRCNNConvFCHead(
            ShapeSpec(channels=channels, height=7, width=7), conv_dims=[config.box_conv_dim] * config.box_num_conv,
            fc_dims=[config.box_fc_dim], conv_norm="LN",
        ),
        box_predictor=FastRCNNOutputLayers(
            ShapeSpec(channels=config.box_fc_dim), box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
            num_classes=num_classes, test_score_thresh=_SCORE_THRESHOLDS[0], test_nms_thresh=config.nms_threshold,
            test_topk_per_image=config.detections_per_image,
        ),
        mask_in_features=names,
        mask_pooler=pooler(14),
        mask_head=MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=channels, height=14, width=14), num_classes=num_classes,
            conv_dims=[config.mask_conv_dim] * (config.mask_num_conv + 1), conv_norm="LN",
        ),
    )  # fmt: skip


def _copy_weights(own: nn.Module, reference: nn.Module) -> None:
    """Copy what has the same name (but for the patch embedding's) and shape."""
    names = {"backbone.net.patch_embed.proj": "backbone.net.patch_embed"}
    source, target = own.state_dict(), reference.state_dict()
    for name, value in target.items():
        module, _, leaf = name.rpartition(".")
        found = source.get(f"{names.get(module, module)}.{leaf}")
        if found is not None and found.shape == value.shape:
            value.copy_(found)


@torch.no_grad()
def match_detections(own: OpenVocabularyRCNN, reference: GeneralizedRCNN, inputs: list[dict]) -> float:
    """Let the reference find as much as ours: masks, which both predict for detections only, are most of the time.

    Its class logits are spread as ours are, and its score threshold is the highest with which it finds as many; ours
    keeps its own, which is usually 0. A low threshold costs the reference time, since all that pass go through NMS.

    Returns:
        The reference's score threshold.
    """
    predictor = reference.roi_heads.box_predictor
    spreads = []
    for model in (own, reference):
        with _outputs_of(model.roi_heads.box_predictor.cls_score) as outputs:
            model.eval()(inputs)
        spreads.append(outputs[0][:, :-1].float().std())
    predictor.cls_score.weight.mul_(spreads[0] / spreads[1])
    wanted = count_regions(own, inputs)[1]
    for predictor.test_score_thresh in _SCORE_THRESHOLDS:
        if count_regions(reference, inputs)[1] >= wanted:
            break
    return predictor.test_score_thresh


@contextmanager
def _outputs_of(module: nn.Module):
    """Collect what a module returns."""
    outputs: list = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@torch.no_grad()
def count_regions(model: GeneralizedRCNN, inputs: list[dict]) -> tuple[float, float]:
    """Proposals and detections of a picture, on average: what the region heads and the mask head work on."""
    with _outputs_of(model.proposal_generator) as outputs:
        found = model.eval()(inputs)
    return tuple(sum(len(x) for x in each) / len(inputs) for each in (outputs[0][0], [x["instances"] for x in found]))


def random_inputs(batch_size: int, image_size: int, num_classes: int, objects: int = 8, seed: int = 0) -> list[dict]:
    """Square noise pictures with rectangular objects of an eighth to a half of the side, as a mapper gives them."""
    rng = torch.Generator().manual_seed(seed)
    inputs = []
    for _ in range(batch_size):
        side = image_size * (1 / 8 + 3 / 8 * torch.rand(objects, 2, generator=rng))
        corner = torch.rand(objects, 2, generator=rng) * (image_size - side)
        boxes = torch.cat([corner, corner + side], dim=1).round()
        masks = torch.zeros(objects, image_size, image_size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances((image_size, image_size))
        instances.gt_boxes, instances.gt_masks = Boxes(boxes), BitMasks(masks)
        instances.gt_classes = torch.randint(0, num_classes, (objects,), generator=rng)
        image = torch.randint(0, 256, (3, image_size, image_size), dtype=torch.uint8, generator=rng)
        inputs.append({"image": image, "height": image_size, "width": image_size, "instances": instances})
    return inputs


class Scene:
    """Pictures and models of one benchmark.

    Args:
        benchmark: what is measured; checked.
    """

    def __init__(self, benchmark: DetectorBenchmark) -> None:
        self.benchmark, size = benchmark, benchmark.image_size
        torch.manual_seed(0)
        self.image_text = random_image_text(TOWERS[benchmark.tower], size)
        self.architecture = HEADS[benchmark.heads](size, size // (4 * PATCH_SIZE))
        self.inputs = random_inputs(benchmark.batch_size, size, benchmark.words)
        self.dtype = torch.bfloat16 if benchmark.bf16 else None

    def words(self, count: int) -> Tensor:
        """Random text embeddings (count, D)."""
        return torch.randn(count, self.image_text.embed_dim, generator=torch.Generator().manual_seed(0))

    def own(self, vlm_mode: str) -> OpenVocabularyRCNN:
        """This project's detector with a random vocabulary; the same weights in every mode."""
        torch.manual_seed(0)
        model = build_detector(self.architecture, self.image_text, vlm_mode=vlm_mode).to(self.benchmark.device)
        model.set_text_embeddings(self.words(self.benchmark.words))
        return model

    def reference(self, own: OpenVocabularyRCNN) -> GeneralizedRCNN:
        """Detectron2's, with the weights of `own`."""
        model = build_reference(own, self.benchmark.words, self.benchmark.relative_positions)
        return model.to(self.benchmark.device)

    def inference(self, model: nn.Module) -> Callable[[], None]:
        """A function that detects in all pictures, from pixels to masks of the picture's size."""
        model = Autocast(model.eval(), self.benchmark.bf16)

        def run() -> None:
            with torch.no_grad():
                model(self.inputs)

        return run


class Autocast(nn.Module):
    """A model under bfloat16 autocast."""

    def __init__(self, model: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16
        self.device_type = next(model.parameters()).device.type

    def forward(self, batch: list[dict]):
        """What the model returns."""
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            return self.model(batch)


def training_step(
    model: nn.Module, inputs: list[dict], trainer_class: type[SimpleTrainer], **options
) -> Callable[[], None]:
    """A function that takes one of the trainer's steps: losses, gradients, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    trainer = trainer_class(model.train(), itertools.repeat(inputs), optimizer, **options)
    trainer.iter = 0

    def run() -> None:
        with EventStorage() as trainer.storage:
            trainer.run_step()

    return run
