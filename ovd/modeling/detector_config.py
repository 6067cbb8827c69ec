"""The description of a detector: with the image-text model, all that it is built and rebuilt from."""

from dataclasses import dataclass, fields

from ovd.modeling.setting_ranges import RANGES, check_setting

VLM_MODES = ("backbone", "frozen_copy", "crops", "off")
BACKGROUNDS = ("learned", "empty_prompt")
DISTILLATIONS = ("off", "shared", "ensemble")

SWITCHES = (
    "freeze_backbone", "gradient_checkpointing", "rpn_fill_background", "mask_on", "learn_classifier_scale",
    "vlm_background",
)  # fmt: skip
# What may be otherwise than in training: these change inference, and neither shape nor meaning of a trained weight.
INFERENCE_FIELDS = (
    "image_size", "window_size", "global_blocks", "rpn_nms_thresholds", "rpn_pre_nms_topk", "rpn_post_nms_topk",
    "vlm_mode", "vlm_scale", "vlm_output_size", "vlm_crop_size", "vlm_box_scale", "vlm_background", "alpha", "beta",
    "objectness_delta", "detector_temperature", "nms_threshold", "score_threshold", "detections_per_image",
)  # fmt: skip


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
        proposals: "standard" (Detectron2's RPN, three anchors at a place) or "localization" (OLN as in F-VLM and DITO:
            one anchor, ranked by localisation quality, nothing unlabelled pushed down).
        rpn_num_conv: 3 x 3 convolutions of the proposal head.
        rpn_nms_thresholds: IoU above which the weaker proposal is dropped, (training, test); DITO tests with 1.0, off.
        rpn_quality_target: "localization": "centerness" or "iou".
        rpn_box_coding: "localization": "distances" to the four sides, or "deltas" of centre and size.
        rpn_fill_background: "localization": what objects leave of the sample is filled with background, as in DITO.
        rpn_batch_size: anchors sampled for the loss in a picture.
        rpn_pre_nms_topk, rpn_post_nms_topk: proposals before and after NMS, (training, test).
        roi_batch_size: regions sampled for the loss in a picture.
        box_num_conv, box_conv_dim, box_fc_dim: size of the box head.
        box_smooth_l1_beta: of the box regression's loss; 0 is plain L1, 1 Huber's loss as the family has it.
        mask_on: predict masks.
        mask_num_conv, mask_conv_dim: size of the mask head.
        classifier_scale: initial factor on the detector's cosine (inverse temperature), at most 100.
        learn_classifier_scale: train that factor.
        background: "learned" embedding, or that of an "empty_prompt" (softmax only).
        background_weight: weight of background regions in the classification loss.
        classification: "softmax" over the words and the background, or one "sigmoid" a word.
        federated_loss: "off", "sampled" or "verified"; see `TextBoxPredictor`.
        federated_classes: classes that count in "sampled", at least.
        distillation: "off"; "shared" (ViLD: the text-classified head also learns the image tower's embeddings of crops
            of proposals); "ensemble" (a second head learns them, and both are fused).
        distillation_weight: factor on the distillation loss (ViLD: 0.5 to 2).
        distillation_regions: proposals, or regions from files, distilled in a picture, at most.
        distillation_box_scales: the embeddings of crops of these sizes, relative to the box, are averaged; their side
            in pixels is vlm_crop_size.
        vlm_mode: map for the image-text score: "backbone" (the detector's own), "frozen_copy" (a copy of the
            pretrained tower with windows in all blocks but the last), "crops" (no map: the pretrained tower on each
            proposal's own crop, as in ViLD), "off" (no fusion).
        vlm_scale: factor on the image-text cosine; None takes exp(logit_scale) of the image-text model.
        vlm_output_size: side of the grid averaged in a region.
        vlm_crop_size: side in pixels of the crops of "crops"; 0: the size that the towers were trained at last.
        vlm_box_scale: factor on the region for the image-text score.
        vlm_background: the image-text score's softmax has the empty prompt as its background, as F-VLM's has; off, it
            is over the words alone, whose scores then say which word fits best, not whether any does.
        alpha, beta: fusion weights of the image-text score for base and novel classes.
        objectness_delta: exponent of the objectness factor.
        detector_temperature: the detector's logits are divided by it at inference; 1 leaves them (tools/sweep_scores.py
            finds it; the image-text score's is 1 / vlm_scale).
        nms_threshold, score_threshold, detections_per_image: inference settings.
    """

    image_size: int = 320
    window_size: int = 5
    global_blocks: int = 4
    freeze_backbone: bool = False
    gradient_checkpointing: bool = False
    pyramid_channels: int = 64
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0)
    proposals: str = "standard"
    rpn_num_conv: int = 1
    rpn_nms_thresholds: tuple[float, float] = (0.7, 0.7)
    rpn_quality_target: str = "centerness"
    rpn_box_coding: str = "distances"
    rpn_fill_background: bool = False
    rpn_batch_size: int = 64
    rpn_pre_nms_topk: tuple[int, int] = (200, 100)
    rpn_post_nms_topk: tuple[int, int] = (100, 60)
    roi_batch_size: int = 32
    box_num_conv: int = 1
    box_conv_dim: int = 64
    box_fc_dim: int = 256
    box_smooth_l1_beta: float = 0.0
    mask_on: bool = True
    mask_num_conv: int = 2
    mask_conv_dim: int = 64
    classifier_scale: float = 50.0
    learn_classifier_scale: bool = True
    background: str = "learned"
    background_weight: float = 0.9
    classification: str = "softmax"
    federated_loss: str = "off"
    federated_classes: int = 50
    distillation: str = "off"
    distillation_weight: float = 0.5
    distillation_regions: int = 32
    distillation_box_scales: tuple[float, ...] = (1.0, 1.5)
    vlm_mode: str = "backbone"
    vlm_scale: float | None = None
    vlm_output_size: int = 7
    vlm_crop_size: int = 0
    vlm_box_scale: float = 1.0
    vlm_background: bool = False
    alpha: float = 0.35
    beta: float = 0.65
    objectness_delta: float = 0.0
    detector_temperature: float = 1.0
    nms_threshold: float = 0.5
    score_threshold: float = 0.0
    detections_per_image: int = 300

    def __post_init__(self) -> None:
        choices = {"vlm_mode": VLM_MODES, "background": BACKGROUNDS, "distillation": DISTILLATIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if self.background == "empty_prompt" and self.classification == "sigmoid":
            raise ValueError("background 'empty_prompt' has no use with sigmoid classification; set it to 'learned'")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it is on or off; choose true or false")
        for name, values in RANGES.items():
            check_setting(name, getattr(self, name))
            if values.count is not None:
                setattr(self, name, tuple(getattr(self, name)))  # YAML and LazyConfig bring lists

    @classmethod
    def from_dict(cls, values: dict) -> "DetectorConfig":
        """Build from a plain dict; an unknown key is a ValueError that names it."""
        unknown = sorted(map(str, set(values) - {f.name for f in fields(cls)}))
        if unknown:
            raise ValueError(f"unknown detector field(s) {', '.join(unknown)}; known are the fields of DetectorConfig")
        try:
            return cls(**values)
        except TypeError as error:  # a text where a number is compared, a number where a list is taken apart
            raise ValueError(f"a detector field has a value of the wrong type ({error}); correct it") from error
