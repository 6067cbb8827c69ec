"""A detector study: trainings are shared, measured alike and resumed; what the page says follows from the results."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ovd import scores as scores_file
from ovd.detector import read_detector, save_detector
from ovd.engine import study_judging
from ovd.engine.study import Result, judged, load_study, progress, read_result
from ovd.engine.study_judging import (
    ShuffledScores,
    choose_weights,
    randomise_image_tower,
    resampled,
    run_job,
    train_seconds,
)
from ovd.engine.study_plots import write_report
from ovd.engine.study_report import cell
from ovd.evaluation.lvis_evaluator import evaluate_intervals
from ovd.modeling.detector_config import INFERENCE_FIELDS, DetectorConfig
from ovd.modeling.rcnn import build_detector
from ovd.sweep import ScoreSettings, SweepRow
from pretrain.config import ConfigError
from pretrain.engine.study import load_study as load_pretraining_study
from pretrain.engine.study_file import choose
from pretrain.modeling.checkpoint import load_checkpoint


@pytest.fixture
def description(tmp_path, config_overrides, write) -> dict:
    """A study of one training of two steps, measured in two ways."""
    given = dict(item.split("=", 1) for item in config_overrides)
    overrides = {
        key: yaml.safe_load(value)
        for key, value in given.items()
        if key == "evaluation.annotations" or not key.startswith(("train.output", "evaluation."))
    } | {"train.max_iter": 2, "model.architecture.detections_per_image": 10}
    return {
        "config": "configs/ovd/mini_lvis.py", "annotations": given["evaluation.annotations"], "seeds": [0, 1],
        "validation": str(write("validation", 3)), "image_root": str(tmp_path), "samples": 5, "proposals": [5],
        "alpha": "0,0.5", "beta": "0.5", "output": f"{tmp_path}/study", "report": f"{tmp_path}/page/study.md",
        "baseline": "alone", "title": "A study",
        "trainings": [{"name": "detector", "overrides": overrides}],
        "variants": [
            {"name": "alone", "training": "detector", "weights": "none"},
            {"name": "fused", "training": "detector", "label": "with fusion"},
            {"name": "control", "training": "detector", "weights": "fixed", "shuffled": True},
        ],
    }  # fmt: skip


@pytest.fixture
def load(tmp_path):
    def make(description: dict):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(description))
        return load_study(path)

    return make


def test_a_training_is_measured_in_all_its_ways_and_not_run_again(description, load, monkeypatch):
    study = load(description)
    assert [progress(study.config, job) for job in study.jobs] == ["missing", "missing"]
    result = run_job(study.config, study.jobs[0])
    assert set(result.values) == {"alone", "fused", "control"} and set(result.values["alone"]) == {"bbox", "segm"}
    assert result.settings["alone"] == {"alpha": 0.0, "beta": 0.0} and len(result.sweep) == 2
    assert len(result.values["fused"]["bbox"]["AP:r"]) == 1 + 5 and "AR@5_novel" in result.proposals
    assert [progress(study.config, job) for job in study.jobs] == ["done", "missing"]
    folder = study.jobs[0].folder
    assert not list(folder.glob("scores-*")) and not list(folder.glob("model_*.pth"))
    monkeypatch.setattr(study_judging, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(study_judging, "judge", lambda *_: pytest.fail("measured again"))
    assert run_job(study.config, study.jobs[0]) == result
    # Another way to measure needs no other training.
    changed = load({**description, "samples": 6})
    assert changed.jobs[0].folder == folder and progress(changed.config, changed.jobs[0]) == "trained"
    page, plots = write_report(study)
    text = page.read_text()
    assert "Not complete" in text and "detector: seed 1" in text and "with fusion" in text and "tools/study" in text
    assert len(plots) == 2 and all(p.read_bytes().startswith(b"\x89PNG") for p in plots)


def test_a_variant_may_read_regions_otherwise_than_training_did(description, load, monkeypatch):
    before = judged(load(description).config, load(description).jobs[0])
    assert "architecture" not in before, "results from before there was this field still count"
    description["variants"] = [
        {"name": "alone", "training": "detector", "weights": "none"},
        {"name": "crops", "training": "detector", "weights": "fixed"},
        {"name": "off", "training": "detector", "weights": "fixed", "architecture": {"vlm_mode": "off"}},
        {"name": "map", "training": "detector", "weights": "fixed", "architecture": {"vlm_mode": "backbone"}},
        {"name": "map_chosen", "training": "detector", "architecture": {"vlm_mode": "backbone"}},
    ]
    study = load(description)
    assert judged(study.config, study.jobs[0]) != before
    scores = []
    measure = study_judging.resampled
    monkeypatch.setattr(
        study_judging, "resampled", lambda *given: scores.append([r["score"] for r in given[1]]) or measure(*given)
    )
    result = run_job(study.config, study.jobs[0])
    alone, crops, off, own_map, _ = scores
    # To the precision of cached scores: without an image-text score the detector decides alone.
    assert off == pytest.approx(alone, rel=1e-3) and crops != pytest.approx(alone, rel=1e-3)
    assert own_map != pytest.approx(crops, rel=1e-3) and own_map != pytest.approx(alone, rel=1e-3)
    assert list(result.settings) == ["alone", "crops", "off", "map", "map_chosen"] == list(result.values)


def test_an_interrupted_measuring_goes_on_with_the_scores_it_has(description, load, monkeypatch):
    description["variants"] = [
        {"name": "alone", "training": "detector", "weights": "none"},
        {"name": "off", "training": "detector", "weights": "fixed", "architecture": {"vlm_mode": "off"}},
    ]
    study = load(description)
    job, scored, score, recalls = study.jobs[0], [], scores_file._score, []

    def interrupted(model, inputs, masks):
        scored.append((model.architecture.vlm_mode, inputs["image_id"]))
        if stop_at and len(scored) == stop_at:
            raise KeyboardInterrupt
        return score(model, inputs, masks)

    recall = study_judging.proposal_recall
    monkeypatch.setattr(scores_file, "_score", interrupted)
    monkeypatch.setattr(study_judging, "proposal_recall", lambda *given: recalls.append(1) or recall(*given))
    stop_at = 6  # four pictures: in the second architecture
    with pytest.raises(KeyboardInterrupt):
        run_job(study.config, job)
    first, scored[:], stop_at = list(scored), [], 0
    assert [mode for mode, _ in first] == ["crops"] * 4 + ["off"] * 2
    recalls.clear()
    result = run_job(study.config, job)
    assert scored == [("off", image) for _, image in first[5:]] + [("off", 3), ("off", 4)]
    assert len(recalls) == 1 and "AR@5_novel" in result.proposals and not list(job.folder.glob("scores-*"))


@pytest.mark.parametrize(
    ("architecture", "kind"), [({"vlm_mod": "off"}, "detection"), ({"vlm_mode": "off"}, "retention")]
)
def test_an_architecture_that_a_variant_cannot_have_is_named(description, load, architecture, kind):
    description["variants"][0]["architecture"] = architecture
    with pytest.raises(ConfigError, match="variant alone: architecture: (DetectorConfig has no vlm_mod|that is for)"):
        load({**description, "kind": kind, "words": ["apple"]})


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"vlm_mode": "crop"}, "vlm_mode is 'crop'; choose one of"),
        ({"alpha": 5}, "alpha is 5, but it is a number between 0 and 1"),
        ({"vlm_crop_size": "x"}, "vlm_crop_size is 'x'"),
        ({"box_fc_dim": 7}, "box_fc_dim: as it was trained; what may be otherwise is image_size"),
    ],
)
def test_a_variant_that_could_not_be_measured_is_refused_before_any_training(description, load, architecture, message):
    description["variants"][1]["architecture"] = architecture
    with pytest.raises(ConfigError, match=f"variant fused: architecture: {message}"):
        load(description)


def test_what_a_variant_may_change_fits_the_trained_weights(tmp_path, image_text_folder):
    others = {
        "image_size": 128, "window_size": 3, "global_blocks": 1, "rpn_nms_thresholds": [0.5, 0.9],
        "rpn_pre_nms_topk": [50, 40], "rpn_post_nms_topk": [30, 20], "vlm_mode": "frozen_copy", "vlm_scale": 9.0,
        "vlm_output_size": 5, "vlm_crop_size": 64, "vlm_box_scale": 0.7, "vlm_background": True, "alpha": 0.1,
        "beta": 0.2, "objectness_delta": 1.0, "detector_temperature": 2.0, "nms_threshold": 0.6,
        "score_threshold": 0.1, "detections_per_image": 7,
    }  # fmt: skip
    assert set(others) == set(INFERENCE_FIELDS)
    model = build_detector(DetectorConfig(image_size=96, pyramid_channels=16), image_text_folder)
    save_detector(tmp_path, model, image_text_folder)
    for name, value in others.items():
        architecture = read_detector(tmp_path, {name: value})[0].architecture
        assert getattr(architecture, name) == (tuple(value) if isinstance(value, list) else value)


def test_a_setting_that_training_depends_on_gives_another_folder(description, load):
    first = load(description).jobs[0].folder
    description["trainings"][0]["overrides"]["train.log_every"] = 2
    assert load(description).jobs[0].folder == first
    description["trainings"][0]["overrides"]["train.max_iter"] = 3
    assert load(description).jobs[0].folder != first
    description["trainings"][0]["image_tower"] = "random"
    job = load(description).jobs[0]
    assert "random_tower-seed0" in job.config.model.image_text and job.image_text != job.config.model.image_text


def test_a_training_starts_from_the_run_of_a_pretraining_study_with_the_same_seed(description, load, tmp_path):
    towers = {
        "config": "configs/pretrain/study_mini.yaml", "baseline": "short", "seeds": [0, 1],
        "output": f"{tmp_path}/towers",
        "runs": [{"name": "short", "overrides": {"optim.weight_decay": 0.1}}, {"name": "long"}],
    }  # fmt: skip
    path = tmp_path / "towers.yaml"
    path.write_text(yaml.safe_dump(towers))
    overrides = description["trainings"][0]["overrides"]
    overrides["model.image_text"] = f"@{path}:long"
    folders = {job.title: str(job.folder / "checkpoint") for job in load_pretraining_study(path).jobs}
    found = [job.config.model.image_text for job in load(description).jobs]
    assert found == [folders["long seed 0"], folders["long seed 1"]] and len(set(folders.values())) == 4
    overrides["model.image_text"] = f"@{path}:tall"
    with pytest.raises(ConfigError, match="training detector: .* no run of that study with seed 0: short, long"):
        load(description)
    overrides["model.image_text"] = f"@{tmp_path}/tower.yaml:long"
    with pytest.raises(ConfigError, match=r"did you mean .*towers\.yaml"):
        load(description)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "speed"}, "detection or retention"),
        ({"baseline": "none"}, "study.baseline 'none'"),
        ({"kind": "retention"}, "study.words is empty"),
        ({"annotation": "x"}, "annotations"),
        ({"variants": [{"name": "a", "training": "b"}]}, "no training 'b': detector"),
        ({"variants": [{"name": "a", "training": "detector", "weights": "best"}]}, "chosen, none, fixed"),
        ({"trainings": [{"name": "a", "overrides": {"train.max_itre": 1}}]}, "no training 'detector': a"),
    ],
)
def test_mistakes_in_a_study_are_named(description, load, change, message):
    with pytest.raises(ConfigError, match=message):
        load({**description, **change})


def test_an_unknown_training_or_file_is_named(description, load, tmp_path):
    with pytest.raises(ConfigError, match="no training 'x': detector"):
        choose(load(description).jobs, ["x"], "training")
    with pytest.raises(ConfigError, match=r"did you mean .*study\.yaml"):
        load_study(tmp_path / "studi.yaml")


def test_retention_compares_with_the_detector_before(
    description, load, tmp_path, image_text_folder, write, monkeypatch
):
    torch.manual_seed(0)
    small = {"image_size": 96, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16, "mask_conv_dim": 16}
    model = build_detector(DetectorConfig(**small, detections_per_image=10), image_text_folder)
    before = save_detector(tmp_path / "before", model, image_text_folder, base_names=["cat", "dog"])
    scenes = write("scenes", 3)
    monkeypatch.setattr(study_judging, "build_finetuning_scenes", lambda *_: scenes)
    study = load({
        **description, "kind": "retention", "config": "configs/ovd/finetune.py", "detector": str(before),
        "words": ["wolf"], "seeds": [0],
        "trainings": [{"name": "plain", "overrides": {
            "data.annotations": str(scenes), "data.images": str(tmp_path), "train.max_iter": 1,
            "data.train.workers": 0, "data.train.batch_size": 2, "data.train.mapper.image_size": 96,
            "train.device": "cpu",
        }}],
        "variants": [
            {"name": "all the way", "training": "plain"},
            {"name": "none", "training": "plain", "interpolation": 0.0},
        ],
    })  # fmt: skip
    result = run_job(study.config, study.jobs[0])
    assert set(result.values) == {"before", "all the way", "none"}
    # The same weights, but the new word is known now and weighted as such; the others' own scores are untouched.
    assert {"AP:fine-tuned", "AP:untouched, common"} <= result.values["none"]["bbox"].keys()
    text = write_report(study)[0].read_text()
    assert "before fine-tuning" in text and "minus “before fine-tuning”" in text


def test_the_values_are_the_metric_and_its_resamples(description):
    ground_truth = json.loads(Path(description["annotations"]).read_text())
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in ground_truth["annotations"][::2]
    ]
    values = resampled(ground_truth, results, 50)
    expected = evaluate_intervals(ground_truth, results, samples=50)
    found = cell({0: values["bbox"]["AP"]})
    assert found.interval.value == pytest.approx(expected["AP"].value, abs=1e-5)
    assert found.interval.low == pytest.approx(expected["AP"].low, abs=1e-5) and "segm" not in values


def test_differences_are_paired_by_seed_and_resample():
    own, others = {0: [0.5, 0.6, 0.4], 1: [0.7, 0.8, 0.6], 2: [9, 9, 9]}, {0: [0.4, 0.5, 0.3], 1: [0.6, 0.7, 0.5]}
    found = cell(own, others)
    assert found.seeds == pytest.approx([0.1, 0.1])
    assert (found.interval.value, found.interval.low, found.interval.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.text(sign=True) == "+10.0 ± 0.0 (+10.0 to +10.0)"
    assert cell({}, others) is None and cell({0: [None, None]}).text() == "n/a"


def test_weights_are_chosen_for_novel_classes_among_the_best():
    def row(alpha: float, ap: float, rare: float) -> SweepRow:
        return SweepRow(ScoreSettings(alpha, 0.5), {"AP": ap, "APr": rare})

    rows = [row(0.0, 0.30, 0.05), row(0.2, 0.298, 0.09), row(0.4, 0.28, 0.2)]
    assert choose_weights(rows, 0.003).settings.alpha == 0.2
    assert choose_weights(rows, 0.0).settings.alpha == 0.0
    assert choose_weights([row(0.1, float("nan"), float("nan"))], 0.003).settings.alpha == 0.1


def test_shuffled_scores_are_those_of_shuffled_text(image_text_folder):
    """The control made from cached scores equals the network run with another class's text for every class."""
    from ovd.engine.evaluate import derangement
    from ovd.scores import CachedPicture

    torch.manual_seed(0)
    model = build_detector({"image_size": 96, "pyramid_channels": 16}, image_text_folder).eval()
    embeddings, is_base = torch.randn(5, 64), torch.tensor([True, True, False, True, False])
    inputs = {"image": torch.randint(0, 255, (3, 96, 96), dtype=torch.uint8), "height": 96, "width": 96}

    def parts(rows: torch.Tensor):
        model.set_text_embeddings(rows, is_base)
        return model.inference([inputs], return_parts=True)[0]["parts"]

    class Cache:
        def read(self, image_id: int) -> CachedPicture:
            return CachedPicture(image_id, (96, 96), parts(embeddings))

    ours = ShuffledScores(Cache(), 5).read(1).regions
    theirs = parts(embeddings[torch.from_numpy(derangement(5))])
    torch.testing.assert_close(ours.detector, theirs.detector)
    torch.testing.assert_close(ours.image_text, theirs.image_text)


def test_a_random_image_tower_keeps_the_text_tower(image_text_folder, tmp_path):
    first = load_checkpoint(image_text_folder).model.state_dict()
    made = [load_checkpoint(randomise_image_tower(image_text_folder, tmp_path / str(n), n)).model for n in (1, 2)]
    for name, value in made[0].state_dict().items():
        if name.startswith("text."):
            assert torch.equal(value, first[name]), name
    weight = "visual.trunk.blocks.0.attn.qkv.weight"
    assert not torch.equal(made[0].state_dict()[weight], first[weight])
    assert not torch.equal(made[0].state_dict()[weight], made[1].state_dict()[weight])


def test_the_time_of_a_resumed_run_counts_each_step_once(tmp_path):
    lines = [{"iteration": 19, "time": 1.0}, {"iteration": 39, "time": 2.0}, {"iteration": 39, "time": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert train_seconds(tmp_path) == pytest.approx(20 * 1.0 + 20 * 3.0)
    assert train_seconds(tmp_path / "none") == 0


def test_a_result_measured_otherwise_or_broken_is_none(description, load):
    study = load(description)
    job = study.jobs[0]
    job.folder.mkdir(parents=True)
    path = job.folder / "result.json"
    good = Result({}, {}, {}, [], 1.0, judged(study.config, job), "", "", "")
    path.write_text(json.dumps(vars(good)))
    assert read_result(study.config, job) == good
    assert read_result(replace(study.config, limit=3), job) is None
    path.write_text("{")
    assert read_result(study.config, job) is None


@pytest.mark.parametrize("name", ["detector_mini", "retention_mini"])
def test_the_published_studies_load(name):
    study = load_study(f"configs/studies/{name}.yaml")
    assert len(study.jobs) == 3 * len(study.config.trainings)
    assert len({job.folder for job in study.jobs}) == len(study.jobs)
    seconds = np.array([len(job.variants) for job in study.jobs])
    assert (seconds > 0).all()
