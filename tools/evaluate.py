"""Zero-shot accuracy or retrieval of any open_clip folder.

python tools/evaluate.py --checkpoint runs/pretrain_mini/checkpoint
python tools/evaluate.py --checkpoint DIR --task imagenet-r --data FOLDER
python tools/evaluate.py --checkpoint DIR --task folder --data FOLDER --names names.txt
python tools/evaluate.py --checkpoint DIR --task retrieval --captions dataset_coco.json --data FOLDER

table: a CSV or Parquet of images and captions, whose classes are all its distinct captions. folder: one sub-folder a
class. ImageNet's: sub-folders named by WordNet id (-V2: or by number). retrieval: Flickr30K or COCO, Karpathy's JSON.
hits: flat hit@K on a table whose images may have several labels, and classes several names. noise: how probable the
model finds pairs of random batches of a table, and pairs that are none.
Images are resized or cropped as the checkpoint's own preprocessing says.
--space h judges clip-rocket's projectors, ensemble the mean similarity of both spaces, at the run's ensemble_weight.
"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.commands.evaluate import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
