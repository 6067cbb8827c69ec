"""The detector's engine: configs, optimiser, leak check, blindness to novel classes, resume, control."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ovd.engine import trainer
from ovd.engine.defaults import build_optimizer, warmup_cosine
from ovd.engine.evaluate import derangement, results_table
from ovd.engine.lazy_config import load_config
from ovd.engine.step import DetectorTrainer
from ovd.modeling.rcnn import build_detector
from pretrain.config import ConfigError

CONFIG = "configs/ovd/mini_lvis.py"


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(ConfigError, match="train.device is cuda and PyTorch sees no GPU"):
        trainer.resolve_device("cuda")
    assert trainer.resolve_device("auto") == "cpu"


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
        learned_input = name.endswith(("pos_embed", "prefix_tokens"))  # the tower has a register token
        assert decay == (0.0 if parameter.ndim <= 1 or learned_input else 0.1), name
    assert "backbone.net.prefix_tokens" in dict(model.named_parameters())


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


@pytest.mark.parametrize("repeat_threshold", [0.0, 0.9])
def test_a_resumed_run_equals_one_without_a_stop_to_the_bit(config, tmp_path, monkeypatch, repeat_threshold):
    config.data.train.repeat_threshold = repeat_threshold
    straight = weights(trainer.train(config))
    stopped = copy.deepcopy(config)
    stopped.train.output = str(tmp_path / "stopped")
    step = DetectorTrainer.run_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DetectorTrainer, "run_step", lambda self: step(self) if self.iter < 3 else _interrupt())
        trainer.train(stopped)  # the checkpoint is of two steps, the third is lost
    with pytest.raises(ValueError, match="--resume"):
        trainer.train(stopped)
    stopped.data.train.workers = 1  # which worker loads a picture has no part in it
    assert same(straight, weights(trainer.train(stopped, resume=True)))
    steps = [json.loads(line)["iteration"] for line in (tmp_path / "stopped" / "metrics.jsonl").open()]
    assert steps[-2:] == [2, 3]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", ["checkpoint", "state.pt"])
def test_the_folder_of_a_pretraining_run_is_refused_and_left_as_it_is(config, left, resume):
    run = Path(config.train.output)
    run.mkdir()
    (run / left).touch()
    with pytest.raises(ConfigError, match=rf"holds a pretraining run \({left}\): set train.output elsewhere"):
        trainer.train(config, resume=resume)
    assert [p.name for p in run.iterdir()] == [left]


def _interrupt():
    raise KeyboardInterrupt


def test_a_novel_class_in_the_training_file_stops_the_run_before_its_first_step(config, write):
    leaking = write("leak", 3)
    config.data.train_annotations = str(leaking)
    with pytest.raises(trainer.LeakError, match="filter_to_base"):
        trainer.train(config)
    assert not (Path(config.train.output) / "metrics.jsonl").exists()
    assert json.loads((Path(config.train.output) / "leak_check.json").read_text())["findings"]


def test_novel_negatives_in_the_training_file_are_a_leak_too(config, write):
    config.data.train_annotations = str(write("negative", 2, negatives=[1193]))
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


def test_the_coco_protocol_reports_base_and_novel_apart(config):
    folder = trainer.train(config)
    config.evaluation.protocol, config.evaluation.control, config.evaluation.samples = "coco", False, 5
    results = trainer.evaluate(config, folder)
    assert {"AP", "AP50", "AP50_base", "AP50_novel"} <= results["model"]["bbox"].keys()
    assert "APr" not in results["model"]["bbox"] and "COCO protocol" in results_table(results)
    row = Path(config.train.output) / "evaluation" / "model"
    content = json.loads((row / "metrics.json").read_text())
    measured = {k: None if v != v else v for k, v in results["model"]["bbox"].items()}  # JSON has no NaN
    assert content["metrics"]["bbox"] == measured and content["protocol"] == "coco"
    assert {"AP50", "AP50_base", "AP50_novel", "AR@100_novel"} <= content["intervals"]["bbox"].keys()
    assert "LVIS" not in (row / "summary.md").read_text()
    config.evaluation.fixed_ap, config.evaluation.inference = True, {"detections_per_image": 301}
    with pytest.raises(ConfigError, match="fixed_ap is of the LVIS protocol"):
        trainer.evaluate(config, folder)
    config.evaluation.fixed_ap = False
    config.evaluation.protocol = "voc"
    with pytest.raises(ValueError, match="evaluation.protocol is 'voc': choose lvis or coco"):
        trainer.evaluate(config, folder)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_all_losses(config):
    config.optimizer.lr = 1e30
    with pytest.raises(FloatingPointError, match=r"step [1-3].*'loss_cls': .*'loss_mask': .*--resume"):
        trainer.train(config)


def test_intervals_and_fixed_ap_are_measured_when_asked_for(config):
    folder = trainer.train(config)
    config.evaluation.samples, config.evaluation.fixed_ap, config.evaluation.control = 5, True, False
    # It would be that of the best detections of a picture, not of a class.
    with pytest.raises(ConfigError, match=r"keeps 50 a picture: add evaluation\.inference\.detections_per_image"):
        trainer.evaluate(config, folder)
    config.evaluation.inference = {"detections_per_image": 301}
    results = trainer.evaluate(config, folder)
    assert {"AP_fixed", "APr_fixed"} <= results["model"]["bbox"].keys() and "AP_fixed" in results_table(results)
    content = json.loads((Path(config.train.output) / "evaluation" / "model" / "metrics.json").read_text())
    assert set(content["intervals"]["bbox"]["AP"]) == {"value", "low", "high"}


def test_a_temperature_is_a_setting_of_the_folder_and_of_the_evaluation(config):
    config.model.architecture.detector_temperature = 2.0
    folder = trainer.train(config)
    heads = trainer.OpenVocabularyDetector.from_checkpoint(folder).model.roi_heads
    assert heads.detector_temperature == 2.0
    config.evaluation.control = False
    scores = {}
    for temperature in (1.0, 2.0, 8.0):
        config.evaluation.fusion = {"detector_temperature": temperature, "alpha": 0, "beta": 0}
        trainer.evaluate(config, folder)
        path = Path(config.train.output) / "evaluation" / "model" / "detections.json"
        scores[temperature] = max(d["score"] for d in json.loads(path.read_text()))
    assert scores[1.0] > scores[2.0] > scores[8.0]
    config.model.architecture.detector_temperature = 0.0
    with pytest.raises(ValueError, match="detector_temperature is 0"):
        build_detector({"detector_temperature": 0.0})


def test_an_unknown_fusion_setting_is_named(config):
    folder = trainer.train(config)
    config.evaluation.fusion = {"gamma": 1}
    with pytest.raises(ValueError, match="evaluation.fusion.gamma"):
        trainer.evaluate(config, folder)
