"""Fine-tune a detector on your own boxes (any COCO-format file) without losing the words it knows.

    python tools/train_net.py --config configs/ovd/finetune.py model.detector=mini \
        data.annotations=mine.json data.images=pictures train.output=runs/tuned
    python tools/retention.py --before mini --after runs/tuned/detector --annotations GROUND_TRUTH --fine-tuned WORDS

A worked example on photographs, with times and numbers: docs/finetune.md.

What keeps the other words, on the miniature (three seeds, 200 steps on 120 pictures of six words), in points of
box AP that these words gain and the 232 others gain or lose: as it stands here +8.6 and -2.7. With
`finetune.interpolation=0.5` +4.2 and -0.6, and +6.0 and -0.4 if also `optimizer.backbone_lr_factor=1.0`. With
`data.replay`, the set that the detector came from, +5.1 and -0.5; with both +3.0 and +0.1. A lower rate of the tower,
or none, keeps no more than the full one. `data.words="all"` learns most and loses most: +10.3 and -8.3. Rare words kept
their AP in all of these (+0.2 to +1.7), where new and old pictures are drawings. That is no rule: in docs/finetune.md,
on photographs, they lost 4.2 (1.1 to 7.5). What never trains is the image-text score (vlm_mode crops or frozen_copy);
the boxes and the detector's own score, which have a part in rare words too, do. A finished run takes another
interpolation with --resume, without training. All recipes: studies/retention_mini.md.
"""

from detectron2.config import LazyCall as L

from ovd.data.mapper import OpenVocabularyMapper
from ovd.engine.defaults import build_optimizer, build_test_loader, build_train_loader, warmup_cosine
from ovd.engine.finetune import load_for_training, replay_shares

from .common.train import train

model = L(load_for_training)(
    detector="mini",  # a detector's folder, or the name of one that ships
    architecture=dict(),  # fields of DetectorConfig to change, e.g. vlm_mode, alpha
    masks="${data.masks}",
)

data = dict(
    annotations="",  # your COCO or LVIS file
    images="",  # folder of its pictures
    masks=True,  # False where the annotations are boxes only; the mask head then stays as it is
    validation="",  # a file of the same kind; empty: nothing is measured afterwards
    validation_images="${data.images}",
    words="own",  # the classes trained against each other: those of the files, or "all", also the detector's own
    replay=dict(annotations="", images="", share=0.5),  # the set it came from, and its share of the pictures
    train_annotations="${train.output}/training.json",
    lvis_ids=False,
    base_only=False,  # nothing is held back as novel: what is in the file is to be learned
    train=L(build_train_loader)(
        annotations="${data.train_annotations}",
        image_root="",
        # Of size 0: as large as the pictures that the detector was made for.
        mapper=L(OpenVocabularyMapper)(is_train=True, image_size=0, scale_range=(0.6, 1.4), with_masks="${data.masks}"),
        batch_size=4,
        workers=1,
        seed="${train.seed}",
        shares=L(replay_shares)(replay_annotations="${data.replay.annotations}", share="${data.replay.share}"),
    ),
    test=L(build_test_loader)(
        annotations="${evaluation.annotations}",
        image_root="${data.validation_images}",
        mapper=L(OpenVocabularyMapper)(is_train=False, image_size=0),
        batch_size=4,
        workers=1,
    ),
)

evaluation = dict(
    annotations="${train.output}/validation.json",
    fusion=dict(),
    inference=dict(),
    control=False,
    protocol="lvis",
    precision="float32",  # bfloat16, float16 (GPU), or auto: what the device has
    samples=0,
    fixed_ap=False,
)

text = dict(templates=None, use_synonyms=None)  # None: as the detector was trained

finetune = dict(
    # 0: the detector before, 1: that after, between: the mean of their weights (WiSE-FT). 1.0, since who fine-tunes
    # asks for the new words first, and half of the way keeps only half to seven tenths of what they gained. Where the
    # other words count as much, take 0.5, which the study recommends: they lose 0.4 to 0.6 points instead of 2.7. That
    # needs no new training: the same command again with --resume finetune.interpolation=0.5.
    interpolation=1.0,
)

train.output = "runs/finetuned"
train.max_iter = 300

optimizer = L(build_optimizer)(lr=2e-4, backbone_lr_factor=0.1, weight_decay=0.05)
schedule = L(warmup_cosine)(max_iter="${train.max_iter}", warmup_iters=30)
