"""Fine-tuning: it starts from a detector, mixes data, keeps the words known before, and can go part of the way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ovd.detector import read_detector, save_detector
from ovd.detector_folder import read_prompting
from ovd.engine import retention, trainer
from ovd.engine.finetune import joined_names, load_for_training
from ovd.engine.interpolation import interpolate_detectors, interpolate_states
from ovd.engine.lazy_config import load_config
from ovd.engine.run_text import run_prompting
from ovd.engine.step import DetectorTrainer
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import build_detector
from ovd.text.embeddings import Prompting
from pretrain.config import ConfigError

SMALL = {
    "image_size": 96, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16, "mask_conv_dim": 16,
    "roi_batch_size": 8,
}  # fmt: skip


@pytest.fixture
def detector(tmp_path, image_text_folder) -> Path:
    torch.manual_seed(1)
    model = build_detector(DetectorConfig(**SMALL), image_text_folder)
    return save_detector(tmp_path / "before", model, image_text_folder, base_names=["cat", "dog"])


@pytest.fixture
def own(tmp_path, write) -> Path:
    """A COCO file of wolves alone: no frequencies, no lists of absent classes."""
    content = json.loads(write("own", 3).read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1193]
    content["categories"] = [{"id": 5, "name": "Wolf"}]
    for a in content["annotations"]:
        a["category_id"] = 5
    content["images"] = [{k: v for k, v in i.items() if not k.endswith("_ids")} for i in content["images"]]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def configured(tmp_path, detector, own):
    def make(*more: str):
        return load_config(
            "configs/ovd/finetune.py",
            [f"model.detector={detector}", f"data.annotations={own}", f"data.images={tmp_path}",
             f"train.output={tmp_path}/run", "train.max_iter=2", "train.log_every=1", "train.device=cpu",
             "data.train.workers=0", "data.test.workers=0", "data.train.batch_size=2",
             "data.train.mapper.image_size=96", *more],
        )  # fmt: skip

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_coco_file_is_learned_and_the_detector_knows_old_and_new_words(configured, detector, own):
    cfg = configured(f"data.validation={own}")
    folder = trainer.train(cfg)
    before, after = tensors(detector), tensors(folder)
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    assert read_detector(folder)[2] == ["cat", "dog", "Wolf"]
    trained = json.loads((Path(cfg.train.output) / "training.json").read_text())
    assert [c["name"] for c in trained["categories"]] == ["Wolf"]
    results = trainer.evaluate(cfg, folder)
    assert set(results["model"]) == {"bbox", "segm"}


def test_replay_joins_classes_by_name_and_shows_both_sets(configured, write, tmp_path):
    base = write("replayed", 2)
    cfg = configured(f"data.replay.annotations={base}", f"data.replay.images={tmp_path}", "data.replay.share=0.25")
    folder = trainer.train(cfg)
    content = json.loads((Path(cfg.train.output) / "training.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["Wolf", "cat", "dog"]
    assert {i["source"] for i in content["images"]} == {0, 1}
    assert all(Path(i["file_name"]).is_file() for i in content["images"])
    assert read_detector(folder)[2] == ["cat", "dog", "Wolf"]


def test_all_words_compete_when_asked_for(configured):
    cfg = configured("data.words=all", "train.max_iter=1")
    trainer.train(cfg)
    content = json.loads((Path(cfg.train.output) / "training.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["Wolf", "cat", "dog"]


def test_interpolation_writes_what_lies_between(configured, detector):
    cfg = configured("finetune.interpolation=0.25")
    folder = trainer.train(cfg)
    before, after, between = tensors(detector), tensors(folder.parent / "finetuned"), tensors(folder)
    for name, value in between.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])
    assert any(not torch.equal(before[k], between[k]) for k in before)


def test_a_finished_run_takes_another_interpolation_without_training(configured, monkeypatch):
    trained = tensors(trainer.train(configured()))
    monkeypatch.setattr(DetectorTrainer, "run_step", lambda self: pytest.fail("it was trained again"))
    folder = trainer.train(configured("finetune.interpolation=0.5"), resume=True)
    after, between = tensors(folder.parent / "finetuned"), tensors(folder)
    assert all(torch.equal(after[name], value) for name, value in trained.items())
    assert any(not torch.equal(between[name], value) for name, value in trained.items())


def test_a_rate_of_zero_leaves_the_tower_as_it_is(configured, detector):
    before, after = tensors(detector), tensors(trainer.train(configured("optimizer.backbone_lr_factor=0.0")))
    tower = [name for name in before if name.startswith("backbone.net.")]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)


def test_boxes_alone_leave_the_mask_head_as_it_is(configured, detector, own):
    content = json.loads(own.read_text())
    for a in content["annotations"]:
        del a["segmentation"]
    own.write_text(json.dumps(content))
    cfg = configured("data.masks=False", f"data.validation={own}")
    folder = trainer.train(cfg)
    before, after = tensors(detector), tensors(folder)
    masks = [name for name in before if name.startswith("roi_heads.mask_head.")]
    assert masks and all(torch.equal(before[name], after[name]) for name in masks)
    assert read_detector(folder)[0].architecture.mask_on
    assert set(trainer.evaluate(cfg, folder)["model"]) == {"bbox"}  # there is no mask to compare its masks with


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.annotations=", "data.annotations is empty"),
        ("data.words=some", "own or all"),
        ("model.detector=none", "is no detector"),
        ("finetune.interpolation=1.5", "interpolation is 1.5"),
        ("data.replay.share=1.0", "data.replay.share is 1.0"),
        ("model.architecture.freeze_backbone=True", "backbone_lr_factor to 0"),
        ("data.test.mapper.image_size=128", "data.test.mapper.image_size is 128, but the detector was made for 96"),
        ("data.train.mapper.with_masks=False", "data.train.mapper.with_masks is False"),
        ("evaluation.fixed_ap=True", "keeps 300 a picture"),
    ],
)
def test_mistakes_are_named(configured, own, override, message, monkeypatch):
    monkeypatch.setattr(trainer, "base_vocabulary", lambda *_: pytest.fail("words were embedded"))
    with pytest.raises(ConfigError, match=message):
        trainer.train(configured(f"data.replay.annotations={own}", f"data.validation={own}", override))


def test_settings_of_an_evaluation_that_is_not_made_are_free(configured):
    assert trainer.train(configured("evaluation.fixed_ap=True", "train.max_iter=1")).is_dir()


def test_a_change_that_loses_the_trained_tower_is_refused(detector):
    with pytest.raises(ConfigError, match="backbone_lr_factor to 0"):
        load_for_training(detector, {"freeze_backbone": True})
    with pytest.raises(ValueError, match="does not fit"):
        load_for_training(detector, {"box_fc_dim": 64})


def test_the_ends_of_an_interpolation_are_the_detectors_to_the_bit():
    before, after = {"w": torch.randn(3), "n": torch.tensor(1)}, {"w": torch.randn(3), "n": torch.tensor(2)}
    assert torch.equal(interpolate_states(before, after, 0)["w"], before["w"])
    assert torch.equal(interpolate_states(before, after, 1)["w"], after["w"])
    half = interpolate_states(before, after, 0.5)
    np.testing.assert_allclose(half["w"], (before["w"] + after["w"]) / 2, rtol=1e-6)
    assert half["n"] == 2
    with pytest.raises(ValueError, match="not of one architecture"):
        interpolate_states(before, {"w": torch.zeros(4), "n": torch.tensor(0)}, 0.5)


def test_detectors_on_other_image_text_models_are_not_mixed(detector, image_text, tmp_path):
    from pretrain.modeling.checkpoint import WEIGHTS_FILE

    other = tmp_path / "other"
    model, _, names = read_detector(detector)
    save_detector(other, model, detector / "image_text", base_names=names)
    weights = other / "image_text" / WEIGHTS_FILE
    changed = {name: value + 1 if value.is_floating_point() else value for name, value in load_file(weights).items()}
    from safetensors.torch import save_file

    save_file(changed, weights)
    with pytest.raises(ValueError, match="different image-text models"):
        interpolate_detectors(detector, other, 0.5, tmp_path / "mixed")


def test_a_detector_is_asked_trained_and_sized_as_it_was_before(configured, image_text_folder, tmp_path, monkeypatch):
    prompting = Prompting(("a photo of the {}.",), False)
    model = build_detector(DetectorConfig(**SMALL), image_text_folder)
    save_detector(tmp_path / "before", model, image_text_folder, base_names=["cat", "dog"], prompting=prompting)
    cfg = configured("finetune.interpolation=0.5", "data.train.mapper.image_size=0")
    sizes, made = [], trainer.made_for
    monkeypatch.setattr(trainer, "made_for", lambda *a: (sizes.append(r := made(*a)), r)[1])
    assert run_prompting(cfg) == prompting and read_prompting(trainer.train(cfg)) == prompting
    assert [loader.mapper.image_size for loader in sizes] == [96]
    # The words of a data set are asked for in the same way.
    embedded, embed = [], retention.embed_vocabulary
    monkeypatch.setattr(retention, "embed_vocabulary", lambda *a: (embedded.append(a[2:]), embed(*a))[1])
    retention.detect_categories(tmp_path / "before", cfg.data.train_annotations, "", limit=1)
    assert embedded == [(prompting.templates, False)]
    cfg.text.templates, cfg.text.use_synonyms = ["{}"], True
    assert run_prompting(cfg) == Prompting(("{}",), True)


def test_words_that_read_the_same_are_one():
    assert joined_names(["fire_engine", "cat"], ["Cat", "fire engine", "wolf"]) == ["fire_engine", "cat", "wolf"]
