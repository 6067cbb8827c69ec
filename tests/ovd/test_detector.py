"""The user's detector: saving, loading, changing words, predicting."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

import ovd
from ovd.detector import OpenVocabularyDetector, save_detector
from ovd.detector_folder import detector_folder
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import build_detector
from ovd.text.embedding_file import save_embeddings
from ovd.text.embeddings import embed_empty_prompt, embed_vocabulary
from ovd.text.vocabulary import Vocabulary
from pretrain.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from pretrain.modeling.checkpoint import load_checkpoint, save_checkpoint
from pretrain.modeling.clip import build_model, set_image_size

WIDE = {
    "embed_dim": 512,
    "vision_cfg": {"timm_model_name": "test_vit4", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
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


@pytest.mark.parametrize("float16", [False, True])
def test_a_detector_on_towers_trained_at_another_size_than_their_own_is_whole(tmp_path, float16):
    config = ModelConfig(ImageTowerConfig("test_vit4"), TextTowerConfig(32, 2, 1, 16), embed_dim=24)
    towers = build_model(config)
    set_image_size(towers, 48)
    source = save_checkpoint(tmp_path / "towers", towers, config)
    saved(tmp_path / "d", source, float16=float16, vlm_mode="crops", vlm_crop_size=48)
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    assert load_checkpoint(tmp_path / "d" / "image_text").image_size == 48
    detector.set_vocabulary("cat, taco")
    assert len(detector.predict(random_image(), score_threshold=0.0, max_detections=3)) == 3


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
    detector.set_vocabulary(["taco", "koala", *base])
    assert not detector.competitors
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
    assert len(detector.predict(random_image(), score_threshold=1.0)) == 0
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
    with pytest.warns(UserWarning, match="says which model made it"):
        detector.set_vocabulary("cat, taco", embeddings=tmp_path / "m.npy")
    expected = torch.nn.functional.normalize(torch.from_numpy(matrix), dim=-1)
    torch.testing.assert_close(detector.model.roi_heads.box_predictor.cls_score.text_embeddings, expected)
    with pytest.raises(ValueError, match="2 embeddings for 3 words"):
        detector.set_vocabulary("cat, taco, owl", embeddings=matrix)


@pytest.fixture(scope="module")
def maskless(tmp_path_factory, image_text_folder) -> Path:
    folder = tmp_path_factory.mktemp("maskless")
    saved(folder, image_text_folder, mask_on=False)
    return folder


@pytest.fixture
def detector(maskless) -> OpenVocabularyDetector:
    return OpenVocabularyDetector.from_checkpoint(maskless)


def test_permuting_the_vocabulary_permutes_the_scores(detector) -> None:
    words = ["cat", "taco", "owl", "fire engine", "koala"]
    found = []
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        detector.set_vocabulary([words[i] for i in order])
        found.append(detector.predict(random_image(), score_threshold=0.0, max_detections=50))
    assert len(found[0]) == 50 and len(set(found[0].names)) > 1
    assert found[0].names == found[1].names
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-4)
    np.testing.assert_allclose(found[0].boxes, found[1].boxes, atol=1e-3)


def test_changing_words_leaves_the_weights_alone(detector) -> None:
    def digest() -> str:
        state = detector.model.state_dict() | {
            f"text {k}": v for k, v in detector.image_text.model.state_dict().items()
        }
        return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()

    before = digest()
    for words in ("taco", "taco, koala, cat", [f"thing {i}" for i in range(50)]):
        detector.set_vocabulary(words)
        detector.predict(random_image())
        detector.diagnose()
        assert digest() == before


def test_one_word_works_end_to_end(detector) -> None:
    detector.set_vocabulary("taco", competitors=False)
    found = detector.predict(random_image(), score_threshold=0.0, max_detections=5)
    assert found.names == ["taco"] * 5 and detector.diagnose().num_words == 1


def test_where_nothing_competes_the_empty_prompt_does(detector) -> None:
    matrix = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    empty = F.normalize(embed_empty_prompt(detector.image_text), dim=0)
    head = detector.model.roi_heads.image_text_head

    def image_text(word: str = "taco", **options) -> torch.Tensor:
        detector.set_vocabulary(word, **options)
        inputs = detector._inputs(random_image())
        with detector._network(detector._active) as model:
            return model.inference([inputs], return_parts=True)[0]["parts"].image_text

    for options in ({"competitors": False}, {"embeddings": matrix}):
        p = image_text(**options)
        torch.testing.assert_close(head.background, empty[None])
        assert p.shape[1] == 2 and (p[:, 1] < 1).all() and p[:, 1].std() > 0
        torch.testing.assert_close(p.sum(dim=1), torch.ones(len(p)))
    for word in ("taco", ["taco", *detector.base_names]):  # with competitors, or naming all of them itself
        assert (image_text(word)[:, 0] == 0).all() and len(head.background) == 0
    # The same region says more of what it shows: another word, another probability.
    assert not torch.allclose(image_text("taco", competitors=False), image_text("koala", competitors=False))
    detector.add_image_prompt("this", np.full((40, 40, 3), 90, np.uint8))
    assert len(head.background) == 1 and detector.vocabulary.words == ("koala", "this")


def test_words_that_name_all_base_classes_compete_whoever_made_their_rows(detector) -> None:
    words, scores = ["taco", *detector.base_names], []
    detector.set_vocabulary(words)
    rows = detector._active.embeddings
    for embeddings in (None, rows, rows.numpy()):
        detector.set_vocabulary(words, embeddings=embeddings)
        assert detector._active.compete and detector._active.background is None and detector.competitors == ()
        scores.append(detector.predict(random_image(), score_threshold=0.0, max_detections=5).scores)
        detector.set_vocabulary(words, embeddings=embeddings, competitors=False)
        assert not detector._active.compete and detector._active.background is not None
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], rtol=1e-5)
    detector.set_vocabulary(words[:-1], embeddings=rows[:-1])  # one base class is missing, and none is added
    assert not detector._active.compete and detector._active.background is not None and detector.competitors == ()


def test_a_detector_without_base_names_has_a_background_for_one_word(image_text_folder, image_text) -> None:
    model = build_detector(DetectorConfig(**SMALL), image_text_folder)
    detector = OpenVocabularyDetector(model, image_text)
    detector.set_vocabulary("taco")
    assert len(model.roi_heads.image_text_head.background) == 1
    # With one base class there is nothing else that could compete either.
    detector = OpenVocabularyDetector(model, image_text, ["tree"])
    detector.set_vocabulary("tree")
    assert len(model.roi_heads.image_text_head.background) == 1 and not detector.competitors
    detector.set_vocabulary("taco")
    assert len(model.roi_heads.image_text_head.background) == 0 and detector.competitors == ("tree",)


def test_twenty_thousand_words_work_end_to_end(detector) -> None:
    words, matrix = [f"thing {i}" for i in range(20_000)], torch.randn(20_000, 64)
    detector.set_vocabulary(words, embeddings=matrix)
    found = detector.predict(random_image(), score_threshold=0.0, max_detections=5)
    assert 0 < len(found) <= 5 and found.names == [words[i] for i in found.labels]
    # A subset that holds the best word finds it too, more surely, since fewer words share the probability.
    best = found.labels[0]
    detector.set_vocabulary([words[best], *words[:20]], embeddings=matrix[[best, *range(20)]])
    again = detector.predict(random_image(), score_threshold=0.0, max_detections=1)
    assert again.scores[0] > found.scores[0]


def test_every_lvis_word_works_with_a_matrix_that_others_made(tmp_path, image_text_folder, image_text) -> None:
    """The real matrix where it is there, with a text tower of its width; else one of its shape and type."""
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    matrix, words = shared / "lvis_v1_clip_vitb32_text.npy", shared / "lvis_v1_category_info.json"
    if not (matrix.is_file() and words.is_file()):
        matrix, words = tmp_path / "lvis.npy", [f"word {i}" for i in range(1203)]
        np.save(matrix, np.random.default_rng(0).normal(size=(1203, 512)).astype(np.float16))
    wide = open_clip.CustomTextCLIP(**WIDE).eval()
    image_text = dataclasses.replace(image_text, model=wide, embed_dim=512)
    model = build_detector(DetectorConfig(**SMALL, mask_on=False), image_text)
    detector = OpenVocabularyDetector(model, image_text, ["cat"])
    with pytest.warns(UserWarning, match="says which model made it"):
        vocabulary = detector.set_vocabulary(words, embeddings=matrix)
    assert len(vocabulary) == 1203 and detector.competitors == ()
    assert len(detector.predict(random_image(), score_threshold=0.0, max_detections=5)) == 5


def test_an_embedding_file_names_its_own_words(tmp_path, detector) -> None:
    vocabulary, templates = Vocabulary.parse("cat, taco"), ("one {}",)
    detector.set_vocabulary(vocabulary, templates=templates)
    expected = detector.model.roi_heads.box_predictor.cls_score.text_embeddings.clone()
    rows = embed_vocabulary(vocabulary, detector.image_text, templates)
    path = save_embeddings(tmp_path / "w.safetensors", rows, vocabulary, detector.image_text, templates)
    assert detector.set_vocabulary(embeddings=path).words == ("cat", "taco")
    assert detector.competitors == ("fire_engine", "mouse_(rodent)")  # same tower: they can compete
    torch.testing.assert_close(detector.model.roi_heads.box_predictor.cls_score.text_embeddings, expected)
    with pytest.raises(ValueError, match="as word 2"):
        detector.set_vocabulary("cat, owl", embeddings=path)
    with pytest.raises(ValueError, match="no words were given"):
        detector.set_vocabulary()


def test_diagnosis_compares_with_the_learned_background(detector) -> None:
    classifier = detector.model.roi_heads.box_predictor.cls_score
    detector.set_vocabulary("taco, koala, dog " + "dog " * 30)
    with torch.no_grad():
        classifier.background_embedding.copy_(classifier.text_embeddings[1])
    found = detector.diagnose(threshold=1.0)
    assert "koala" in [entry[0] for entry in found.near_background]
    assert len(found.cut) == 1 and found.num_words == 3


def test_a_detection_is_explained_by_the_parts_of_its_score(detector) -> None:
    detector.set_vocabulary("cat, taco, koala")
    found = detector.predict(random_image(), score_threshold=0.0, max_detections=9)
    for index in (0, 8):
        explanation = detector.explain(random_image(), index=index, top=10)
        np.testing.assert_allclose(explanation.box, found.boxes[index])
        parts = {w.word: w for w in explanation.words}
        # The competitors are listed with the three words.
        assert set(parts) == {"cat", "taco", "koala", "fire_engine", "mouse_(rodent)"}
        assert [w for w in parts if not parts[w].reported] and not parts["fire_engine"].reported
        assert parts["cat"].weight == 0.35 and parts["taco"].weight == 0.65
        assert parts[found.names[index]].score == pytest.approx(found.scores[index], rel=1e-5)
        unscaled = {w: p.detector ** (1 - p.weight) * p.image_text**p.weight for w, p in parts.items()}
        total = explanation.background + sum(unscaled.values())
        for word, value in unscaled.items():
            assert parts[word].fused == pytest.approx(value / total, rel=1e-4)
        assert explanation.background_fused == pytest.approx(explanation.background / total, rel=1e-4)


def test_a_box_is_explained_as_if_it_had_been_proposed(detector) -> None:
    detector.set_vocabulary("cat, taco, koala", competitors=False)
    heads, picture = detector.model.roi_heads, random_image(160, 160)  # at the network's own size
    heads.objectness_delta = 2.0
    inputs = {"image": torch.from_numpy(picture.transpose(2, 0, 1).copy()), "height": 160, "width": 160}
    part = detector.model.inference([inputs], return_parts=True)[0]["parts"]
    explanation = detector.explain(picture, box=part.proposals[3].tolist())
    assert explanation.overlap == pytest.approx(1.0) and explanation.delta == 2.0
    assert explanation.objectness == pytest.approx(float(part.objectness[3]), rel=1e-4)
    for word in explanation.words:
        column = 1 + detector.vocabulary.words.index(word.word)
        assert word.detector == pytest.approx(float(part.detector[3, column]), rel=1e-3)
        assert word.image_text == pytest.approx(float(part.image_text[3, column]), rel=1e-3)
        assert word.score == pytest.approx(word.fused * explanation.objectness**2, rel=1e-4)
    assert [w.score for w in explanation.words] == sorted((w.score for w in explanation.words), reverse=True)


def test_the_explanation_is_a_table(tmp_path, image_text_folder) -> None:
    saved(tmp_path / "d", image_text_folder, mask_on=False, vlm_mode="off")
    detector = OpenVocabularyDetector.from_checkpoint(tmp_path / "d")
    detector.set_vocabulary("taco, koala")
    text = str(detector.explain(random_image(), box=(10, 10, 90, 60), top=2))
    assert "taco (novel)" in text or "koala (novel)" in text or "competes only" in text
    assert "detector z" in text and "box: 10.0, 10.0, 90.0, 60.0" in text and "objectness" in text
    assert " - " in text  # no image-text score
    assert "raw score |" in text and "before any calibration, as predict(picture, calibrated=False) gives it" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either box or index"),
        ({"box": (0, 0, 9, 9), "index": 0}, "either box or index"),
        ({"box": (500, 500, 600, 600)}, "has no area inside the picture of 200 x 120"),
        ({"box": (50, 50, 10, 60)}, "has no area"),
        ({"box": (1, 2, 3)}, "has no area"),
        ({"box": (0, 0, float("nan"), 9)}, "has no area"),
        ({"index": 10_000}, "the picture has"),
        ({"index": -1}, "index is -1; give a whole number"),
    ],
)
def test_a_region_that_cannot_be_explained_is_refused(detector, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        detector.explain(random_image(), **arguments)


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


def test_a_folder_of_the_same_name_is_no_detector_that_ships(tmp_path, monkeypatch) -> None:
    own = tmp_path / "mini" / "config.yaml"
    own.parent.mkdir()
    own.touch()
    monkeypatch.chdir(tmp_path)
    assert detector_folder("mini") == Path("mini")
    assert detector_folder("mini", shipped_only=True) == Path(ovd.__file__).parent / "weights" / "mini"
    with pytest.raises(ValueError, match="'maxi' is no detector: .* one that ships .mini"):
        detector_folder("maxi")


def test_predicting_without_a_vocabulary_says_so(image_text_folder, image_text) -> None:
    detector = OpenVocabularyDetector(build_detector(DetectorConfig(**SMALL), image_text), image_text)
    with pytest.raises(ValueError, match="call set_vocabulary first"):
        detector.predict(random_image())
