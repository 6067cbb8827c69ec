"""What a config says reaches training, evaluation and the detector's folder; what would reach nothing is refused."""

import json
import logging
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from ovd.commands import train as command
from ovd.engine import evaluate, trainer
from ovd.engine.lazy_config import load_config
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import OpenVocabularyRCNN
from ovd.text import embeddings
from pretrain.config import ConfigError
from pretrain.modeling.checkpoint import load_checkpoint

CONFIG = "configs/ovd/mini_lvis.py"


@pytest.mark.parametrize("path", sorted(Path("configs/ovd").glob("*.py")), ids=str)
def test_every_field_of_the_architecture_may_be_overridden_in_every_config(path):
    default = DetectorConfig()
    for field in fields(DetectorConfig):
        cfg = load_config(path, [f"model.architecture.{field.name}={json.dumps(getattr(default, field.name))}"])
        expected = getattr(default, field.name)
        assert cfg.model.architecture[field.name] == (list(expected) if isinstance(expected, tuple) else expected)
    with pytest.raises(ConfigError, match="did you mean 'federated_loss'"):
        load_config(path, ["model.architecture.federated_los=verified"])


def test_what_a_config_calls_may_be_given_arguments_that_it_does_not_write_down(config_overrides):
    cfg = load_config(CONFIG, [*config_overrides, "data.train.mapper.colour_jitter=0.1"])
    jitters = [a for a in instantiate(cfg.data.train.mapper).augmentations.augs if "Contrast" in type(a).__name__]
    assert [(round(a.intensity_min, 3), round(a.intensity_max, 3)) for a in jitters] == [(0.9, 1.1)]
    cfg = load_config(CONFIG, ["data.train._target_=ovd.engine.defaults.build_test_loader"])  # docs/security.md
    assert cfg.data.train._target_ == "ovd.engine.defaults.build_test_loader"
    with pytest.raises(ConfigError, match="did you mean 'colour_jitter'"):
        load_config(CONFIG, ["data.train.mapper.color_jitter=0.1"])


def test_an_override_that_evaluation_alone_would_ignore_is_refused(config_overrides, capsys):
    given = ["--config", CONFIG, "--eval-only", *config_overrides]
    assert any(override.startswith("model.architecture.") for override in given)
    assert command.main(given) != 0
    assert "use evaluation.fusion" in capsys.readouterr().err


def test_a_detector_to_evaluate_is_a_folder_or_a_name_that_ships(monkeypatch, capsys):
    evaluated = []
    monkeypatch.setattr(trainer, "evaluate", lambda cfg, folder: evaluated.append(folder) or {})
    monkeypatch.setattr(evaluate, "results_table", lambda _: "")
    given = ["--config", CONFIG, "--eval-only", "--detector"]
    assert command.main([*given, "mini"]) == 0 and command.main([*given, "ovd/weights/mini"]) == 0
    assert [folder.resolve() for folder in evaluated] == [Path("ovd/weights/mini").resolve()] * 2
    assert command.main([*given, "maxi"]) == 1 and len(evaluated) == 2
    assert "'maxi' is no detector: give a folder with config.yaml, or one that ships (mini)" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_evaluation_computes_in_the_precision_asked_for_and_embeds_texts_in_float32(config, monkeypatch, precision):
    folder, low = trainer.train(config), {}
    inference, embed = OpenVocabularyRCNN.inference, embeddings._embed_groups

    def watched_inference(self, batch, *rest):
        low["network"] = torch.is_autocast_enabled("cpu")
        return inference(self, batch, *rest)

    def watched_embed(*arguments):
        low["text"] = torch.is_autocast_enabled("cpu")
        return embed(*arguments)

    monkeypatch.setattr(OpenVocabularyRCNN, "inference", watched_inference)
    monkeypatch.setattr(embeddings, "_embed_groups", watched_embed)
    config.evaluation.control, config.evaluation.precision = False, precision
    assert set(trainer.evaluate(config, folder)) == {"model"}
    assert low == {"network": precision == "bfloat16", "text": False}
    config.evaluation.precision = "half"
    with pytest.raises(ValueError, match="precision is 'half'; choose one of float32"):
        trainer.evaluate(config, folder)


def test_settings_of_inference_change_what_is_kept(config):
    folder = trainer.train(config)
    config.evaluation.control = False
    found = {}
    for kept in (3, 20):
        config.evaluation.inference = {"detections_per_image": kept}
        trainer.evaluate(config, folder)
        path = Path(config.train.output) / "evaluation" / "model" / "detections.json"
        found[kept] = json.loads(path.read_text())
    assert {len([d for d in found[3] if d["image_id"] == i]) for i in (1, 2, 3, 4)} == {3}
    assert len(found[20]) > len(found[3])
    config.evaluation.inference = {"nms": 0.3}
    with pytest.raises(ConfigError, match="evaluation.inference.nms is no setting of inference: nms_threshold"):
        trainer.evaluate(config, folder)


def test_masks_to_learn_from_and_masks_to_predict_go_together(config, monkeypatch):
    steps = []
    monkeypatch.setattr(trainer, "_run_loop", lambda *_: steps.append(1))
    config.data.train.mapper.with_masks = False
    with pytest.raises(
        ConfigError, match=r"data\.train\.mapper\.with_masks is False, but model\.architecture\.mask_on"
    ):
        trainer.train(config)
    assert not steps
    config.model.architecture.mask_on = False
    folder = trainer.train(config)
    assert steps and not trainer.read_detector(folder)[0].roi_heads.mask_on


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.protocol=cocoo"], r"evaluation\.protocol is 'cocoo': choose lvis or coco"),
        (["evaluation.protocol=coco", "evaluation.fixed_ap=True"], "fixed_ap is of the LVIS protocol"),
        (["evaluation.precision=bf17"], r"evaluation\.precision is 'bf17'; choose one of float32"),
        (["evaluation.samples=-3"], r"evaluation\.samples is -3; give a whole number of at least 0"),
        (["evaluation.samples=null"], r"evaluation\.samples is None"),
        (["evaluation.fixed_ap=perhaps"], r"evaluation\.fixed_ap is 'perhaps', but it is on or off"),
        (["evaluation.fusion=3"], r"evaluation\.fusion is 3: give settings by name, of alpha"),
        (["model.architecture.alpha=3"], r"model\.architecture: alpha is 3, but it is a number between 0 and 1"),
        (["model.architecture.image_size=10"], r"model\.architecture: image_size is 10"),
        (["model.architecture.vlm_mode=crop"], r"model\.architecture: vlm_mode is 'crop'; choose one of backbone"),
        (["evaluation=null"], "evaluation is None: it must be a group of fields"),
        (["model.architecture.anchor_sizes=8"], r"model\.architecture: anchor_sizes is 8"),
    ],
)
@pytest.mark.parametrize("path", [CONFIG, "configs/ovd/finetune.py"])
def test_what_cannot_work_is_refused_as_the_configuration_is_read(path, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)


def test_groups_of_evaluation_may_be_null(config_overrides):
    cfg = load_config(CONFIG, [*config_overrides, "evaluation.fusion=null", "evaluation.inference=null"])
    cfg.train.max_iter, cfg.evaluation.control = 1, False
    assert set(trainer.evaluate(cfg, trainer.train(cfg))) == {"model"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.fixed_ap=True"], r"keeps 300 a picture: add evaluation\.inference\.detections_per_image"),
        (["evaluation.fixed_ap=True", "evaluation.inference.detections_per_image=300"], "keeps 300 a picture"),
        (["evaluation.precision=float16"], r"evaluation\.precision is 'float16', which a CPU has no"),
        (["data.test.mapper.image_size=128"], r"data\.test\.mapper\.image_size is 128, but .* made for 96"),
        (["data.train.mapper.with_masks=False"], r"data\.train\.mapper\.with_masks is False, but"),
    ],
)
def test_what_the_detector_or_the_device_rules_out_is_refused_before_words_are_embedded(
    config_overrides, monkeypatch, overrides, message
):
    monkeypatch.setattr(trainer, "base_vocabulary", lambda *_: pytest.fail("words were embedded"))
    more = ["model.architecture.detections_per_image=300", *overrides]
    with pytest.raises(ConfigError, match=message):
        trainer.train(load_config(CONFIG, [*config_overrides, *more]))


def test_boxes_alone_train(config):
    config.data.train.mapper.with_masks, config.model.architecture.mask_on = False, False
    config.evaluation.control, config.train.max_iter = False, 1
    folder = trainer.train(config)
    assert "mask_head" not in str(list(trainer.read_detector(folder)[0].state_dict()))


def test_pictures_are_of_the_size_that_the_detector_was_made_for(config, config_overrides):
    config.data.train.mapper.image_size = 64
    with pytest.raises(ConfigError, match=r"data\.train\.mapper\.image_size is 64, but the detector was made for 96"):
        trainer.train(config)
    follows = [o for o in config_overrides if "mapper.image_size" not in o]
    cfg = load_config(CONFIG, [*follows, "train.output=" + config.train.output + "2"])
    folder = trainer.train(cfg)
    cfg.data.test.mapper.image_size = 128
    with pytest.raises(ConfigError, match=r"data\.test\.mapper\.image_size is 128, but the detector was made for 96"):
        trainer.evaluate(cfg, folder)


def test_a_detector_prompts_as_it_was_trained_and_does_not_embed_its_words_again(config, monkeypatch):
    config.text.templates, config.text.use_synonyms = ["a photo of the {}.", "{} outside"], False
    folder = trainer.train(config)
    embedded = []
    original = embeddings._embed_groups

    def counted(groups, *rest):
        embedded.extend(groups)
        return original(groups, *rest)

    monkeypatch.setattr(embeddings, "_embed_groups", counted)
    detector = trainer.OpenVocabularyDetector.from_checkpoint(folder)
    assert detector.prompting == embeddings.Prompting(("a photo of the {}.", "{} outside"), False)
    assert embedded == [] and detector.vocabulary.words == ("cat", "dog")
    detector.set_vocabulary("dog, taco")
    assert embedded == [("a photo of the taco.", "taco outside")]
    rows, embedded[:] = detector._active.embeddings, []
    (folder / "base_words.safetensors").unlink()  # as in a folder of before: slower, and the same
    detector = trainer.OpenVocabularyDetector.from_checkpoint(folder)
    detector.set_vocabulary("dog, taco")
    assert len(embedded) == 3
    torch.testing.assert_close(detector._active.embeddings, rows)
    # A second run in the folder, as after a stop, reads them too.
    embedded.clear()
    image_text = load_checkpoint(config.model.image_text)
    again = trainer.base_vocabulary(config, image_text)
    assert embedded == [] and again.names == ["cat", "dog"]


def test_evaluation_says_how_far_it_is_now_and_then(monkeypatch, caplog):
    seconds = iter([0.0, 5.0, 31.0, 31.0, 40.0])
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(seconds))
    logger = logging.getLogger("test.evaluator")
    with caplog.at_level(logging.INFO, logger.name), evaluate._sparing(logger.name):
        logger.info("Start inference on 9 batches")
        logger.info("Inference done 1/9")  # after 5 seconds
        logger.info("Inference done 5/9. ETA=0:00:20")  # after 31
        logger.info("Inference done 6/9")
        logger.warning("odd")
    assert [record.getMessage() for record in caplog.records] == ["Inference done 5/9. ETA=0:00:20", "odd"]
