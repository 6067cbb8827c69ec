"""RECLIP's detector on OV-COCO: trained on 48 classes of COCO 2017, 17 novel ones measured with them (AP50).

    python tools/prepare_data.py coco --root data/coco
    torchrun --nproc-per-node 8 tools/train_net.py --config configs/ovd/reclip_vit_l16_coco.py train.batch_size=64

The family's OV-COCO schedule is not published in its code: 11,250 steps of 128 pictures and the fusion weights are
[M] placeholders to be tuned on your own validation part.
Hardware and time: not yet measured. Expected numbers: not yet measured; quoted for the family: RO-ViT L/16 33.0 novel
AP50.
"""

from .common.coco_data import data, evaluation
from .common.published_model import model
from .common.published_train import optimizer, schedule, text, train

model.image_text = "runs/reclip_l16_64px_550k_ft20k/checkpoint"
train.output = "runs/reclip_vit_l16_coco"
train.batch_size = 128
train.max_iter = "${scale_steps:11250,128,${train.batch_size}}"
