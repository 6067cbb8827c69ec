"""LVIS v1 from your own download below data/lvis (`python tools/prepare_data.py lvis --root data/lvis`)."""

from detectron2.config import LazyCall as L

from ovd.data.mapper import OpenVocabularyMapper
from ovd.engine.defaults import build_test_loader, build_train_loader

data = dict(
    train_annotations="data/lvis/lvis_v1_train_base.json",
    image_root="data/lvis",
    lvis_ids=True,  # the leak check covers all rare classes of LVIS v1
    train=L(build_train_loader)(
        annotations="${data.train_annotations}",
        image_root="${data.image_root}",
        mapper=L(OpenVocabularyMapper)(
            is_train=True,
            image_size="${model.architecture.image_size}",
            scale_range=(0.1, 2.0),
            colour_jitter=0.0,
            with_masks=True,  # False, with model.architecture.mask_on=False, where the annotations are boxes only
            regions="",  # to distil: folder of tools/prepare_data.py regions; empty: made from each picture
        ),
        batch_size="${train.batch_size}",
        workers=8,
        repeat_threshold=0.001,  # of the LVIS paper
        seed="${train.seed}",
    ),
    test=L(build_test_loader)(
        annotations="${evaluation.annotations}",
        image_root="${data.image_root}",
        mapper=L(OpenVocabularyMapper)(is_train=False, image_size="${model.architecture.image_size}"),
        batch_size=1,
        workers=4,
    ),
)

evaluation = dict(
    annotations="data/lvis/lvis_v1_val.json",
    fusion=dict(),  # alpha, beta, objectness_delta, detector_temperature, where not the checkpoint's
    inference=dict(),  # likewise nms_threshold, score_threshold, detections_per_image
    control=False,
    protocol="lvis",
    precision="float32",  # bfloat16, float16 (GPU), or auto: what the device has
    samples=0,  # resamples of the pictures for confidence intervals, e.g. 1000
    fixed_ap=False,  # also the best 10,000 detections a class; wants inference.detections_per_image=1000
)
