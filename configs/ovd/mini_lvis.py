"""The detector of `make demo`: mini-LVIS, base classes only, two CPU cores.

    python tools/train_net.py --config configs/ovd/mini_lvis.py
    python tools/train_net.py --config configs/ovd/mini_lvis.py --eval-only

Needs runs/pretrain_mini/checkpoint (configs/pretrain/reclip_mini.yaml). Cost and numbers: the table in README.md.
"""

from detectron2.config import LazyCall as L

from ovd.engine.defaults import build_optimizer, warmup_cosine

from .common.mini_data import data, evaluation
from .common.model import model
from .common.train import text, train

model.image_text = "runs/pretrain_mini/checkpoint"
model.architecture.detections_per_image = 50  # a scene holds at most 6 objects; masks are most of the cost
train.max_iter = 300

optimizer = L(build_optimizer)(lr=1e-3, backbone_lr_factor=0.2, weight_decay=0.05)
schedule = L(warmup_cosine)(max_iter="${train.max_iter}", warmup_iters=30)
