"""The detector of F-VLM, RO-ViT, DITO and RECLIP at full size, as their authors' public configurations describe it.

[M] marks what is widely repeated for RECLIP but not verified against its text; all of it is a field to override. RECLIP
released no code: what is not marked is its co-authors' published detector (F-VLM, DITO).
"""

from detectron2.config import LazyCall as L

from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import build_detector

model = L(build_detector)(
    architecture=L(DetectorConfig)(
        image_size=1024,
        window_size=16,  # tokens: 4 x 4 windows of the 64 x 64 grid
        global_blocks=4,  # evenly spaced, the last included
        freeze_backbone=False,
        gradient_checkpointing=True,
        pyramid_channels=256,
        proposals="localization",  # centerness
        # The co-authors' code fills the sample up with background at quality 0, OLN's paper samples none. On the
        # miniature, ranking was worse without (recall@20 .00 to .14 against .14 to .21, 160 to 400 steps, one seed).
        rpn_fill_background=True,
        anchor_sizes=[32.0, 64.0, 128.0, 256.0],  # 8 times the stride
        rpn_num_conv=2,
        rpn_batch_size=256,
        rpn_pre_nms_topk=[2000, 1000],  # [M] in training
        rpn_post_nms_topk=[1000, 1000],  # [M] in training
        rpn_nms_thresholds=[0.7, 1.0],  # no suppression of proposals at test
        roi_batch_size=512,
        box_num_conv=4,
        box_conv_dim=256,
        box_fc_dim=1024,
        mask_on=True,
        mask_num_conv=4,
        mask_conv_dim=256,
        box_smooth_l1_beta=1.0,  # Huber; [M] its threshold, which is that code's usual one
        # Cosine / 0.01, times a learned factor that starts at 1. Scales are clipped at 100 as CLIP clips its own (the
        # exponential of the learned logarithm), so from here it can only fall; [M] whether the family's may rise.
        classifier_scale=100.0,
        learn_classifier_scale=True,
        classification="softmax",  # "sigmoid" with federated_loss="verified" uses LVIS's lists of absent classes
        background="empty_prompt",
        background_weight=0.9,
        vlm_mode="backbone",  # [M] "frozen_copy" is DITO's option
        vlm_output_size=14,
        vlm_box_scale=0.7,  # F-VLM's option against context; 1 is as good on the miniature (studies/detector_mini.md)
        vlm_scale=100.0,  # cosine / 0.01
        vlm_background=True,  # the softmax is over the background too, which fusion then takes from the detector
        alpha=0.35,
        beta=0.65,
        objectness_delta=3.0,  # [M] DITO's value
        detector_temperature=1.0,
        nms_threshold=0.5,
        score_threshold=0.0,
        detections_per_image=300,
    ),
    image_text="",  # a checkpoint folder
)
