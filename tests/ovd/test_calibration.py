"""Calibrated scores: the curve is right where precision is known, and one score means the same for all vocabularies."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ovd.calibration import (
    CALIBRATION,
    RAW_THRESHOLD,
    ScoreCalibration,
    ShownScores,
    fit_curve,
    inference_settings,
    read_calibration,
    read_fitting_calibration,
    save_calibration,
)
from ovd.calibration_data import Outcomes, Picture, _judge, precision_above, restrict
from ovd.commands.calibrate import main
from ovd.detector import OpenVocabularyDetector, save_detector
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import build_detector
from ovd.modeling.roi_heads import RegionScores
from ovd.text.vocabulary import Vocabulary

SMALL = {"image_size": 160, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16, "mask_on": False}
# Shares of right detections by score, as if one word hardly had to compete and many words hard.
KNOWN = {1: lambda s: s**3, 20: lambda s: s, 200: lambda s: s**0.5}


def synthetic(size: int, count: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, size])
    scores = rng.uniform(size=count)
    return scores, rng.uniform(size=count) < KNOWN[size](scores)


def curve(power: float) -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(0, 1, 11)
    return x, x**power


@pytest.mark.parametrize("size", KNOWN)
def test_the_curve_is_the_known_precision(size) -> None:
    x, y = fit_curve(*synthetic(size))
    places = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.interp(places, x, y), KNOWN[size](places), atol=0.05)
    assert (np.diff(x) > 0).all() and (np.diff(y) > 0).all() and (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_noise_does_not_make_the_curve_fall() -> None:
    rng = np.random.default_rng(0)
    x, y = fit_curve(rng.uniform(size=200), rng.uniform(size=200) < 0.5)
    assert (np.diff(y) > 0).all()
    with pytest.raises(ValueError, match="39 detections are too few"):
        fit_curve(np.ones(39), np.ones(39, bool))


def test_one_threshold_means_about_the_same_precision_for_all_sizes_on_data_not_fitted_on() -> None:
    calibration = ScoreCalibration({False: {size: fit_curve(*synthetic(size)) for size in KNOWN}})
    at = {"raw": [], "calibrated": []}
    for size in KNOWN:
        scores, right = synthetic(size, seed=1)
        for kind, shown in (("raw", scores), ("calibrated", calibration.apply(scores, size, False))):
            near = np.abs(shown - 0.5) < 0.05
            at[kind].append(right[near].mean())
    np.testing.assert_allclose(at["calibrated"], 0.5, atol=0.06)
    assert np.ptp(at["raw"]) > 0.4


def test_between_sizes_curves_are_interpolated_and_beyond_them_kept() -> None:
    calibration = ScoreCalibration({True: {1: curve(2), 100: curve(1)}})
    score = np.array([0.3, 0.7])
    np.testing.assert_allclose(calibration.apply(score, 10, True), (score**2 + score) / 2, atol=0.01)  # half way in log
    np.testing.assert_allclose(calibration.apply(score, 5000, True), score, atol=1e-6)
    np.testing.assert_allclose(calibration.apply(score, 1, False), score)  # other scores, of which it knows nothing
    for words in (1, 7, 100):
        for share in (0.0, 0.2, 0.5, 0.99, 1.0):
            back = calibration.apply(np.array(calibration.invert(share, words, True)), words, True)
            assert back == pytest.approx(share, abs=1e-6)


def test_a_calibration_survives_its_file_and_a_broken_one_is_named(tmp_path) -> None:
    path = save_calibration(tmp_path / CALIBRATION, ScoreCalibration({True: {1: curve(2)}}, {"alpha": 0.3}, {"n": 1}))
    again = read_calibration(path)
    np.testing.assert_allclose(again.curves[True][1], curve(2), atol=1e-6)
    assert again.settings == {"alpha": 0.3} and again.measured == {"n": 1}
    content = json.loads(path.read_text())
    broken = [{**content, "format": 9}, {**content, "curves": []}, {}, [], {**content, "curves": [{"words": 1}]}]
    falling = json.loads(path.read_text())
    falling["curves"][0]["shares"][3] = 0.9
    for wrong in [*broken, falling]:
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="is no calibration.*tools/calibrate.py"):
            read_calibration(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image_text_folder) -> Path:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(**SMALL), image_text_folder)
    return save_detector(tmp_path_factory.mktemp("d"), model, image_text_folder, base_names=["cat", "owl", "cup"])


def picture(height: int = 160, width: int = 160, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_a_folders_calibration_is_used_for_scores_and_thresholds(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "d")
    raw = OpenVocabularyDetector.from_checkpoint(folder)
    settings = inference_settings(raw.model.architecture)
    save_calibration(tmp_path / "d" / CALIBRATION, ScoreCalibration({True: {1: curve(0.5)}}, settings))
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    for d in (raw, detector):
        d.set_vocabulary("taco")
    before, after = (d.predict(picture(), 0.0, 30) for d in (raw, detector))
    np.testing.assert_allclose(after.scores, np.interp(before.scores, *curve(0.5)), atol=1e-5)
    np.testing.assert_array_equal(after.boxes, before.boxes)
    np.testing.assert_array_equal(detector.predict(picture(), 0.0, 30, calibrated=False).scores, before.scores)
    cut = float((after.scores[9] + after.scores[10]) / 2)
    assert len(detector.predict(picture(), cut, 30)) == 10 and len(detector.predict(picture(), 1.0)) == 0
    config = yaml.safe_load((tmp_path / "d" / "config.yaml").read_text())
    config["architecture"]["alpha"] = 0.9
    (tmp_path / "d" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.warns(UserWarning, match=r"was made with alpha 0.35 \(now 0.9\)"):
        assert OpenVocabularyDetector.from_checkpoint(tmp_path / "d").calibration is None


@pytest.mark.parametrize("written", [{}, {"vlm_background": False}])
def test_a_calibration_without_a_background_does_not_fit_a_detector_with_one(folder, tmp_path, written) -> None:
    path = save_calibration(tmp_path / CALIBRATION, ScoreCalibration({True: {1: curve(1)}}, written))
    assert read_fitting_calibration(path, DetectorConfig()) is not None
    with pytest.warns(UserWarning, match=r"made with vlm_background False \(now True\)"):
        assert read_fitting_calibration(path, DetectorConfig(vlm_background=True)) is None


def test_a_file_from_before_the_empty_prompt_competed_keeps_only_the_curves_with_competitors(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "d")
    path, curves = tmp_path / "d" / CALIBRATION, {True: {1: curve(0.5)}, False: {1: curve(2.0)}}
    save_calibration(path, ScoreCalibration(curves, {"alpha": 0.35}))
    with pytest.warns(UserWarning, match="before the empty prompt competes .* run tools/calibrate.py again"):
        detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    assert set(detector.calibration.curves) == {True}
    for competitors in (False, True):
        detector.set_vocabulary("taco", competitors=competitors)
        raw = detector.predict(picture(), 0.0, 5, calibrated=False).scores
        shown = detector.predict(picture(), 0.0, 5).scores
        np.testing.assert_allclose(shown, np.interp(raw, *curve(0.5)) if competitors else raw, atol=1e-5)
    # A raw score has the threshold of raw scores.
    kinds = {kind: ShownScores(detector.calibration, 1, kind).raw(None) for kind in (False, True)}
    assert kinds == {False: RAW_THRESHOLD, True: pytest.approx(0.25, abs=0.01)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # without an image-text score nothing has changed
        assert set(read_fitting_calibration(path, DetectorConfig(vlm_mode="off")).curves) == {False, True}
    save_calibration(path, ScoreCalibration({False: curves[False]}))
    with pytest.warns(UserWarning, match="run tools/calibrate.py again"):
        assert read_fitting_calibration(path, DetectorConfig()) is None


def test_a_word_alone_has_the_curve_of_words_alone(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "d")
    curves = {True: {1: curve(2.0)}, False: {1: curve(0.5)}}
    save_calibration(tmp_path / "d" / CALIBRATION, ScoreCalibration(curves, {"vlm_background": False}))
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    # All base classes are words: they compete, though none is added.
    for words, competitors, power in (("taco", False, 0.5), ("taco", True, 2.0), (["cat", "owl", "cup"], True, 2.0)):
        detector.set_vocabulary(words, competitors=competitors)
        raw = detector.predict(picture(), 0.0, 5, calibrated=False)
        shown = detector.predict(picture(), 0.0, 5)
        np.testing.assert_allclose(shown.scores, np.interp(raw.scores, *curve(power)), atol=1e-5)


def test_words_of_a_matrix_that_the_network_was_given_have_the_curve_of_words_alone(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "d")
    curves = {True: {1: curve(2.0)}, False: {1: curve(0.5)}}
    save_calibration(tmp_path / "d" / CALIBRATION, ScoreCalibration(curves, {"vlm_background": False}))
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    rows = detector._active.embeddings[:1]
    detector.model.set_text_embeddings(rows, torch.tensor([True]))
    detector.vocabulary = Vocabulary.parse("cat")
    raw = detector.predict(picture(), 0.0, 5, calibrated=False)
    shown = detector.predict(picture(), 0.0, 5)
    assert len(raw) and not detector._active.compete
    np.testing.assert_allclose(shown.scores, np.interp(raw.scores, *curve(0.5)), atol=1e-5)


def test_saving_a_detector_anew_drops_the_old_calibration(folder, tmp_path, image_text_folder) -> None:
    shutil.copytree(folder, tmp_path / "d")
    save_calibration(tmp_path / "d" / CALIBRATION, ScoreCalibration({True: {1: curve(1)}}))
    model = build_detector(DetectorConfig(**SMALL), image_text_folder)
    save_detector(tmp_path / "d", model, image_text_folder)
    assert not (tmp_path / "d" / CALIBRATION).exists()


@pytest.mark.parametrize("classification", ["softmax", "sigmoid"])
def test_scores_of_fewer_words_equal_a_run_with_these_words(tmp_path, image_text_folder, classification) -> None:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(**SMALL, classification=classification), image_text_folder)
    save_detector(tmp_path, model, image_text_folder, base_names=["cat", "owl", "cup"])
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path)
    inputs = detector._inputs(picture())

    def regions(words: list[str]) -> RegionScores:
        detector.set_vocabulary(words, competitors=False)
        return detector.model.inference([inputs], return_parts=True)[0]["parts"]

    everything = ["cat", "owl", "cup", "taco", "koala", "boat"]
    few = restrict(regions(everything), torch.tensor([4, 0, 3]))
    expected = regions(["koala", "cat", "taco"])
    torch.testing.assert_close(few.detector, expected.detector, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(few.image_text, expected.image_text, atol=1e-6, rtol=1e-3)
    assert (few.image_text[:, 0] > 0).all()
    # With competitors there is no background, which the run over all words had.
    few = restrict(regions(everything), torch.tensor([4, 0, 1, 2]), background=False)
    detector.set_vocabulary("koala")
    expected = detector.model.inference([inputs], return_parts=True)[0]["parts"]
    torch.testing.assert_close(few.image_text, expected.image_text, atol=1e-6, rtol=1e-3)


def judged(boxes, labels, absent, words=3, num_base=2):
    """One region a box, all sure of the class given; objects: a base class 0 at 0..40, a foreign thing at 100..140."""
    detector = type("D", (), {})()
    predictor = type("P", (), {"test_score_thresh": 0.0, "test_nms_thresh": 0.5})()
    heads = type("H", (), {"alpha": 0.0, "beta": 0.0, "objectness_delta": 0.0, "box_predictor": predictor})()
    detector.model = type("M", (), {"roi_heads": heads})()
    z = torch.full((len(boxes), 1 + words), 0.001)
    for i, label in enumerate(labels):
        z[i, 1 + label] = 0.9 - 0.1 * i
    z[:, 0] = 1 - z[:, 1:].sum(dim=1)
    given = torch.tensor(boxes, dtype=torch.float32)
    regions = RegionScores(given, given, z, None, torch.ones(len(boxes)), (160, 160))
    objects = torch.tensor([[0.0, 0, 40, 40], [100, 100, 140, 140]])
    return _judge(
        detector, Picture(regions, objects, torch.tensor([0, -1]), absent), torch.arange(words), words, num_base
    )


def test_detections_are_judged_as_a_person_would() -> None:
    boxes = [[0, 0, 40, 38], [0, 50, 40, 90], [0, 0, 40, 40], [100, 100, 140, 139], [60, 0, 90, 30]]
    scores, right = judged(boxes, [0, 0, 1, 2, 2], absent=None)
    # A hit; the class elsewhere; another class; an unknown name on the foreign thing does not count; nor is it right
    # where nothing is.
    np.testing.assert_allclose(scores, [0.9, 0.8, 0.7, 0.5], atol=1e-6)
    assert right.tolist() == [True, False, False, False]
    scores, right = judged(boxes, [0, 0, 1, 2, 2], absent=set())
    assert right.tolist() == [True, False] and len(scores) == 2  # nobody has looked for class 1 and 2


def test_the_command_writes_what_the_detector_then_uses(folder, tmp_path, capsys) -> None:
    shutil.copytree(folder, tmp_path / "d")
    images, annotations = [], []
    for i in range(1, 25):
        Image.fromarray(picture(seed=i)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 160, "height": 160})
        box = [10, 10, 100, 100]
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": 1e4, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "val.json").write_text(json.dumps(content))
    options = ["--annotations", str(tmp_path / "val.json"), "--pictures", "24", "--sizes", "2", "3", "--device", "cpu"]
    assert main(["--detector", str(tmp_path / "d"), *options]) == 0
    assert "calibrated >= 0.5" in capsys.readouterr().out
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    assert set(detector.calibration.curves[True]) == {2, 3} and detector.calibration.measured["pictures"] == 24
    assert main(["--detector", str(tmp_path / "none"), *options]) == 1
    assert "is no detector: give a folder with config.yaml" in capsys.readouterr().err
    assert main(["--detector", "mini", *options]) == 1
    assert "ships, which stays as it is: give --output" in capsys.readouterr().err


def test_precision_above_counts_what_is_shown() -> None:
    outcomes = Outcomes(np.array([0.2, 0.4, 0.9]), np.array([False, True, True]), np.array([0, 0, 1]))
    assert precision_above(outcomes, 0.3, (False, 1), None) == {"precision": 1.0, "detections": 2}
    stretched = ScoreCalibration({False: {1: curve(0.5)}})
    assert precision_above(outcomes, 0.4, (False, 1), stretched)["detections"] == 3
    assert precision_above(outcomes.of([0]), 0.9, (False, 1), None) == {"precision": None, "detections": 0}
