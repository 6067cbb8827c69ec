"""The whole detector as one Mask R-CNN whose classes are words, and the one function that builds it from a description.

Source: F-VLM, RO-ViT and RECLIP's detector (ViT, simple pyramid, class-agnostic boxes and masks, fused scores).
This file does not read checkpoints of detectors or embed words: see `ovd/detector.py` and `ovd/text`.
"""

from functools import partial
from pathlib import Path

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ovd.losses.distillation import RegionTeacher
from ovd.modeling.backbone import FEATURE, ViTFeaturePyramid, WindowedViT
from ovd.modeling.box_head import DistilledHead, TextBoxPredictor, build_box_head, build_mask_head
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.image_tower import value_attention
from ovd.modeling.proposals import build_rpn
from ovd.modeling.roi_heads import Distillation, OpenVocabularyROIHeads, RegionScores
from ovd.modeling.text_classifier import TextClassifier
from ovd.modeling.vlm_head import CropTextHead, ImageTextHead, RegionTextHead
from ovd.text.embeddings import embed_empty_prompt
from pretrain.modeling.checkpoint import ImageTextModel, load_checkpoint
from pretrain.modeling.plain_tower import plain_tower


class OpenVocabularyRCNN(GeneralizedRCNN):
    """Mask R-CNN over a `ViTFeaturePyramid` with an open vocabulary.

    Contract: list of {"image": (3, H, W) RGB in 0..255, "height", "width", and in training "instances" with gt_boxes,
    gt_classes, gt_masks} -> dict of losses, or list of {"instances": pred_boxes, scores, pred_classes, pred_masks}.
    Training also reads "regions" (from `place_regions`, in the place of distilling proposals) and "verified_classes"
    (contiguous classes whose presence and absence is known) where every input has them.
    Training wants an `EventStorage` around it, as all of Detectron2's models do.
    """

    def set_text_embeddings(
        self,
        embeddings: Tensor,
        is_base: Tensor | None = None,
        num_reported: int | None = None,
        background_embedding: Tensor | None = None,
        vlm_background: Tensor | None = None,
    ) -> None:
        """Change the vocabulary; see `OpenVocabularyROIHeads.set_text_embeddings`."""
        self.roi_heads.set_text_embeddings(embeddings, is_base, num_reported, background_embedding, vlm_background)

    def forward(self, batched_inputs: list[dict]):
        """Losses in training mode, detections in evaluation mode."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        features = self.backbone(images.tensor, images.image_sizes)
        proposals, proposal_losses = self.proposal_generator(images, features, targets)
        regions = verified = None
        if self.roi_heads.distillation is not None and all("regions" in x for x in batched_inputs):
            regions = [x["regions"].to(self.device) for x in batched_inputs]
        if all("verified_classes" in x for x in batched_inputs):
            verified = [torch.as_tensor(x["verified_classes"], dtype=torch.long) for x in batched_inputs]
        _, detector_losses = self.roi_heads(images, features, proposals, targets, regions, verified)
        return {**detector_losses, **proposal_losses}

    @torch.no_grad()
    def propose(self, inputs: dict, limit: int = 300) -> Boxes:
        """At most `limit` best proposals of one picture, in pixels of the original; the model is in evaluation mode."""
        images = self.preprocess_image([inputs])
        features = self.backbone(images.tensor, images.image_sizes)
        boxes = self.proposal_generator(images, features, None)[0][0].proposal_boxes[:limit]
        height, width = images.image_sizes[0]
        boxes.scale(inputs.get("width", width) / width, inputs.get("height", height) / height)
        return boxes

    @torch.no_grad()
    def embed_proposals(
        self, inputs: dict, limit: int = 300, proposer: "OpenVocabularyRCNN | None" = None
    ) -> tuple[Tensor, Tensor]:
        """Best proposals of one picture and the distillation teacher's embeddings of them, for `precompute_regions`.

        Args:
            inputs: as in `forward`, without augmentation; the models are in evaluation mode.
            limit: proposals, at most.
            proposer: detector whose proposals they are; None: this one's own.

        Returns:
            (R, 4) xyxy in pixels of the original picture, and (R, D) normalised.
        """
        if self.roi_heads.distillation is None:
            raise ValueError("this detector has no distillation teacher; build it with distillation 'shared'")
        boxes = (proposer or self).propose(inputs, limit)
        images, shown = self.preprocess_image([inputs]), boxes.clone()
        height, width = images.image_sizes[0]
        shown.scale(width / inputs.get("width", width), height / inputs.get("height", height))
        return boxes.tensor, self.roi_heads.distillation.teacher(images.tensor, [shown.tensor])

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
    visual = plain_tower(image_text.model.visual)
    net = WindowedViT(
        visual.trunk,
        config.image_size,
        config.window_size,
        config.global_blocks,
        frozen=config.freeze_backbone,
        gradient_checkpointing=config.gradient_checkpointing,
        power_of_two_patches=True,
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
            nms_thresholds=config.rpn_nms_thresholds,
            kind=config.proposals,
            num_conv=config.rpn_num_conv,
            quality_target=config.rpn_quality_target,
            box_coding=config.rpn_box_coding,
            fill_background=config.rpn_fill_background,
        ),
        roi_heads=_build_roi_heads(config, image_text, visual, shapes, net.patch_size),
        pixel_mean=[255.0 * value for value in image_text.mean],
        pixel_std=[255.0 * value for value in image_text.std],
        input_format="RGB",
    )
    model.architecture = config
    return model


def _image_text_scale(config: DetectorConfig, image_text: ImageTextModel) -> float:
    return float(image_text.model.logit_scale.detach().exp()) if config.vlm_scale is None else config.vlm_scale


def crop_size(config: DetectorConfig, image_text: ImageTextModel) -> int:
    """Side in pixels of a crop for the image tower; towers know best what they saw last."""
    return config.vlm_crop_size or image_text.image_size


def _build_image_text_head(
    config: DetectorConfig, image_text: ImageTextModel, visual: nn.Module, patch_size: int
) -> RegionTextHead | None:
    if config.vlm_mode == "off":
        return None
    tower = None
    if config.vlm_mode == "frozen_copy":
        # Patches of a tower that pools by its class token are not in the space of words but for MaskCLIP's reading.
        trunk = value_attention(visual.trunk) if visual.trunk.global_pool == "token" else visual.trunk
        tower = WindowedViT(trunk, config.image_size, config.window_size, global_blocks=1, frozen=True)
    scale = _image_text_scale(config, image_text)
    background = embed_empty_prompt(image_text) if config.vlm_background else None
    if config.vlm_mode == "crops":
        side = crop_size(config, image_text)
        return CropTextHead(
            visual, image_text.embed_dim, scale, side, config.vlm_box_scale, background=background
        )  # fmt: skip
    # The frozen copy keeps the patches that the tower was trained with; the backbone's may be larger.
    stride = patch_size if tower is None else tower.patch_size
    return ImageTextHead(
        visual, image_text.embed_dim, scale, config.vlm_output_size, config.vlm_box_scale, tower, stride, background
    )


def _build_box_head(config: DetectorConfig) -> nn.Module:
    return build_box_head(config.pyramid_channels, 7, config.box_num_conv, config.box_conv_dim, config.box_fc_dim)


def _build_classifier(config: DetectorConfig, image_text: ImageTextModel) -> TextClassifier:
    background = embed_empty_prompt(image_text) if config.background == "empty_prompt" else None
    return TextClassifier(
        config.box_fc_dim,
        image_text.embed_dim,
        config.classifier_scale,
        config.learn_classifier_scale,
        background,
        config.classification,
    )


def _build_distillation(
    config: DetectorConfig, image_text: ImageTextModel, visual: nn.Module
) -> tuple[Distillation | None, DistilledHead | None]:
    if config.distillation == "off":
        return None, None
    scale, dim = _image_text_scale(config, image_text), image_text.embed_dim
    # box_scale 1: what surrounds a box is the teacher's to decide.
    make_head = partial(CropTextHead, visual, dim, scale, crop_size(config, image_text), box_scale=1.0)
    teacher = RegionTeacher(make_head, dim, config.distillation_box_scales)
    head = None
    if config.distillation == "ensemble":
        head = DistilledHead(_build_box_head(config), config.box_fc_dim, dim, scale)
    return Distillation(teacher, config.distillation_weight, config.distillation_regions), head


def _build_roi_heads(
    config: DetectorConfig, image_text: ImageTextModel, visual: nn.Module, shapes: dict, patch_size: int
) -> OpenVocabularyROIHeads:
    scales = tuple(1.0 / shape.stride for shape in shapes.values())
    box_head, classifier = _build_box_head(config), _build_classifier(config, image_text)
    mask = {}
    if config.mask_on:
        mask = {
            "mask_in_features": list(shapes),
            "mask_pooler": ROIPooler(14, scales, sampling_ratio=2, pooler_type="ROIAlignV2"),
            "mask_head": build_mask_head(config.pyramid_channels, 14, config.mask_num_conv, config.mask_conv_dim),
        }
    distillation, distilled_head = _build_distillation(config, image_text, visual)
    return OpenVocabularyROIHeads(
        image_text_head=_build_image_text_head(config, image_text, visual, patch_size),
        alpha=config.alpha,
        beta=config.beta,
        objectness_delta=config.objectness_delta,
        detector_temperature=config.detector_temperature,
        distillation=distillation,
        distilled_head=distilled_head,
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
            config.federated_loss,
            config.federated_classes,
            config.box_smooth_l1_beta,
        ),
        **mask,
    )
