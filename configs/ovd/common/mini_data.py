"""Loaders of the miniature: base-only training scenes, test scenes by a vendor that training never saw."""

from detectron2.config import LazyCall as L

from ovd.data.mapper import OpenVocabularyMapper
from ovd.engine.defaults import build_test_loader, build_train_loader

data = dict(
    train_annotations="data/mini/mini_lvis_train.json",
    lvis_ids=True,  # category ids are LVIS v1's: the leak check then covers all of its rare classes
    train=L(build_train_loader)(
        annotations="${data.train_annotations}",
        image_root="data/mini",
        mapper=L(OpenVocabularyMapper)(
            is_train=True,
            image_size="${model.architecture.image_size}",
            scale_range=(0.6, 1.4),
            with_masks=True,
            regions="",  # to distil: folder of tools/prepare_data.py regions; empty: made from each picture
        ),
        batch_size=4,
        workers=1,
        seed="${train.seed}",
    ),
    test=L(build_test_loader)(
        annotations="${evaluation.annotations}",
        image_root="data/mini",
        mapper=L(OpenVocabularyMapper)(is_train=False, image_size="${model.architecture.image_size}"),
        batch_size=4,
        workers=1,
    ),
)

evaluation = dict(
    annotations="data/mini/mini_lvis_test.json",
    # alpha, beta, objectness_delta, detector_temperature, where they should differ from the checkpoint's
    fusion=dict(),
    inference=dict(),  # likewise nms_threshold, score_threshold, detections_per_image
    control=True,  # also with the text embeddings shuffled
    protocol="lvis",  # or coco
    precision="float32",  # bfloat16, float16 (GPU), or auto: what the device has
    samples=0,  # resamples of the pictures for confidence intervals, e.g. 1000
    fixed_ap=False,  # also the best 10,000 detections a class; wants inference.detections_per_image=1000
)
