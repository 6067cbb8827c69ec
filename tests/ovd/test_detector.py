"""The user's detector: saving, loading, changing words, predicting."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ovd.detector import OpenVocabularyDetector, save_detector
from ovd.modeling.rcnn import DetectorConfig, build_detector

SMALL = {"image_size": 160, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16, "mask_conv_dim": 16}


def saved(folder: Path, image_text_folder: Path, float16: bool = False, **fields):
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(**SMALL, **fields), image_text_folder)
    save_detector(
        folder, model, image_text_folder, base_names=["cat", "fire_engine", "mouse_(rodent)"], float16=float16
    )
    return model


def random_image(height: int = 120, width: int = 200) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("fields", [{}, {"freeze_backbone": True}, {"vlm_mode": "frozen_copy", "mask_on": False}])
def test_saved_and_loaded_detectors_give_the_same_detections(tmp_path, image_text_folder, image_text, fields) -> None:
    model = saved(tmp_path / "d", image_text_folder, **fields)
    loaded = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    original = OpenVocabularyDetector(model, image_text, loaded.base_names)
    results = []
    for detector in (original, loaded):
        detector.set_vocabulary("cat, taco")
        results.append(detector.predict(random_image(), score_threshold=0.0, max_detections=7))
    np.testing.assert_array_equal(results[0].boxes, results[1].boxes)
    np.testing.assert_array_equal(results[0].scores, results[1].scores)
    assert len(results[0]) == 7 and results[0].names == results[1].names
    assert (results[0].masks is None) == (not fields.get("mask_on", True))
    for left, right in zip(model.state_dict().values(), loaded.model.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_frozen_tower_is_stored_once(tmp_path, image_text_folder) -> None:
    saved(tmp_path / "frozen", image_text_folder, freeze_backbone=True)
    saved(tmp_path / "trained", image_text_folder)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("frozen", "trained")]
    tower = sum(p.numel() for p in build_detector(DetectorConfig(**SMALL), image_text_folder).backbone.net.parameters())
    assert sizes[1] - sizes[0] > 0.95 * 4 * tower


def test_float16_storage_halves_the_files_and_loads_as_float32(tmp_path, image_text_folder) -> None:
    model = saved(tmp_path / "half", image_text_folder, float16=True)
    saved(tmp_path / "full", image_text_folder)
    size = {n: sum(f.stat().st_size for f in (tmp_path / n).rglob("*.safetensors")) for n in ("half", "full")}
    loaded = OpenVocabularyDetector.from_checkpoint(tmp_path / "half").model
    assert size["half"] < 0.55 * size["full"]
    for (name, value), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert other.dtype == value.dtype, name
        torch.testing.assert_close(other, value, atol=1e-3, rtol=1e-3)


def test_a_loaded_detector_starts_with_its_base_classes(tmp_path, image_text_folder) -> None:
    saved(tmp_path / "d", image_text_folder)
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    assert detector.vocabulary.words == ("cat", "fire_engine", "mouse_(rodent)")
    assert detector.model.roi_heads.is_base.all()


def test_base_words_are_recognised_in_the_users_spelling(tmp_path, image_text_folder) -> None:
    saved(tmp_path / "d", image_text_folder)
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    detector.set_vocabulary("Fire Engine, taco, mouse, CAT")
    assert detector.model.roi_heads.is_base.tolist() == [True, False, True, True]
    detector.set_vocabulary("cat, taco", base_words=["taco"], competitors=False)
    assert detector.model.roi_heads.is_base.tolist() == [False, True]


def test_competitors_take_scores_but_are_not_reported(tmp_path, image_text_folder) -> None:
    saved(tmp_path / "d", image_text_folder)
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    picture, base = random_image(160, 160), detector.base_names
    # The same words with the base classes as ordinary words, of which only the first two are looked at.
    detector.set_vocabulary(["taco", "koala", *base], competitors=False)
    everything = detector.predict(picture, score_threshold=0.0, max_detections=300)
    expected = everything[np.flatnonzero(everything.labels < 2)]
    detector.set_vocabulary("taco, koala")
    found = detector.predict(picture, score_threshold=0.0, max_detections=300)
    assert len(found) > 0 and set(found.names) <= {"taco", "koala"}
    count = min(len(found), len(expected))  # the limit of detections cuts the two lists at different places
    np.testing.assert_allclose(found.scores[:count], expected.scores[:count], rtol=1e-5)
    assert found.labels[:count].tolist() == expected.labels[:count].tolist()
    detector.set_vocabulary("taco, koala", competitors=False)
    alone = detector.predict(picture, score_threshold=0.0, max_detections=300)
    assert alone.scores.max() > found.scores.max()


def test_boxes_and_masks_are_in_pixels_of_the_upright_original(tmp_path, image_text_folder) -> None:
    saved(tmp_path / "d", image_text_folder)
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    pixels = random_image(300, 500)
    upright = detector.predict(pixels, score_threshold=0.0, max_detections=5)
    # Stored turned by 90 degrees with the EXIF note that says so (6: turn clockwise to view).
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    from_file = detector.predict(tmp_path / "turned.png", score_threshold=0.0, max_detections=5)
    assert upright.image_size == from_file.image_size == (300, 500)
    assert upright.masks.shape == (5, 300, 500)
    np.testing.assert_array_equal(upright.boxes, from_file.boxes)
    assert (upright.boxes >= 0).all() and (upright.boxes[:, 2] <= 500).all() and (upright.boxes[:, 3] <= 300).all()
    assert upright.boxes[:, 2].max() > 160  # not left in the network's 160 px


def test_threshold_limit_and_lists(tmp_path, image_text_folder) -> None:
    saved(tmp_path / "d", image_text_folder)
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    everything = detector.predict(random_image(), score_threshold=0.0, max_detections=300)
    assert (np.diff(everything.scores) <= 0).all()
    cut = float(everything.scores[10])
    assert (detector.predict(random_image(), score_threshold=cut).scores >= cut).all()
    assert len(detector.predict(random_image(), score_threshold=1.1)) == 0
    both = detector.predict([random_image(), random_image(40, 40)], score_threshold=0.0, max_detections=3)
    assert [len(d) for d in both] == [3, 3] and both[1].image_size == (40, 40)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 900), (700, 2)])
def test_extreme_pictures_run(tmp_path, image_text_folder, height: int, width: int) -> None:
    saved(tmp_path / "d", image_text_folder)
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    assert detector.predict(random_image(height, width), score_threshold=0.0).image_size == (height, width)


def test_given_embeddings_replace_the_text_tower(tmp_path, image_text_folder) -> None:
    saved(tmp_path / "d", image_text_folder)
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    matrix = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    np.save(tmp_path / "m.npy", matrix)
    detector.set_vocabulary("cat, taco", embeddings=tmp_path / "m.npy")
    expected = torch.nn.functional.normalize(torch.from_numpy(matrix), dim=-1)
    torch.testing.assert_close(detector.model.roi_heads.box_predictor.cls_score.text_embeddings, expected)
    with pytest.raises(ValueError, match="2 embeddings for 3 words"):
        detector.set_vocabulary("cat, taco, owl", embeddings=matrix)


def test_saving_leaves_no_temporary_files(tmp_path, image_text_folder) -> None:
    saved(tmp_path / "d", image_text_folder)
    saved(tmp_path / "d", image_text_folder)
    files = sorted(str(f.relative_to(tmp_path / "d")) for f in (tmp_path / "d").rglob("*") if f.is_file())
    assert files == [
        "config.yaml",
        "image_text/open_clip_config.json",
        "image_text/open_clip_model.safetensors",
        "model.safetensors",
    ]


def test_broken_checkpoints_get_a_clear_error(tmp_path, image_text_folder) -> None:
    with pytest.raises(ValueError, match="no detector checkpoint: config.yaml is missing"):
        OpenVocabularyDetector.from_checkpoint(tmp_path / "none")
    folder = tmp_path / "d"
    saved(folder, image_text_folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["architecture"]["box_fc_dim"] = 48
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="does not fit its own config.yaml"):
        OpenVocabularyDetector.from_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        OpenVocabularyDetector.from_checkpoint(folder)
    config["architecture"]["colour"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="unknown detector field.*colour"):
        OpenVocabularyDetector.from_checkpoint(folder)


def test_missing_pretrained_detector_is_named() -> None:
    with pytest.raises(ValueError, match="no detector named 'nothing' ships"):
        OpenVocabularyDetector.from_pretrained("nothing")


def test_predicting_without_a_vocabulary_says_so(image_text_folder, image_text) -> None:
    detector = OpenVocabularyDetector(build_detector(DetectorConfig(**SMALL), image_text), image_text)
    with pytest.raises(ValueError, match="call set_vocabulary first"):
        detector.predict(random_image())
