"""The published mini config on tiny data: pictures of coloured squares, a random image-text model, a few steps."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_tools

from ovd.engine.lazy_config import load_config

CONFIG = "configs/ovd/mini_lvis.py"
# Real LVIS ids and names: the leak check knows all of LVIS's rare classes. Squares of these colours are the objects.
CATEGORIES = [
    {"id": 225, "name": "cat", "frequency": "f", "colour": (250, 60, 60)},
    {"id": 378, "name": "dog", "frequency": "f", "colour": (60, 250, 60)},
    {"id": 1193, "name": "wolf", "frequency": "r", "colour": (60, 60, 250)},
]


def write_data(folder: Path, split: str, categories: list[dict], pictures: int, negatives: list[int] = ()) -> Path:
    """An LVIS file of 96 px pictures with two coloured squares each."""
    rng = np.random.default_rng(len(split) + pictures)
    images, annotations = [], []
    for number in range(1, pictures + 1):
        pixels = np.full((96, 96, 3), 30, np.uint8)
        for x in (6, 54):
            category = categories[rng.integers(len(categories))]
            side, y = int(rng.integers(24, 36)), int(rng.integers(4, 50))
            pixels[y : y + side, x : x + side] = category["colour"]
            mask = np.zeros((96, 96), np.uint8)
            mask[y : y + side, x : x + side] = 1
            code = mask_tools.encode(np.asfortranarray(mask))
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": category["id"], "area": side * side,
                "bbox": [x, y, side, side], "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
            })  # fmt: skip
        Image.fromarray(pixels).save(folder / f"{split}{number}.png")
        images.append({
            "id": number, "file_name": f"{split}{number}.png", "height": 96, "width": 96,
            "neg_category_ids": list(negatives), "not_exhaustive_category_ids": [],
        })  # fmt: skip
    described = [
        {k: v for k, v in c.items() if k != "colour"}
        | {"synonyms": [c["name"]], "def": "", "synset": "", "image_count": 1, "instance_count": 1}
        for c in categories
    ]
    path = folder / f"{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": described}))
    return path


@pytest.fixture
def config_overrides(tmp_path, image_text_folder) -> list[str]:
    """What makes configs/ovd/mini_lvis.py small; the run is in tmp_path/run."""
    train = write_data(tmp_path, "train", CATEGORIES[:2], 6)
    test = write_data(tmp_path, "test", CATEGORIES, 4)
    return [
        f"model.image_text={image_text_folder}", f"data.train_annotations={train}",
        f"evaluation.annotations={test}", f"data.train.image_root={tmp_path}",
        f"data.test.image_root={tmp_path}", "data.train.workers=0",
        "data.test.workers=0", "data.train.batch_size=2", "data.train.mapper.image_size=96",
        "data.test.mapper.image_size=96", "model.architecture.image_size=96", "model.architecture.roi_batch_size=8",
        f"train.output={tmp_path}/run", "train.max_iter=4", "train.log_every=1", "train.checkpoint_every=2",
        "train.device=cpu",
    ]  # fmt: skip


@pytest.fixture
def config(config_overrides):
    """The same, loaded."""
    return load_config(CONFIG, config_overrides)


@pytest.fixture
def write(tmp_path):
    """`write(split, number of categories, pictures=6, …)`: a data file of the first classes (two base, one novel)."""

    def make(split: str, categories: int, pictures: int = 6, **options) -> Path:
        return write_data(tmp_path, split, CATEGORIES[:categories], pictures, **options)

    return make
