"""RECLIP, ViT-L/16, on LVIS v1: trained on the 866 base classes, measured on all 1,203 (the 337 rare are novel).

    python tools/prepare_data.py lvis --root data/lvis
    torchrun --nproc-per-node 8 tools/train_net.py --config configs/ovd/reclip_vit_l16_lvis.py train.batch_size=64

The batch at hand scales learning rate and steps. Needs the checkpoint of
configs/pretrain/reclip_l16_64px_550k_ft20k.yaml or of any other average-pooled ViT-L/16 (`model.image_text=FOLDER`).
Hardware and time: not yet measured. Expected numbers: not yet measured; quoted from the paper: 32 mask APr
(arXiv 2304.06028v2, pretrained on private data).
"""

from .common.lvis_data import data, evaluation
from .common.published_model import model
from .common.published_train import optimizer, schedule, text, train

model.image_text = "runs/reclip_l16_64px_550k_ft20k/checkpoint"
train.output = "runs/reclip_vit_l16_lvis"
