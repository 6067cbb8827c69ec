"""OV-COCO from your own download below data/coco (`python tools/prepare_data.py coco --root data/coco`)."""

from .lvis_data import data, evaluation

data.train_annotations = "data/coco/annotations/ovcoco_train_base.json"
data.image_root = "data/coco"
data.lvis_ids = False
data.train.repeat_threshold = 0.0
evaluation.annotations = "data/coco/annotations/ovcoco_val.json"
evaluation.protocol = "coco"
