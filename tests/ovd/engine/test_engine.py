"""The detector's engine: configs, optimiser, leak check, blindness to novel classes, resume, control."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_tools
from safetensors.torch import load_file

from ovd.engine import trainer
from ovd.engine.defaults import build_optimizer, warmup_cosine
from ovd.engine.evaluate import derangement, results_table
from ovd.engine.lazy_config import load_config
from ovd.modeling.rcnn import build_detector
from pretrain.config import ConfigError

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
def config(tmp_path, image_text_folder):
    """The published mini config on tiny data, a few steps."""
    train = write_data(tmp_path, "train", CATEGORIES[:2], 6)
    test = write_data(tmp_path, "test", CATEGORIES, 4)
    return load_config(
        CONFIG,
        [
            f"model.image_text={image_text_folder}", f"data.train_annotations={train}",
            f"evaluation.annotations={test}", f"data.train.image_root={tmp_path}",
            f"data.test.image_root={tmp_path}", "data.train.workers=0",
            "data.test.workers=0", "data.train.batch_size=2", "data.train.mapper.image_size=96",
            "data.test.mapper.image_size=96", "model.architecture.image_size=96", "model.architecture.roi_batch_size=8",
            f"train.output={tmp_path}/run", "train.max_iter=4", "train.log_every=1", "train.checkpoint_every=2",
            "train.device=cpu",
        ],
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.maxiter=3"], "did you mean 'max_iter'"),
        (["modle.image_text=x"], "did you mean 'model'"),
        (["train.max_iter"], "not of the form key=value"),
    ],
)
def test_an_unknown_field_names_the_nearest(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, overrides)


def test_a_missing_or_broken_config_gets_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="did you mean .*mini_lvis.py"):
        load_config("configs/ovd/mini_lvs.py")
    broken = tmp_path / "broken.py"
    broken.write_text("model = (")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(broken)


def test_every_parameter_is_in_one_group_with_its_rate(image_text):
    model = build_detector(image_text=image_text)
    optimizer = build_optimizer(model, lr=1.0, backbone_lr_factor=0.25, weight_decay=0.1)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(settings)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in settings
            continue
        rate, decay = settings[id(parameter)]
        assert rate == (0.25 if name.startswith("backbone.net.") else 1.0), name
        assert decay == (0.0 if parameter.ndim <= 1 or name.endswith(("pos_embed", "reg_token")) else 0.1), name


def test_the_rate_warms_up_and_ends_at_zero():
    schedule = warmup_cosine(100, 10)
    assert schedule(0.0) == pytest.approx(0.01)
    assert schedule(0.05) == pytest.approx((0.01 + 1) / 2)
    assert schedule(0.1) == pytest.approx(1.0)
    assert schedule(0.55) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert schedule(0.999999) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("size", [2, 3, 50])
def test_the_control_gives_no_class_its_own_text(size):
    order = derangement(size)
    assert sorted(order) == list(range(size))
    assert not (order == np.arange(size)).any()


def test_training_leaves_a_run_folder_that_explains_itself_and_a_detector(config):
    folder = trainer.train(config)
    run = Path(config.train.output)
    for name in ("config.yaml", "command.txt", "about.json", "leak_check.json", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0, name
    report = json.loads((run / "leak_check.json").read_text())
    assert report["counts"]["novel_categories"] == 337  # all of LVIS's rare classes, not only those evaluated
    results = trainer.evaluate(config, folder)
    assert set(results) == {"model", "shuffled text"}
    assert {"AP", "APr", "APf"} <= results["model"]["segm"].keys()
    assert "shuffled text, box" in results_table(results)
    assert (run / "summary.md").is_file()


def test_resuming_gives_the_weights_of_a_run_without_a_stop(config, tmp_path):
    straight = weights(trainer.train(config))
    stopped = copy.deepcopy(config)
    stopped.train.output = str(tmp_path / "stopped")
    stopped.schedule.max_iter = 4
    stopped.train.max_iter = 2
    trainer.train(stopped)
    with pytest.raises(ValueError, match="--resume"):
        trainer.train(stopped)
    stopped.train.max_iter = 4
    resumed = weights(trainer.train(stopped, resume=True))
    # The sampler starts anew, so only the count of steps, not the order of pictures, is the same.
    assert resumed.keys() == straight.keys()
    steps = [json.loads(line)["iteration"] for line in (tmp_path / "stopped" / "metrics.jsonl").open()]
    assert steps == [0, 1, 2, 3]


def test_a_novel_class_in_the_training_file_stops_the_run_before_its_first_step(config, tmp_path):
    leaking = write_data(tmp_path, "leak", CATEGORIES, 6)
    config.data.train_annotations = str(leaking)
    with pytest.raises(trainer.LeakError, match="filter_to_base"):
        trainer.train(config)
    assert not (Path(config.train.output) / "metrics.jsonl").exists()
    assert json.loads((Path(config.train.output) / "leak_check.json").read_text())["findings"]


def test_novel_negatives_in_the_training_file_are_a_leak_too(config, tmp_path):
    config.data.train_annotations = str(write_data(tmp_path, "negative", CATEGORIES[:2], 6, negatives=[1193]))
    with pytest.raises(trainer.LeakError):
        trainer.train(config)


def test_a_novel_word_among_a_base_classs_synonyms_is_a_leak_when_synonyms_are_embedded(config, tmp_path):
    planted = json.loads(Path(config.data.train_annotations).read_text())
    planted["categories"][0]["synonyms"].append("wolf")
    path = tmp_path / "synonym.json"
    path.write_text(json.dumps(planted))
    config.data.train_annotations = str(path)
    with pytest.raises(trainer.LeakError, match="wolf"):
        trainer.check_training_data(config, tmp_path)
    config.text.use_synonyms = False
    trainer.check_training_data(config, tmp_path)


def test_novel_annotations_that_are_filtered_out_leave_no_trace_in_the_weights(config, tmp_path):
    from ovd.data.lvis import filter_to_base

    clean = json.loads(Path(config.data.train_annotations).read_text())
    planted = copy.deepcopy(clean)
    planted["categories"].append({**planted["categories"][0], "id": 1193, "name": "wolf", "frequency": "r"})
    planted["annotations"].append({**planted["annotations"][0], "id": 999, "category_id": 1193})
    planted["images"][0]["neg_category_ids"] = [1193]
    filtered, _ = filter_to_base(planted)
    path = tmp_path / "filtered.json"
    path.write_text(json.dumps(filtered))
    first = weights(trainer.train(config))
    config.train.output = str(tmp_path / "second")
    config.data.train_annotations = str(path)
    assert same(first, weights(trainer.train(config)))


def test_an_unknown_fusion_setting_is_named(config):
    folder = trainer.train(config)
    config.evaluation.fusion = {"gamma": 1}
    with pytest.raises(ValueError, match="evaluation.fusion.gamma"):
        trainer.evaluate(config, folder)
