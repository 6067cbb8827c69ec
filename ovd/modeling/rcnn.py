"""The whole detector as one Mask R-CNN whose classes are words, and the one function that builds it from a description.

Source: F-VLM, RO-ViT and RECLIP's detector (ViT, simple pyramid, class-agnostic boxes and masks, fused scores).
This file does not read checkpoints of detectors or embed words: see `ovd/detector.py` and `ovd/text`.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Instances
from torch import Tensor

from ovd.modeling.backbone import FEATURE, ViTFeaturePyramid, WindowedViT
from ovd.modeling.box_head import TextBoxPredictor, build_box_head, build_mask_head
from ovd.modeling.proposals import build_rpn
from ovd.modeling.roi_heads import OpenVocabularyROIHeads, RegionScores
from ovd.modeling.text_classifier import TextClassifier
from ovd.modeling.vlm_head import CropTextHead, ImageTextHead
from pretrain.modeling.checkpoint import ImageTextModel, load_checkpoint

VLM_MODES = ("backbone", "frozen_copy", "crops", "off")


@dataclass
class DetectorConfig:
    """Everything, besides the image-text model, that a detector is rebuilt from. Sizes default to the miniature's.

    Attributes:
        image_size: side in pixels of the pictures that the detector is made for.
        window_size: side of an attention window in patches; 0 for global attention everywhere.
        global_blocks: number of evenly spaced blocks with global attention.
        freeze_backbone: keep the pretrained tower as it is (F-VLM).
        gradient_checkpointing: less memory, more time in the backbone's backward pass.
        pyramid_channels: channels of the levels p2 to p5.
        anchor_sizes: side in pixels of the anchors of p2 to p5.
        rpn_batch_size: anchors sampled for the loss in a picture.
        rpn_pre_nms_topk, rpn_post_nms_topk: proposals before and after NMS, (training, test).
        roi_batch_size: regions sampled for the loss in a picture.
        box_num_conv, box_conv_dim, box_fc_dim: size of the box head.
        mask_on: predict masks.
        mask_num_conv, mask_conv_dim: size of the mask head.
        classifier_scale: initial factor on the detector's cosine (inverse temperature), at most 100.
        learn_classifier_scale: train that factor.
        background_weight: weight of background regions in the classification loss.
        vlm_mode: map for the image-text score: "backbone" (the detector's own), "frozen_copy" (a copy of the
            pretrained tower with windows in all blocks but the last), "crops" (no map: the pretrained tower on each
            proposal's own crop, as in ViLD), "off" (no fusion).
        vlm_scale: factor on the image-text cosine; None takes exp(logit_scale) of the image-text model.
        vlm_output_size: side of the grid averaged in a region.
        vlm_crop_size: side in pixels of the crops of "crops".
        vlm_box_scale: factor on the region for the image-text score.
        alpha, beta: fusion weights of the image-text score for base and novel classes.
        objectness_delta: exponent of the objectness factor.
        nms_threshold, score_threshold, detections_per_image: inference settings.
    """

    image_size: int = 320
    window_size: int = 5
    global_blocks: int = 4
    freeze_backbone: bool = False
    gradient_checkpointing: bool = False
    pyramid_channels: int = 64
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0)
    rpn_batch_size: int = 64
    rpn_pre_nms_topk: tuple[int, int] = (200, 100)
    rpn_post_nms_topk: tuple[int, int] = (100, 60)
    roi_batch_size: int = 32
    box_num_conv: int = 1
    box_conv_dim: int = 64
    box_fc_dim: int = 256
    mask_on: bool = True
    mask_num_conv: int = 2
    mask_conv_dim: int = 64
    classifier_scale: float = 50.0
    learn_classifier_scale: bool = True
    background_weight: float = 0.9
    vlm_mode: str = "backbone"
    vlm_scale: float | None = None
    vlm_output_size: int = 7
    vlm_crop_size: int = 96
    vlm_box_scale: float = 1.0
    alpha: float = 0.35
    beta: float = 0.65
    objectness_delta: float = 0.0
    nms_threshold: float = 0.5
    score_threshold: float = 0.0
    detections_per_image: int = 300

    def __post_init__(self) -> None:
        if self.vlm_mode not in VLM_MODES:
            raise ValueError(f"vlm_mode is {self.vlm_mode!r}; choose one of {', '.join(VLM_MODES)}")
        for name in ("alpha", "beta"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, but a fusion weight lies in 0..1; choose one there")
        for name in ("anchor_sizes", "rpn_pre_nms_topk", "rpn_post_nms_topk"):
            setattr(self, name, tuple(getattr(self, name)))  # YAML and LazyConfig bring lists

    @classmethod
    def from_dict(cls, values: dict) -> "DetectorConfig":
        """Build from a plain dict; an unknown key is a ValueError that names it."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown detector field(s) {', '.join(unknown)}; known are the fields of DetectorConfig")
        return cls(**values)


class OpenVocabularyRCNN(GeneralizedRCNN):
    """Mask R-CNN over a `ViTFeaturePyramid` with an open vocabulary.

    Contract: list of {"image": (3, H, W) RGB in 0..255, "height", "width", and in training "instances" with gt_boxes,
    gt_classes, gt_masks} -> dict of losses, or list of {"instances": pred_boxes, scores, pred_classes, pred_masks}.
    Training wants an `EventStorage` around it, as all of Detectron2's models do.
    """

    def set_text_embeddings(
        self, embeddings: Tensor, is_base: Tensor | None = None, num_reported: int | None = None
    ) -> None:
        """Change the vocabulary; see `OpenVocabularyROIHeads.set_text_embeddings`."""
        self.roi_heads.set_text_embeddings(embeddings, is_base, num_reported)

    def forward(self, batched_inputs: list[dict]):
        """Losses in training mode, detections in evaluation mode."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        features = self.backbone(images.tensor, images.image_sizes)
        proposals, proposal_losses = self.proposal_generator(images, features, targets)
        _, detector_losses = self.roi_heads(images, features, proposals, targets)
        return {**detector_losses, **proposal_losses}

    @torch.no_grad()
    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
        return_parts: bool = False,
        min_score: float = 0.0,
        max_detections: int | None = None,
    ):
        """Detect objects.

        Args:
            batched_inputs: as in `forward`.
            detected_instances: boxes and classes that are known already; only masks are predicted for them.
            do_postprocess: scale boxes and masks to the "height" and "width" of each input.
            return_parts: give each output dict also "parts", the `RegionScores` of the picture.
            min_score: drop weaker detections before masks are predicted and pasted, which is most of their cost.
            max_detections: likewise keep only the best so many of each picture; None keeps all.

        Returns:
            list of {"instances": Instances, and "parts" if asked}, or list[Instances] without postprocessing and parts.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor, images.image_sizes)
        parts: list[RegionScores] = []
        if detected_instances is None:
            proposals, _ = self.proposal_generator(images, features, None)
            parts = self.roi_heads.score_regions(images, features, proposals)
            detected_instances = self.roi_heads.select_detections(parts)
            # Detectron2 returns detections best first.
            detected_instances = [x[x.scores >= min_score][:max_detections] for x in detected_instances]
        else:
            detected_instances = [x.to(self.device) for x in detected_instances]
        results = self.roi_heads.forward_with_given_boxes(features, detected_instances)
        if do_postprocess:
            results = self._postprocess(results, batched_inputs, images.image_sizes)
        elif return_parts:
            results = [{"instances": instances} for instances in results]
        if return_parts:
            for output, part in zip(results, parts, strict=True):
                output["parts"] = part
        return results


def build_detector(
    architecture: DetectorConfig | dict | None = None, image_text: ImageTextModel | str | Path = "", **overrides
) -> OpenVocabularyRCNN:
    """Build a detector on the image tower of an image-text model; the one way to build, for training and for loading.

    Args:
        architecture: description of the detector; None takes the miniature's.
        image_text: loaded image-text model, or its checkpoint folder. Its weights are copied.
        overrides: fields of `DetectorConfig` that replace those of `architecture`.

    Returns:
        The detector without a vocabulary: call `set_text_embeddings` before running it.
    """
    given = architecture if isinstance(architecture, dict) else vars(architecture or DetectorConfig())
    config = DetectorConfig.from_dict({**given, **overrides})
    if isinstance(image_text, (str, Path)):
        image_text = load_checkpoint(image_text)
    trunk = image_text.model.visual.trunk
    net = WindowedViT(
        trunk,
        config.image_size,
        config.window_size,
        config.global_blocks,
        frozen=config.freeze_backbone,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    backbone = ViTFeaturePyramid(net, config.pyramid_channels)
    shapes = {name: shape for name, shape in backbone.output_shape().items() if name != FEATURE}
    model = OpenVocabularyRCNN(
        backbone=backbone,
        proposal_generator=build_rpn(
            shapes,
            config.anchor_sizes,
            batch_size_per_image=config.rpn_batch_size,
            pre_nms_topk=config.rpn_pre_nms_topk,
            post_nms_topk=config.rpn_post_nms_topk,
        ),
        roi_heads=_build_roi_heads(config, image_text, shapes),
        pixel_mean=[255.0 * value for value in image_text.mean],
        pixel_std=[255.0 * value for value in image_text.std],
        input_format="RGB",
    )
    model.architecture = config
    return model


def _build_image_text_head(config: DetectorConfig, image_text: ImageTextModel) -> ImageTextHead | None:
    if config.vlm_mode == "off":
        return None
    visual, tower = image_text.model.visual, None
    if config.vlm_mode == "frozen_copy":
        tower = WindowedViT(visual.trunk, config.image_size, config.window_size, global_blocks=1, frozen=True)
    scale = config.vlm_scale
    if scale is None:
        scale = float(image_text.model.logit_scale.detach().exp())
    if config.vlm_mode == "crops":
        return CropTextHead(visual, image_text.embed_dim, scale, config.vlm_crop_size, config.vlm_box_scale)
    return ImageTextHead(visual, image_text.embed_dim, scale, config.vlm_output_size, config.vlm_box_scale, tower)


def _build_roi_heads(config: DetectorConfig, image_text: ImageTextModel, shapes: dict) -> OpenVocabularyROIHeads:
    scales = tuple(1.0 / shape.stride for shape in shapes.values())
    box_head = build_box_head(config.pyramid_channels, 7, config.box_num_conv, config.box_conv_dim, config.box_fc_dim)
    classifier = TextClassifier(
        config.box_fc_dim, image_text.embed_dim, config.classifier_scale, config.learn_classifier_scale
    )
    mask = {}
    if config.mask_on:
        mask = {
            "mask_in_features": list(shapes),
            "mask_pooler": ROIPooler(14, scales, sampling_ratio=2, pooler_type="ROIAlignV2"),
            "mask_head": build_mask_head(config.pyramid_channels, 14, config.mask_num_conv, config.mask_conv_dim),
        }
    return OpenVocabularyROIHeads(
        image_text_head=_build_image_text_head(config, image_text),
        alpha=config.alpha,
        beta=config.beta,
        objectness_delta=config.objectness_delta,
        num_classes=1,  # replaced by the vocabulary
        batch_size_per_image=config.roi_batch_size,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        box_in_features=list(shapes),
        box_pooler=ROIPooler(7, scales, sampling_ratio=2, pooler_type="ROIAlignV2"),
        box_head=box_head,
        box_predictor=TextBoxPredictor(
            config.box_fc_dim,
            classifier,
            config.background_weight,
            config.score_threshold,
            config.nms_threshold,
            config.detections_per_image,
        ),
        **mask,
    )
