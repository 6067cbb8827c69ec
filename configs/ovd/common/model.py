"""The miniature's detector as a LazyConfig part: 320 px, 64-channel pyramid, small heads.

Set `model.image_text` to a checkpoint folder of `pretrain`; every field of `DetectorConfig` may be overridden, e.g.
`model.architecture.freeze_backbone=True`.
"""

from detectron2.config import LazyCall as L

from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import build_detector

model = L(build_detector)(
    architecture=L(DetectorConfig)(
        image_size=320,
        window_size=5,
        global_blocks=4,
        freeze_backbone=False,
        pyramid_channels=64,
        anchor_sizes=[32.0, 64.0, 128.0, 256.0],
        proposals="standard",  # or "localization": ranked by centerness, nothing unlabelled pushed down
        rpn_batch_size=64,
        rpn_pre_nms_topk=[200, 100],
        rpn_post_nms_topk=[100, 60],
        roi_batch_size=32,
        box_num_conv=1,
        box_conv_dim=64,
        box_fc_dim=256,
        mask_on=True,
        mask_num_conv=2,
        mask_conv_dim=64,
        classifier_scale=50.0,
        learn_classifier_scale=True,
        background="learned",  # or "empty_prompt"
        background_weight=0.9,
        classification="softmax",  # or "sigmoid", then also federated_loss="sampled" or "verified"
        distillation="off",  # or "shared" (ViLD), "ensemble" (ViLD-ensemble)
        distillation_regions=32,  # drawn in a picture, of its proposals or of data.train.mapper.regions
        vlm_mode="crops",  # the frozen tower on each proposal's crop: best on the validation vendor
        vlm_crop_size=0,  # the size of the towers' last phase
        vlm_box_scale=1.1,
        vlm_scale=None,
        alpha=0.35,
        beta=0.65,
        objectness_delta=0.0,
        detector_temperature=1.0,
    ),
    image_text="runs/pretrain_mini/checkpoint",
)
