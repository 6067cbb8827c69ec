"""The detector kept in this repository (ovd/weights/mini): mini_lvis.py on the kept towers, longer.

    python tools/train_net.py --config configs/ovd/mini_lvis_kept.py

Needs runs/pretrain_mini_kept/checkpoint. Cost and numbers: ovd/weights/mini/README.md.
"""

from .mini_lvis import data, evaluation, model, optimizer, schedule, text, train

model.image_text = "runs/pretrain_mini_kept/checkpoint"
train.output = "runs/detector_mini_kept"
train.max_iter = 2200
train.half = True
