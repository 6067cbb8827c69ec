"""The published schedule: 46,100 steps of 256 pictures; `train.batch_size` scales rates and steps in proportion.

SGD at 0.18 for 256 pictures, 1,000 steps of warm-up, a tenth at 80, 90 and 95 % of the steps (DITO's configuration;
[M] for RECLIP). A number given for `train.max_iter`, `optimizer.lr` or `schedule.warmup_iters` is taken as it is.
"""

from detectron2.config import LazyCall as L

from ovd.engine.defaults import build_sgd, warmup_steps
from pretrain.evaluation.prompts import imagenet_templates

train = dict(
    output="",
    batch_size=256,
    max_iter="${scale_steps:46100,256,${train.batch_size}}",
    log_every=20,
    checkpoint_every=1000,
    device="auto",
    amp="auto",
    clip_norm=0.0,
    seed=0,
    half=False,
)

optimizer = L(build_sgd)(
    lr="${scale_lr:0.18,256,${train.batch_size}}",
    backbone_lr_factor=0.6,  # DITO; 0.1 in RO-ViT's paper [M]
    weight_decay=1e-4,
    momentum=0.9,  # [M]
)

schedule = L(warmup_steps)(
    max_iter="${train.max_iter}",
    warmup_iters="${scale_steps:1000,256,${train.batch_size}}",
    warmup_factor=0.0178,  # [M] 0.0032 / 0.18, F-VLM's first rate
    milestones=[0.8, 0.9, 0.95],
    gamma=0.1,
)

text = dict(
    templates=imagenet_templates(),  # the 80 of CLIP's ImageNet evaluation, as the family does
    use_synonyms=False,
)
