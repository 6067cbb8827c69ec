"""RECLIP's recipe with ViT-B/16 on LVIS v1.

    python tools/prepare_data.py lvis --root data/lvis
    torchrun --nproc-per-node 8 tools/train_net.py --config configs/ovd/reclip_vit_b16_lvis.py train.batch_size=128

Needs the checkpoint of configs/pretrain/reclip_b16_64px_550k_ft20k.yaml (`model.image_text=FOLDER` for another).
Hardware and time: not yet measured. Expected numbers: not yet measured; the RECLIP paper's are for ViT-L. Of the
family, RO-ViT B/16 is quoted with 28.0 mask APr ([M], other pretraining data).
"""

from .common.lvis_data import data, evaluation
from .common.published_model import model
from .common.published_train import optimizer, schedule, text, train

model.image_text = "runs/reclip_b16_64px_550k_ft20k/checkpoint"
train.output = "runs/reclip_vit_b16_lvis"
